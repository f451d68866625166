"""Streams that share one set of splats: equal to one dense matrix over all their tokens, in any order of streams."""

from functools import partial
from itertools import permutations

import pytest
import torch

from splatflow import SplatAttention, SplatCrossAttention
from splatflow.ops import ROUTINGS
from splatflow.ops.reference import reference
from splatflow.ops.routing import Router
from splatflow.ops.splats import Sources, Targets

B, H, M, P, D = 2, 3, 5, 7, 11
SIZES, LENGTHS = (13, 17, 6), (19, 1, 23)
EXTRAS = {"write_gate": True, "head_norm": True, "output_gate": True}

every_routing = pytest.mark.parametrize("routing", ["mixture", "gaussian"])


def random_layer(sizes=SIZES, **options):
    """A layer in fp64 whose parameters, the prior too, are far from their starting values."""
    torch.manual_seed(0)
    layer = SplatCrossAttention(sizes, H, M, **{"head_dim": D, "position_dim": P, **options}).double()
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def random_streams(sizes=SIZES, lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(B, length, size, dtype=torch.float64, generator=generator)
        for size, length in zip(sizes, lengths, strict=True)
    ]


def dense(layer, streams):
    """All streams laid end to end as sources, against one dense matrix."""
    projected = [project(stream, None) for project, stream in zip(layer.projections, streams, strict=True)]
    end_to_end = partial(torch.cat, dim=1)
    splats, prior = layer.shared.splats, layer.shared.initial_state(B)
    sent = (end_to_end([part.send_positions for part in projected]), end_to_end([part.values for part in projected]))
    gates = [part.write_gate for part in projected]
    heard, state = reference(
        Sources(*sent, None, None, None if gates[0] is None else end_to_end(gates)),
        Targets(end_to_end([part.receive_positions for part in projected]), None),
        Router(ROUTINGS[layer.shared.routing], splats, None),
        prior,
        causal=False,
    )
    parts = heard.split([stream.shape[1] for stream in streams], 1)
    return [out(part, stream) for out, part, stream in zip(layer.outputs, parts, streams, strict=True)], state


def loss_of(outputs):
    return sum((index + 1) * output.square().sum() for index, output in enumerate(outputs))


@every_routing
@pytest.mark.parametrize("conv_size", [0, 4])
def test_equals_the_dense_reference_over_all_sources(routing, conv_size):
    layer = random_layer(routing=routing, conv_size=conv_size, **EXTRAS)
    streams = [stream.requires_grad_() for stream in random_streams()]
    (outputs, state), (expected, expected_state) = layer(streams), dense(layer, streams)
    leaves = [*streams, *layer.parameters()]
    names = [*("streams" for _ in streams), *(name for name, _ in layer.named_parameters())]
    gradients, expected_gradients = (
        torch.autograd.grad(loss_of(found) + kept.total.sum() + kept.mass.sum(), leaves)
        for found, kept in ((outputs, state), (expected, expected_state))
    )
    for found, right in zip((*outputs, *state), (*expected, *expected_state), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)
    for name, found, right in zip(names, gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-8, msg=name)
        assert right.any(), name


def test_permuting_the_streams_permutes_the_outputs():
    layer, streams = random_layer(**EXTRAS), random_streams()
    outputs, state = layer(streams)
    for order in permutations(range(len(SIZES))):
        other = random_layer([SIZES[index] for index in order], **EXTRAS)
        other.shared.load_state_dict(layer.shared.state_dict())
        for place, index in enumerate(order):
            other.projections[place].load_state_dict(layer.projections[index].state_dict())
            other.outputs[place].load_state_dict(layer.outputs[index].state_dict())
        permuted, same_state = other([streams[index] for index in order])
        for place, index in enumerate(order):
            torch.testing.assert_close(permuted[place], outputs[index], rtol=0, atol=1e-10)
        torch.testing.assert_close(same_state, state, rtol=0, atol=1e-10)


def test_one_stream_equals_bidirectional_splat_attention():
    size = H * D
    options = {"position_dim": P, "conv_size": 3, **EXTRAS}
    layer, twin = random_layer((size,), **options), SplatAttention(size, H, M, causal=False, **options).double()
    names = {"shared.": "", "projections.0.": "projections.", "outputs.0.": "output."}
    names["projections.0.projections."] = "projections."
    names["projections.0.write_gate_proj."] = "write_gate_proj."
    parameters = {}
    for name, parameter in layer.state_dict().items():
        prefix = max((prefix for prefix in names if name.startswith(prefix)), key=len)
        parameters[names[prefix] + name.removeprefix(prefix)] = parameter
    twin.load_state_dict(parameters)
    [stream] = random_streams((size,), (19,))
    mask = torch.ones(B, 19).index_fill(1, torch.arange(4), 0)
    ([output], state), (expected, expected_state) = (
        layer([stream], attention_masks=[mask]),
        twin(stream, attention_mask=mask),
    )
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, expected_state.splats, rtol=0, atol=1e-12)


