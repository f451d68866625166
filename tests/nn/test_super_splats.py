"""Hops in a layer: each changes what is heard, and at the start only a little."""

import torch

from splatflow.nn import SplatAttention

B, T, C, H, M = 2, 23, 12, 3, 7


def layer_of(hops):
    torch.manual_seed(5)
    return SplatAttention(C, H, M, hops=hops).double()


def test_each_hop_changes_the_output_and_at_the_start_a_little():
    tokens = torch.randn(B, T, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layers = [layer_of(hops) for hops in (0, 1, 2)]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict(), strict=False)
    outputs = [layer(tokens)[0] for layer in layers]
    sizes = [(output - outputs[0]).norm() / outputs[0].norm() for output in outputs[1:]]
    assert 0 < sizes[0] < sizes[1] < 0.1
    with torch.no_grad():
        layers[2].hops[1].strength_logit.fill_(-torch.inf)
    layers[2].hops[0].load_state_dict(layers[1].hops[0].state_dict())
    torch.testing.assert_close(layers[2](tokens)[0], outputs[1])
    assert layers[1].hops[0].centers.shape == (H, 3, C // H)  # the root of 7, rounded up
