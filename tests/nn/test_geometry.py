"""Overlap is the integral it stands for; forces point apart; what is kept apart is apart, and stays where it was."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from splatflow.nn.geometry import DORMANT, distances, keep_apart, keep_length, overlap, overlap_loss, repulsion
from splatflow.ops import Splats

H, M, P = 2, 7, 5


def random_splats(seed=0, width=P, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    centers, log_scales = (
        torch.randn(shape, generator=generator, dtype=dtype) for shape in ((H, M, width), (H, M))
    )  # fmt: skip
    return Splats(centers, 0.2 * log_scales, torch.zeros(H, M, dtype=dtype))


def nearest_gaps(centers):
    gaps = torch.cdist(centers.double(), centers.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return gaps.masked_fill(torch.eye(gaps.shape[-1], dtype=torch.bool), torch.inf).amin(-1)


@pytest.mark.parametrize("width", [1, 2])
def test_overlap_is_the_integral_of_the_root_of_two_densities(width):
    splats = random_splats(width=width)
    axis = torch.linspace(-17, 17, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * width).view(-1, width)
    step = (axis[1] - axis[0]) ** width
    variance = (2 * splats.log_scales).exp()[..., None]
    squares = (grid - splats.centers[:, :, None]).square().sum(-1)  # [H, M, grid]
    densities = (-squares / (2 * variance)).exp() / (2 * math.pi * variance) ** (width / 2)
    roots = densities.sqrt()
    torch.testing.assert_close(overlap(splats), roots @ roots.mT * step, rtol=0, atol=1e-9)


def test_overlap_loss_is_the_mean_over_pairs_of_awake_splats():
    splats = random_splats()
    pairs = [overlap(splats)[head, a, b] for head in range(H) for a in range(M) for b in range(a)]
    torch.testing.assert_close(overlap_loss(splats), torch.stack(pairs).mean())
    asleep = splats._replace(log_amplitudes=torch.zeros(H, M).index_fill(1, torch.tensor([2]), DORMANT))
    left = Splats(*(part[:, [0, 1, 3, 4, 5, 6]] for part in splats[:3]))
    torch.testing.assert_close(overlap_loss(asleep), overlap_loss(left))
    assert overlap_loss(Splats(*(part[:, :1] for part in splats[:3]))) == 0


def test_overlap_loss_has_the_gradient_of_its_formula_even_between_equal_centers():
    splats = [part.requires_grad_() for part in random_splats()[:3]]
    assert torch.autograd.gradcheck(lambda *parts: overlap_loss(Splats(*parts)), splats)
    equal = torch.ones(H, M, P, requires_grad=True)
    (gradient,) = torch.autograd.grad(overlap_loss(Splats(equal, torch.zeros(H, M), torch.zeros(H, M))), equal)
    assert torch.equal(gradient, torch.zeros(H, M, P))


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), size=st.sampled_from((1e-5, 1e-2, 1.0)))
def test_repulsion_is_the_mean_direction_away_weighed_by_overlap(seed, size):
    splats = random_splats(seed)
    splats = splats._replace(centers=3.0 + size * splats.centers)
    expected = torch.zeros(H, M, P, dtype=torch.float64)
    for a in range(M):
        for b in set(range(M)) - {a}:
            gap = splats.centers[:, a] - splats.centers[:, b]
            expected[:, a] += overlap(splats)[:, a, b, None] * F.normalize(gap, dim=-1) / (M - 1)
    torch.testing.assert_close(repulsion(splats), expected, rtol=0, atol=1e-9)
    single = repulsion(Splats(*(part.float() for part in splats[:3])))
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=0.1)


def test_repulsion_leaves_equal_and_sleeping_splats_alone():
    splats = random_splats()
    equal = splats._replace(centers=splats.centers[:, :1].expand(H, M, P))
    assert not repulsion(equal).any()
    asleep = splats._replace(log_amplitudes=torch.zeros(H, M).index_fill(1, torch.tensor([2]), DORMANT))
    left = Splats(*(part[:, [0, 1, 3, 4, 5, 6]] for part in splats[:3]))
    assert not repulsion(asleep)[:, 2].any()
    torch.testing.assert_close(repulsion(asleep)[:, [0, 1, 3, 4, 5, 6]], repulsion(left))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    width=st.sampled_from((1, 2, 3, 5, 31)),
    spread=st.sampled_from((0.0, 1e-6, 0.1, 1.0)),
    length=st.sampled_from((0.0, 1e-3, 1.0, 1e3)),
    min_distance=st.sampled_from((1e-3, 0.1, 1.0, 7.0)),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)
def test_no_two_centers_are_nearer_than_asked_whatever_they_were(seed, width, spread, length, min_distance, dtype):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(H, M, width, generator=generator, dtype=dtype)
    centers = length * F.normalize(torch.ones(width, dtype=dtype), dim=0) + spread * noise
    before = centers.clone()
    apart = keep_apart(centers, min_distance)
    assert torch.equal(centers, before)
    assert nearest_gaps(apart).min() >= min_distance
    assert keep_apart(apart, min_distance) is apart
    assert torch.equal(keep_apart(centers, min_distance), apart)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0])
def test_centers_stay_on_their_sphere_where_it_has_room(spread):
    noise = torch.randn(H, 17, P, generator=torch.Generator().manual_seed(0))
    centers = F.rms_norm(1 + spread * noise, (P,))
    apart = keep_apart(centers, 0.5)
    assert nearest_gaps(apart).min() >= 0.5
    torch.testing.assert_close(torch.linalg.vector_norm(apart, dim=-1), torch.full((H, 17), P**0.5))


def test_only_those_move_that_are_too_near_and_no_farther_than_they_must():
    centers = random_splats(dtype=torch.float32).centers
    centers[0, 4] = centers[0, 1] + 0.01
    apart = keep_apart(centers, 0.3)
    near = (distances(centers) < 0.3).triu(1).any(1)
    assert near[0, 4]
    assert torch.equal(apart[~near], centers[~near])
    assert nearest_gaps(apart)[0, 4] == pytest.approx(0.3, rel=1e-4)


def test_length_is_kept_but_for_what_lies_at_the_origin():
    moved = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]])
    before = torch.tensor([[0.0, 10.0], [0.0, 0.0], [1.0, 0.0]])
    assert torch.equal(keep_length(moved, before), torch.tensor([[6.0, 8.0], [3.0, 4.0], [0.0, 0.0]]))
