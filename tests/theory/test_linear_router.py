"""On positions of one length a Gaussian is a linear score with a bias, and the other way round; elsewhere it is not."""

# B batch, T token, H head, M splat, P position width

import pytest
import torch
import torch.nn.functional as F

from splatflow.nn import SplatAttention
from splatflow.ops import ROUTINGS, Splats, log_affinity
from splatflow.ops.routing import route

T, H, M, P = 101, 3, 7, 5


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_scores(positions, weights, biases):
    return torch.einsum("BTHP,HMP->BTHM", positions, weights) + biases


def as_linear(splats, squared_norm):
    """(weights, biases) that score positions of this squared length as the Gaussians do."""
    precision = torch.exp(-2 * splats.log_scales)
    weights = splats.centers * precision[..., None]
    biases = splats.log_amplitudes - 0.5 * precision * (squared_norm + splats.centers.square().sum(-1))
    return weights, biases


def as_gaussians(weights, biases, log_scales, squared_norm):
    """Gaussians of any scales we like that score positions of this squared length as the linear router does."""
    variance = torch.exp(2 * log_scales)
    centers = variance[..., None] * weights
    return Splats(centers, log_scales, biases + (squared_norm + centers.square().sum(-1)) / (2 * variance))


def unexplained(positions, splats):
    """Share of the log-ratios between splats that no linear score with a bias explains, by least squares; per head."""
    scores = log_affinity(positions, splats)[0].transpose(0, 1)  # [H, T, M]
    ratios = scores - scores[..., :1]
    features = F.pad(positions[0].transpose(0, 1), (0, 1), value=1.0)
    rest = ratios - features @ (torch.linalg.pinv(features) @ ratios)
    return rest.square().sum((1, 2)) / (ratios - ratios.mean(1, keepdim=True)).square().sum((1, 2))


def unequal_splats():
    return Splats(normal(1, H, M, P), 0.5 * normal(2, H, M), normal(3, H, M))


def normalised_positions():
    return F.rms_norm(normal(4, 1, T, H, P), (P,), eps=0.0)


def test_a_layer_puts_all_tokens_on_one_sphere():
    layer = SplatAttention(hidden_size=H * P, num_heads=H, num_splats=M).double()
    send, receive, _, _ = layer.projections(normal(5, 2, T, H * P))
    for positions in (send, receive):
        torch.testing.assert_close(positions.square().sum(-1), torch.full((2, T, H), float(P), dtype=torch.float64))


@pytest.mark.parametrize("routing", ["mixture", "gaussian"])
def test_gaussians_of_any_scales_are_a_linear_router(routing):
    positions, splats = normalised_positions(), unequal_splats()
    expected = ROUTINGS[routing].weights(linear_scores(positions, *as_linear(splats, P)))
    torch.testing.assert_close(route(positions, splats, routing), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("routing", ["mixture", "gaussian"])
def test_a_linear_router_is_gaussians_of_whatever_scales(routing):
    positions, weights, biases = normalised_positions(), normal(6, H, M, P), normal(7, H, M)
    expected = ROUTINGS[routing].weights(linear_scores(positions, weights, biases))
    for log_scales in (torch.zeros(H, M, dtype=torch.float64), 0.5 * normal(8, H, M)):
        splats = as_gaussians(weights, biases, log_scales, P)
        torch.testing.assert_close(route(positions, splats, routing), expected, rtol=1e-10, atol=1e-14)


def test_only_unequal_scales_off_the_sphere_are_more_than_linear():
    splats = unequal_splats()
    equal = splats._replace(log_scales=torch.full_like(splats.log_scales, 0.3))
    free = normal(9, 1, T, H, P)
    assert unexplained(normalised_positions(), splats).max() < 1e-20
    assert unexplained(free, equal).max() < 1e-20
    assert unexplained(free, splats).min() > 0.05
    weights, biases = as_linear(splats, P)
    far_off = (route(free, splats, "mixture") - linear_scores(free, weights, biases).softmax(-1)).abs().sum(-1)
    assert far_off.mean() > 0.1  # of at most 2