def test_an_empty_stream_is_as_good_as_none():
    layer, (first, _, last) = random_layer(), random_streams()
    outputs, state = layer([first, first.new_zeros(B, 0, SIZES[1]), last])
    assert outputs[1].shape == (B, 0, SIZES[1])
    without = random_layer((SIZES[0], SIZES[2]))
    without.shared.load_state_dict(layer.shared.state_dict())
    for place, index in enumerate((0, 2)):
        without.projections[place].load_state_dict(layer.projections[index].state_dict())
        without.outputs[place].load_state_dict(layer.outputs[index].state_dict())
    expected, expected_state = without([first, last])
    torch.testing.assert_close([outputs[0], outputs[2]], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("conv_size", [0, 3, 4])
def test_padding_equals_leaving_it_out(conv_size):
    layer, streams = random_layer(conv_size=conv_size, **EXTRAS), random_streams()
    masks = [torch.ones(B, length, dtype=torch.bool) for length in LENGTHS]
    masks[0][:, :5], masks[2][:, -3:] = False, False
    padded = [stream.masked_fill(~mask[..., None], torch.nan) for stream, mask in zip(streams, masks, strict=True)]
    outputs, state = layer(padded, attention_masks=[masks[0], None, masks[2]])
    expected, expected_state = layer([streams[0][:, 5:], streams[1], streams[2][:, :-3]])
    found = [outputs[0][:, 5:], outputs[1], outputs[2][:, :-3]]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=1e-10)


def test_who_does_not_send_is_not_heard_and_still_hears():
    layer, streams = random_layer(), random_streams()
    outputs, state = layer(streams, senders=(1, 2))
    changed, same_state = layer([streams[0] + 1.0, *streams[1:]], senders=(1, 2))
    assert torch.equal(changed[1], outputs[1])
    assert torch.equal(changed[2], outputs[2])
    assert torch.equal(same_state.total, state.total)
    heard, _ = layer([*streams[:2], streams[2] + 1.0], senders=(1, 2))
    assert (heard[0] != outputs[0]).any(-1).all()


def test_streams_may_come_one_after_another():
    """Sending alone, then receiving from what was sent, equals one call."""
    layer, streams = random_layer(**EXTRAS), random_streams()
    expected, expected_state = layer(streams)
    state = None
    for index in range(len(SIZES)):
        _, state = layer(streams, senders=(index,), state=state)
    outputs, _ = layer(streams, senders=(), state=state)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_have_the_types_and_shapes_of_the_streams(dtype):
    layer = SplatCrossAttention((24, 40), num_heads=4, num_splats=M, **EXTRAS).to(dtype)
    streams = [stream.to(dtype) for stream in random_streams((24, 40), (3, 31))]
    outputs, state = layer(streams)
    assert [(output.shape, output.dtype) for output in outputs] == [(stream.shape, dtype) for stream in streams]
    assert all(output.isfinite().all() for output in outputs)
    assert state.total.shape == (B, 4, M, 10)  # by the widest stream


def test_nan_in_one_sequence_reaches_no_other():
    layer, streams = random_layer(), random_streams()
    sick = [stream.clone() for stream in streams]
    sick[0][1, 3] = torch.nan
    for well, ill in zip(layer(streams)[0], layer(sick)[0], strict=True):
        assert torch.equal(well[0], ill[0])
        assert ill[1].isnan().any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden_sizes": ()}, ValueError, "hidden_sizes is empty"),
        ({"hidden_sizes": (12, 0)}, ValueError, r"hidden_sizes\[1\] is 0"),
        ({"hidden_sizes": (12, 8.0)}, TypeError, r"hidden_sizes\[1\] is 8.0"),
        ({"hidden_sizes": (12, 13)}, ValueError, "hidden_size is 13, expected a multiple of num_heads"),
        ({"num_splats": 0}, ValueError, "num_splats is 0"),
        ({"head_dim": 0}, ValueError, "head_dim is 0"),
        ({"position_dim": -1}, ValueError, "position_dim is -1"),
        ({"conv_size": -1}, ValueError, "conv_size is -1"),
        ({"routing": "random"}, ValueError, "routing is 'random'"),
    ],
)
def test_wrong_sizes(options, error, message):
    with pytest.raises(error, match=message):
        SplatCrossAttention(**{"hidden_sizes": (12, 8), "num_heads": 4, "num_splats": 3, **options})


@pytest.mark.parametrize(
    ("streams", "options", "message"),
    [
        ([(2, 5, 12)], {}, "streams has 1 entries, expected 2"),
        ([(2, 5, 12), (2, 5, 12)], {}, r"streams\[1\] has shape \[2, 5, 12\], expected \[batch, tokens, 8\]"),
        ([(2, 5, 12), (3, 5, 8)], {}, r"streams\[1\] has 3 sequences, expected 2"),
        ([(2, 5, 12), (2, 5, 8)], {"attention_masks": [None]}, "attention_masks has 1 entries, expected 2"),
        (
            [(2, 5, 12), (2, 5, 8)],
            {"attention_masks": [None, torch.ones(2, 4)]},
            r"attention_masks\[1\] has shape \[2, 4\].*each token of streams\[1\]",
        ),
        ([(2, 5, 12), (2, 5, 8)], {"senders": (2,)}, r"senders is \[2\], expected different numbers from 0 to 1"),
        ([(2, 5, 12), (2, 5, 8)], {"senders": (1, 1)}, r"senders is \[1, 1\]"),
    ],
)
def test_wrong_calls(streams, options, message):
    layer = SplatCrossAttention((12, 8), num_heads=4, num_splats=3)
    with pytest.raises(ValueError, match=message):
        layer([torch.zeros(shape) for shape in streams], **options)
