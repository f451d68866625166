"""One layer that hears one token again and again comes to rest: it cannot tell odd from even, and a delta rule can."""

# B batch, T token, C hidden size

import pytest
import torch

from splatflow.nn import SplatAttention
from splatflow.nn.splat_attention import GRAINS

REPEATS = 10_007
C = 15


def random_layer(seed, *, num_heads=3, **options):
    """No parameter is where a layer starts: the prior is heavy and says something."""
    torch.manual_seed(seed)
    layer = SplatAttention(C, num_heads, num_splats=7, **options).double()
    with torch.no_grad():
        for parameter in (layer.prior_log_mass, layer.prior_content, layer.centers, layer.log_amplitudes):
            parameter.copy_(torch.randn_like(parameter))
    return layer


@torch.no_grad()
def steps_between_outputs(layer):
    """|y_{n+1} - y_n| after n = 1, 2, ... times the same token."""
    token = torch.randn(1, 1, C, dtype=torch.float64)
    output, _ = layer(token.expand(1, REPEATS, C))
    return output[0].diff(dim=0).norm(dim=-1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("write_gate", [False, True])
@pytest.mark.parametrize("decay", GRAINS)
def test_a_repeated_token_brings_the_layer_to_rest(decay, write_gate, seed):
    steps = steps_between_outputs(random_layer(seed, decay=decay, write_gate=write_gate))
    assert steps[1999] < 1e-3 * steps[0]
    late = steps[8000:]  # a splat to which the token sends little is late, but comes to rest like the others
    assert (late.diff() <= 1e-14).all()  # ever smaller, up to the rounding of outputs of size 1


@pytest.mark.parametrize("seed", range(3))
def test_so_does_one_with_a_window_and_a_convolution(seed):
    layer = random_layer(seed, window_size=5, position_dim=4, conv_size=3, decay="head", head_norm=True)
    steps = steps_between_outputs(layer)
    assert steps[1999] < 1e-3 * steps[0]


def test_a_delta_rule_of_strength_two_counts_modulo_two():
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    key = torch.nn.functional.normalize(torch.randn(5, generator=generator, dtype=torch.float64), dim=0)
    reflection = torch.eye(5, dtype=torch.float64) - 2 * torch.outer(key, key)
    first = state @ key
    for count in range(1, 2003):
        state = state @ reflection
        torch.testing.assert_close(state @ key, first * (-1) ** count, rtol=1e-10, atol=1e-10)
