"""Every mixer, with every option: exact in time, resumable, deaf to padding and to other sequences."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splatflow.nn import MIXERS, SplatAttention, silence

B, T, C, H, M = 2, 41, 24, 2, 5
WINDOW, CONVOLUTION = 7, 3
LARGEST = torch.finfo(torch.float32).max

EXTRAS = {"head_norm": True, "output_gate": True, "conv_size": CONVOLUTION}
EVERYTHING = {"window_size": WINDOW, "write_gate": True, **EXTRAS}
SIZES = {"splat": {"num_splats": M}}  # what a mixer wants beside hidden size and heads

LAYERS = {
    f"{name} {label}": partial(mixer, C, H, **SIZES.get(name, {}), **options)
    for name, mixer in MIXERS.items()
    for label, options in {
        "plain": {},
        "window": {"window_size": WINDOW},
        "extras": EXTRAS,
        "window and extras": {"window_size": WINDOW, **EXTRAS},
        "shared senders": {"num_key_value_heads": 1, "window_size": WINDOW, **EXTRAS},
    }.items()
} | {
    f"splat {label}": partial(SplatAttention, C, H, **{"num_splats": M, **options})
    for label, options in {
        "decay per head": {"decay": "head"},
        "decay per splat": {"decay": "splat", "window_size": WINDOW},
        "everything": {"decay": "head", **EVERYTHING},
        "everything per splat": {"decay": "splat", **EVERYTHING},
        "tied gaussian": {"tied_positions": True, "routing": "gaussian", "window_size": 1},
        "wide positions": {"position_dim": 18, "write_gate": True},
        "top 2": {"top_p": 2, **EVERYTHING},
        "compact": {"routing": "compact", "window_size": WINDOW},
        "lattice": {"routing": "lattice", "num_splats": 9, "top_p": 3, **EVERYTHING},
        "whole lattice": {"routing": "lattice", "num_splats": 9, "decay": "splat", "write_gate": True},
        "grouped": {"routing": "grouped", "num_splats": 64, "top_p": 2, "window_size": WINDOW},
        "routing bias": {"routing_bias": True, "window_size": WINDOW},
        "biased lattice": {"routing": "lattice", "num_splats": 9, "top_p": 2, "routing_bias": True},
        "one hop": {"hops": 1, "decay": "splat"},
        "two hops": {"hops": 2, "num_super_splats": 2, "top_p": 3, **EVERYTHING},
        "linear": {"transform": "linear", "decay": "splat", "hops": 1},
        "linear, nearest": {"transform": "linear", "value_dim": 7, "top_p": 2, "window_size": WINDOW},
        "lagged": {"transform": "lagged", "lag": 5, "decay": "splat", "hops": 1},
        "lagged, nearest": {"transform": "lagged", "lag": 11, "value_dim": 7, "top_p": 2, **EVERYTHING},
        "wide values": {"value_dim": 19, "head_norm": True, "window_size": WINDOW},
        "shared senders, everything": {"num_key_value_heads": 1, "decay": "splat", "value_skip": True, **EVERYTHING},
        "shared senders, biased": {"num_key_value_heads": 1, "routing_bias": True, "transform": "lagged", "lag": 5},
        "shared lattice": {"num_key_value_heads": 1, "routing": "lattice", "num_splats": 9, "top_p": 2, "hops": 0},
        "value skip": {"value_skip": True, "decay": "head", "window_size": WINDOW, **EXTRAS},
    }.items()
}
SPLAT_LAYERS = {name: make for name, make in LAYERS.items() if make.func is SplatAttention}

every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
every_splat_layer = pytest.mark.parametrize("make", SPLAT_LAYERS.values(), ids=SPLAT_LAYERS)
WINDOW_LAYERS = {name: make for name, make in SPLAT_LAYERS.items() if make.keywords.get("window_size")}
every_window_layer = pytest.mark.parametrize("make", WINDOW_LAYERS.values(), ids=WINDOW_LAYERS)


def random_layer(make, seed=0):
    """A layer in fp64 whose parameters, the prior too, are far from their starting values."""
    torch.manual_seed(seed)
    layer = make().double()
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def random_tokens(batch=B, length=T, seed=1):
    return torch.randn(batch, length, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tensors_of(state):
    """All tensors of a nested state, in order."""
    if state is None:
        return []
    return [state] if isinstance(state, torch.Tensor) else [tensor for part in state for tensor in tensors_of(part)]


@every_layer
@settings(max_examples=20)
@given(seed=st.integers(0, 1000), past=st.integers(1, T - 1), number=st.sampled_from((0.0, 1e4, 1e30, LARGEST)))
def test_the_future_changes_no_bit_of_the_past(make, seed, past, number):
    layer, tokens = random_layer(make, seed).float(), random_tokens(seed=seed).float()
    changed = tokens.clone()
    changed[:, past:] = number * tokens[:, past:].sign()
    assert torch.equal(layer(changed)[0][:, :past], layer(tokens)[0][:, :past])


@every_layer
@settings(max_examples=20)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, T), max_size=5))
def test_any_split_with_carried_state_equals_one_pass(make, seed, cuts):
    layer, tokens = random_layer(make, seed), random_tokens(seed=seed)
    expected, expected_state = layer(tokens)
    outputs, state = [], None
    cuts = [0, *sorted(cuts), T]
    for start, stop in itertools.pairwise(cuts):
        output, state = layer(tokens[:, start:stop], state=state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=0, atol=1e-10)
    for actual, right in zip(tensors_of(state), tensors_of(expected_state), strict=True):
        torch.testing.assert_close(actual, right, rtol=0, atol=1e-10)


@every_layer
def test_token_by_token_equals_one_pass(make):
    layer, tokens = random_layer(make), random_tokens()
    outputs, state = [], None
    for token in tokens.split(1, dim=1):
        output, state = layer(token, state=state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), layer(tokens)[0], rtol=0, atol=1e-10)


@every_layer
def test_nan_in_one_sequence_reaches_no_other(make):
    layer, tokens = random_layer(make), random_tokens(batch=3)
    sick = tokens.clone()
    sick[1, 5] = torch.nan
    leaves = [part.requires_grad_() for part in (tokens, sick)]
    outputs = [layer(part)[0] for part in leaves]
    well, ill = (
        torch.autograd.grad(output, leaf, torch.ones_like(output)) for output, leaf in zip(outputs, leaves, strict=True)
    )
    others = torch.tensor([0, 2])
    assert torch.equal(outputs[0][others], outputs[1][others])
    assert torch.equal(well[0][others], ill[0][others])
    assert outputs[1][1, 5:].isnan().any()


@every_layer
def test_left_padding_equals_leaving_it_out(make):
    layer, tokens = random_layer(make), random_tokens()
    num_padding = 11
    real = torch.ones(B, T, dtype=torch.bool)
    real[0, :num_padding] = False
    tokens[0, :num_padding] = torch.nan
    tokens.requires_grad_()
    output, state = layer(tokens, attention_mask=real)
    alone, _ = layer(tokens[:1, num_padding:])
    torch.testing.assert_close(output[:1, num_padding:], alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(output[1:], layer(tokens[1:])[0], rtol=0, atol=1e-10)
    (gradient,) = torch.autograd.grad(output[real].sum(), tokens)
    assert gradient.isfinite().all()
    again, _ = layer(random_tokens(length=3), state=state)
    assert again.isfinite().all()


@every_layer
def test_every_parameter_is_used(make):
    layer = random_layer(make)
    output, _ = layer(random_tokens())
    (output.square().sum()).backward()
    unused = [name for name, parameter in layer.named_parameters() if not parameter.grad.any()]
    assert not unused


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_the_type_and_shape_of_the_input(make, dtype):
    layer = make().to(dtype)
    for length in (0, 1, WINDOW, T):
        output, _ = layer(random_tokens(length=length).to(dtype))
        assert output.shape == (B, length, C)
        assert output.dtype == dtype
        assert output.isfinite().all()


@every_splat_layer
def test_the_state_does_not_grow(make):
    layer = make()
    sizes = []
    for length in (1, T, 1009):
        _, state = layer(random_tokens(batch=1, length=length).float())
        sizes.append(sum(tensor.nbytes for tensor in tensors_of(state)))
    assert len(set(sizes)) == 1


@every_window_layer
def test_a_token_is_heard_by_the_splats_only_after_it_left_the_window(make):
    """With the window silenced, a change of a token is first heard `window_size` tokens later."""
    layer, tokens = random_layer(make), random_tokens()
    changed, place = tokens.clone(), 13
    changed[:, place] += 1.0
    with silence(layer, "window"):
        same = (layer(tokens)[0] == layer(changed)[0]).all(-1).all(0)
    reach = layer.projections.convolution.size - 1 if layer.projections.convolution else 0
    untouched = torch.arange(T)
    near = (untouched >= place + 1 + reach) & (untouched < place + layer.window_size)
    assert same[near].all()
    assert not same[place + layer.window_size :].any()


@every_splat_layer
def test_silence_leaves_no_trace(make):
    layer, tokens = random_layer(make), random_tokens()
    before, _ = layer(tokens)
    with silence(layer, *(("splats", "window") if layer.window_size else ("splats",))):
        silent, _ = layer(tokens)
    # all that is left is a token's own value, times the strength of the skip
    skipped = torch.zeros(B, T, H, getattr(layer, "value_dim", C // H), dtype=tokens.dtype)
    if layer.value_skip is not None:
        skipped = layer.projections(tokens)[2] * layer.value_skip[:, None]
    assert torch.equal(silent, layer.output(skipped, tokens))
    assert silent.any() == (layer.value_skip is not None)
    assert torch.equal(layer(tokens)[0], before)


def test_without_order_all_tokens_are_heard():
    layer, tokens = random_layer(partial(SplatAttention, C, H, M, causal=False, write_gate=True)), random_tokens()
    changed = tokens.clone()
    changed[:, -1] += 1.0
    assert (layer(changed)[0] != layer(tokens)[0]).any(-1).all()
    order = torch.randperm(T, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(layer(tokens[:, order])[0], layer(tokens)[0][:, order], rtol=0, atol=1e-10)
