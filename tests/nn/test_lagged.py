"""An MLP of what splats held before each chunk of tokens: equal to its definition, in any pieces, with any padding."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from splatflow.nn import SplatAttention, silence
from splatflow.nn.factors import biases_of, log_decay_of, write_gate_of
from splatflow.nn.super_splats import mixing_of
from splatflow.ops import ROUTINGS
from splatflow.ops.lagged import slots_of
from splatflow.ops.routing import Router
from splatflow.ops.splats import Sources, SplatState, Targets, per_splat

B, T, C, H, M, L, W = 2, 23, 12, 3, 7, 5, 2
LATTICE = {"routing": "lattice", "num_splats": 9}
OPTIONS = {
    "plain": {},
    "gaussian": {"routing": "gaussian", "write_gate": True},
    "compact": {"routing": "compact", "decay": "head"},
    "decay per splat": {"decay": "splat", "write_gate": True, "value_dim": 11},
    "one splat": {"num_splats": 1, "decay": "splat", "write_gate": True},
    "window": {"window_size": W, "decay": "head", "write_gate": True, "routing_bias": True},
    "window, decay per splat": {"window_size": W, "decay": "splat"},
    "nearest": {"top_p": 2, "write_gate": True},
    "lattice": {**LATTICE, "top_p": 2, "window_size": W, "routing_bias": True},
    "whole lattice": {**LATTICE, "decay": "splat", "write_gate": True},
    "hops": {"hops": 2, "top_p": 3, "decay": "head"},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def random_layer(lag=L, **options):
    """A layer in fp64 whose parameters, the MLP and the prior too, are far from their starting values."""
    torch.manual_seed(3)
    layer = SplatAttention(C, H, **{"num_splats": M, "transform": "lagged", "lag": lag, **options}).double()
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def random_tokens(length=T, batch=B, seed=1):
    return torch.randn(batch, length, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_definition(layer, tokens, real=None, token_bias=None):
    """What the layer puts out with its window silenced, and its splats at the end: token by token."""
    batch, length = tokens.shape[:2]
    real = torch.ones(batch, length, dtype=torch.bool) if real is None else real
    tokens = tokens.masked_fill(~real[..., None], 0.0)
    send_positions, receive_positions, values, _ = layer.projections(tokens)
    send_bias, receive_bias = biases_of(tokens, layer.routing_bias_proj, H, 1, token_bias)
    gate = write_gate_of(tokens, layer.write_gate_proj, H, per_splat=layer.top_p is None)
    log_decay = log_decay_of(tokens, layer.decay_proj, H, per_splat=layer.decay == "splat")
    mixing = mixing_of(layer.hops, layer.free_splats()) if layer.hops else None
    router = Router(ROUTINGS[layer.routing], layer.splats, layer.top_p, mixing)
    send = router.send(Sources(send_positions, values, send_bias, None, per_splat(gate, tokens.dtype)))
    receive = router.receive(Targets(receive_positions, receive_bias))
    kept = torch.ones_like(send) if log_decay is None else per_splat(log_decay, tokens.dtype).exp().expand_as(send)
    gate_proj, up_proj, down_proj = (part.weight for part in layer.content_mlp.mlp.children())

    state, number, heard = layer.initial_state(batch), torch.zeros(batch, dtype=torch.int64), []
    made = torch.zeros_like(state.total)
    for i in range(length):
        j = i - layer.window_size  # who is sent when i arrives
        sent = real[:, j] if j >= 0 else torch.zeros(batch, dtype=torch.bool)
        exists = real[:, i] | sent
        contents = state.contents(router.routing.running_mean)
        now_made = (silu(contents @ gate_proj.T) * (contents @ up_proj.T)) @ down_proj.T
        made = torch.where((exists & (number % layer.lag == 0))[:, None, None, None], now_made, made)
        number = number + exists
        if j >= 0:
            mass, total = state
            mass = torch.where(sent[:, None, None], kept[:, j] * mass + send[:, j], mass)
            added = send[:, j, ..., None] * values[:, j, :, None]
            total = torch.where(sent[:, None, None, None], kept[:, j, ..., None] * total + added, total)
            state = SplatState(mass, total)
        says = state.contents(router.routing.running_mean) + made
        heard.append(torch.einsum("BHM,BHMD->BHD", receive[:, i], says))
    heard = torch.stack(heard, 1)
    if layer.window_size:
        heard = layer.memory_gate_proj(tokens).sigmoid()[..., H:, None] * heard
    return layer.output(heard, tokens), state


def run(layer, tokens, real=None, token_bias=None):
    with silence(layer, *(["window"] if layer.window_size else [])):
        return layer(tokens, attention_mask=real, token_bias=token_bias)


def results(function, layer, tokens, **others):
    """Output, state, and the gradients of one random weighing of both, all in fp64."""
    leaves = {"tokens": tokens.detach().requires_grad_(), **dict(layer.named_parameters())}
    output, state = function(layer, leaves["tokens"], **others)
    splats = getattr(state, "splats", state)
    parts = {"output": output, **splats._asdict()}
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in parts.values()]
    loss = sum((weight * part).sum() for weight, part in zip(weights, parts.values(), strict=True))
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    named = zip(leaves, gradients, strict=True)
    return parts | {f"d {name}": gradient for name, gradient in named if gradient is not None}


def relative_error(actual, expected):
    """Relative to at least the size that a sum over tokens has, for small ones are what large ones leave."""
    return ((actual.double() - expected).norm() / expected.norm().clamp_min((B * T) ** 0.5)).item()


@every_option
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_is_its_definition_with_every_gradient(options, dtype, tolerance):
    layer, tokens = random_layer(**options), random_tokens()
    expected = results(by_definition, layer, tokens)
    narrow = layer.to(dtype), tokens.to(dtype)
    actual, plain = results(run, *narrow), results(by_definition, *narrow)
    assert expected["d content_mlp.mlp.down_proj.weight"].any()
    assert actual.keys() == expected.keys()
    for name in expected:
        # at the edge of a compact kernel few digits are known, in whatever way it is computed
        limit = max(tolerance, 2 * relative_error(plain[name], expected[name]))
        assert relative_error(actual[name], expected[name]) <= limit, name


def test_a_bias_given_with_the_tokens_counts():
    layer, tokens = random_layer(decay="head"), random_tokens()
    bias = torch.randn(B, T, H, M, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    output, _ = run(layer, tokens, token_bias=bias)
    torch.testing.assert_close(output, by_definition(layer, tokens, token_bias=bias)[0])
    assert (output - run(layer, tokens)[0]).abs().max() > 1e-3


@settings(max_examples=50)
@given(
    option=st.sampled_from(["plain", "window", "decay per splat"]),
    lag=st.integers(1, T + 1),
    mask=st.lists(st.booleans(), min_size=B * T, max_size=B * T),
    cuts=st.lists(st.integers(0, T), max_size=5),
)
def test_with_padding_anywhere_and_in_any_pieces_it_is_its_definition(option, lag, mask, cuts):
    layer, tokens = random_layer(lag, **OPTIONS[option]), random_tokens()
    real = torch.tensor(mask).view(B, T)
    expected, _ = by_definition(layer, tokens, real)
    _, whole = layer(tokens, attention_mask=real)
    outputs, state = [], None
    with silence(layer, *(["window"] if layer.window_size else [])):
        for start, stop in itertools.pairwise([0, *sorted(cuts), T]):
            here = slice(start, stop)
            output, state = layer(tokens[:, here], attention_mask=real[:, here], state=state)
            outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1)[real], expected[real], rtol=0, atol=1e-10)
    assert torch.equal(state.lagged.num_tokens, whole.lagged.num_tokens)
    for actual, right in zip((*state.lagged.splats, *state.splats), (*whole.lagged.splats, *whole.splats), strict=True):
        torch.testing.assert_close(actual, right, rtol=0, atol=1e-10)


@every_option
@pytest.mark.parametrize("length", [1, L - 1, L, L + 1, T])
def test_token_by_token_equals_one_pass(options, length):
    layer, tokens = random_layer(**options), random_tokens(length)
    expected, expected_state = layer(tokens)
    outputs, state = [], None
    for token in tokens.split(1, dim=1):
        output, state = layer(token, state=state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=0, atol=1e-10)
    assert state.lagged.num_tokens.tolist() == expected_state.lagged.num_tokens.tolist() == [length % L] * B
    for actual, right in zip(state.lagged.splats, expected_state.lagged.splats, strict=True):
        torch.testing.assert_close(actual, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("window_size", [0, W])
def test_left_padding_equals_leaving_it_out_where_each_sequence_has_its_own(window_size):
    layer, tokens = random_layer(window_size=window_size, decay="head", conv_size=3), random_tokens(batch=3)
    paddings = torch.tensor([0, 3, 11])
    output, state = layer(tokens, attention_mask=torch.arange(T) >= paddings[:, None])
    assert state.lagged.num_tokens.tolist() == [(T - padding) % L for padding in paddings.tolist()]
    further = random_tokens(length=7, batch=3, seed=5)
    more, _ = layer(further, state=state)
    for sequence, padding in enumerate(paddings.tolist()):
        alone, alone_state = layer(tokens[sequence : sequence + 1, padding:])
        torch.testing.assert_close(output[sequence : sequence + 1, padding:], alone, rtol=0, atol=1e-10)
        more_alone, _ = layer(further[sequence : sequence + 1], state=alone_state)
        torch.testing.assert_close(more[sequence : sequence + 1], more_alone, rtol=0, atol=1e-10)


def test_a_change_is_heard_through_the_mlp_from_the_next_chunk_on():
    layer, tokens, place = random_layer(), random_tokens(), 2 * L + 1
    plain = random_layer(transform=None)
    plain.load_state_dict(layer.state_dict(), strict=False)
    changed = tokens.clone()
    changed[:, place] += 1.0
    through_mlp = [layer(part)[0] - plain(part)[0] for part in (tokens, changed)]
    moved = (through_mlp[1] - through_mlp[0]).abs().amax((0, 2)) > 1e-9
    # in its own chunk only the token itself, which receives from another place
    assert moved.nonzero()[:, 0].tolist() == [place, *range(3 * L, T)]


@settings(max_examples=50)
@given(
    length=st.integers(0, 19),
    lag=st.integers(1, 7),
    before=st.lists(st.integers(0, 6), min_size=3, max_size=3),
    mask=st.lists(st.booleans(), min_size=57, max_size=57),
)
def test_each_token_has_the_slot_of_its_number_and_padding_none_of_them(length, lag, before, mask):
    exists = torch.tensor(mask)[: 3 * length].view(3, length)
    before = [number % lag for number in before]
    slots = slots_of(exists, torch.tensor(before), lag)
    size = slots.num_chunks * slots.size
    for sequence in range(3):
        places = slots.at[sequence] - sequence * size
        taken = places[exists[sequence]].tolist()
        if length > 1:
            assert taken == list(range(before[sequence], before[sequence] + len(taken)))
        assert not set(taken) & set(places[~exists[sequence]].tolist())
        assert all(0 <= place < size for place in places.tolist())


def test_no_array_is_as_large_as_tokens_times_splats_times_width():
    length, num_splats, width = 1009, 61, 59
    torch.manual_seed(3)
    layer = SplatAttention(width, 1, num_splats, transform="lagged", decay="head")
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda part: sizes.append(part.numel()) or part, lambda part: part):
        output, _ = layer(torch.randn(1, length, width))
    output.sum().backward()
    assert max(sizes) < 8 * length * num_splats < length * num_splats * width


def test_padding_hears_nothing_of_what_follows():
    layer = random_layer()
    tokens = torch.randn(2, 3 * L + 1, C, dtype=torch.float64)
    real = torch.rand(tokens.shape[:2], generator=torch.Generator().manual_seed(0)) > 0.4
    later = tokens.clone()
    later[:, L + 2 :] *= 100.0
    outputs = [layer(part, attention_mask=real)[0][:, : L + 2] for part in (tokens, later)]
    assert outputs[0].equal(outputs[1])
