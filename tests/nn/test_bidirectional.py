"""Mixers without a causal mask, and the centred convolution below them: everything real is heard, padding is not."""

import math
from functools import partial

import pytest
import torch

from splatflow.nn import MIXERS, ShortConvolution, SoftmaxAttention, SplatAttention
from splatflow.ops.window import rotate

B, T, C, H, M = 2, 23, 12, 3, 5

LAYERS = {
    f"{name}, convolution of {conv_size}": partial(
        mixer, C, H, causal=False, conv_size=conv_size, **({"num_splats": M} if name == "splat" else {})
    )
    for name, mixer in MIXERS.items()
    for conv_size in (0, 3, 4)
} | {
    "splat with everything": partial(
        SplatAttention,
        C,
        H,
        M,
        causal=False,
        conv_size=5,
        write_gate=True,
        head_norm=True,
        output_gate=True,
        value_skip=True,
    )
}
LAYERS |= {
    f"splat with {transform}": partial(SplatAttention, C, H, M, causal=False, write_gate=True, transform=transform)
    for transform in ("linear", "mlp")
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def random_layer(make):
    torch.manual_seed(0)
    layer = make().double()
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def random_tokens(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("length", [0, 1, 2, 11])
def test_a_convolution_hears_the_tokens_it_says(causal, size, length):
    convolution = ShortConvolution(C, size, causal=causal).double()
    inputs = random_tokens(B, length, C)
    before = size - 1 if causal else size // 2
    expected = torch.zeros_like(inputs)
    for token in range(length):
        for index in range(size):
            place = token - before + index
            if 0 <= place < length:
                expected[:, token] += convolution.weight[index] * inputs[:, place]
    output, state = convolution(inputs)
    torch.testing.assert_close(output, expected)
    assert (state is None) == (not causal)


@every_layer
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_equals_leaving_it_out(make, side):
    layer, num_padding = random_layer(make), 7
    tokens, real = random_tokens(B, T, C), torch.ones(B, T, dtype=torch.bool)
    padding, kept = (slice(num_padding), slice(num_padding, None))
    if side == "right":
        padding, kept = (slice(-num_padding, None), slice(-num_padding))
    real[0, padding] = False
    tokens[0, padding] = torch.nan
    tokens.requires_grad_()
    output, state = layer(tokens, attention_mask=real)
    alone, _ = layer(tokens[:1, kept])
    torch.testing.assert_close(output[:1, kept], alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(output[1:], layer(tokens[1:])[0], rtol=0, atol=1e-10)
    assert state.convolution is None
    (found,) = torch.autograd.grad(output[real].square().sum(), tokens)
    (expected,) = torch.autograd.grad(alone.square().sum(), tokens)
    torch.testing.assert_close(found[0, kept], expected[0, kept], rtol=0, atol=1e-9)
    assert not found[0, padding].any()


@every_layer
def test_each_token_hears_each_other_one(make):
    layer, tokens = random_layer(make), random_tokens(1, T, C)
    for place in (0, T // 2, T - 1):
        changed = tokens.clone()
        changed[:, place] += 1.0
        assert (layer(changed)[0] != layer(tokens)[0]).any(-1).all()


@every_layer
def test_every_parameter_is_used(make):
    layer = random_layer(make)
    layer(random_tokens(B, T, C))[0].square().sum().backward()
    assert not [name for name, parameter in layer.named_parameters() if not parameter.grad.any()]


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_the_type_and_shape_of_the_input(make, dtype):
    layer = make().to(dtype)
    for length in (0, 1, T):
        output, _ = layer(random_tokens(B, length, C).to(dtype), attention_mask=torch.zeros(B, length))
        assert output.shape == (B, length, C)
        assert output.dtype == dtype
        assert output.isfinite().all()


@pytest.mark.parametrize("masked", [True, False])
def test_the_twin_equals_a_dense_softmax_over_real_tokens(masked):
    layer, tokens = random_layer(partial(SoftmaxAttention, C, H, causal=False)), random_tokens(B, T, C)
    real = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < 0.7 if masked else torch.ones(B, T).bool()
    keys, queries, values, _ = layer.projections(tokens)
    queries = queries * layer.log_scale.exp()[:, None]
    scores = torch.einsum("BTHP,BSHP->BHTS", rotate(queries), rotate(keys)) / math.sqrt(C // H)
    weights = scores.masked_fill(~real[:, None, None], -torch.inf).softmax(-1)
    expected = layer.output(torch.einsum("BHTS,BSHD->BTHD", weights, values), tokens)
    output, _ = layer(tokens, attention_mask=real if masked else None)
    torch.testing.assert_close(output[real], expected[real], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (SoftmaxAttention, {"window_size": 4}, "window_size is 4, expected 0 with causal=False"),
        (partial(SplatAttention, num_splats=M), {"window_size": 4}, "window_size is 4, expected 0 with causal=False"),
        (partial(SplatAttention, num_splats=M), {"decay": "head"}, "decay is 'head', expected None with causal=False"),
    ],
)
def test_what_needs_an_order_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(hidden_size=C, num_heads=H, causal=False, **options)
