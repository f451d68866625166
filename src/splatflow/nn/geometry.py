"""Where splats lie to one another: how much they overlap, what drives them apart, what keeps them apart.

Pure functions. `splatflow.nn.strategy` calls them between the steps of a training run.
"""

# H head, M splat, P position width, N splat that has its place, K place that may be taken

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from splatflow.ops import Splats

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

# The log-amplitude of a splat that sleeps. exp of it is 0 in fp32 beside any splat whose scale is safe (1e-8 or more),
# and so are its share and all its gradients. Neighbouring fp32 numbers lie 7.6e22 apart here, so no optimizer's step
# moves it; weight decay of 1e-4 a step would take 345,000 steps to bring it to ASLEEP.
DORMANT = -1e30
ASLEEP = -1e15  # all log-amplitudes below it sleep

ROUNDING = 1e-14  # of a distance in fp64, in parts of the largest length
DIRECTIONS = 8  # great circles that are searched for a free place before a center leaves its sphere


def is_awake(splats: Splats) -> Bool[Tensor, "H M"]:
    """Which splats are in use."""
    return splats.log_amplitudes > ASLEEP


def distances(centers: Float[Tensor, "H M P"]) -> Float[Tensor, "H M M"]:
    """Between all centers of a head; by differences, for the expanded square is blind to small ones."""
    return torch.cdist(centers, centers, compute_mode="donot_use_mm_for_euclid_dist")


def overlap(splats: Splats) -> Float[Tensor, "H M M"]:
    """The Bhattacharyya coefficient of all pairs of a head: the integral of sqrt(p q), p and q as densities.

        (2 sigma_a sigma_b / (sigma_a^2 + sigma_b^2))^(P/2) exp(-|c_a - c_b|^2 / (4 (sigma_a^2 + sigma_b^2)))

    It is 1 for a splat with itself and falls to 0; amplitudes do not matter.

    >>> splats = Splats(torch.tensor([[[0.0], [2.0]]]), torch.zeros(1, 2), torch.zeros(1, 2))
    >>> round(overlap(splats)[0, 0, 1].item(), 4)  # exp(-4 / 8)
    0.6065
    """
    log_scales = splats.log_scales
    width = splats.centers.shape[-1]
    difference = log_scales[:, :, None] - log_scales[:, None]  # [H, M, M]
    total = (2 * log_scales).exp()[:, :, None] + (2 * log_scales).exp()[:, None]  # sigma_a^2 + sigma_b^2
    # 2 ab / (a^2 + b^2) = 1 / cosh(log a - log b)
    log_ratio = -0.5 * width * difference.cosh().log()
    return (log_ratio - distances(splats.centers).square() / (4 * total)).exp()


def overlap_loss(splats: Splats) -> Float[Tensor, ""]:
    """The mean overlap of the pairs of a head that are awake, over all heads: 0 far apart, 1 if all are one.

    Its gradient is 0 between centers that are exactly equal.
    """
    awake = is_awake(splats)
    pairs = (awake[:, :, None] & awake[:, None]).triu(1)  # [H, M, M]
    return (overlap(splats) * pairs).sum() / pairs.sum().clamp_min(1)


@torch.no_grad()
def repulsion(splats: Splats) -> Float[Tensor, "H M P"]:
    """Where each center is driven by the other splats of its head: the mean of the directions away from them.

        f_a = 1 / (M - 1) sum_b overlap(a, b) (c_a - c_b) / |c_a - c_b|

    Its length is at most 1. It is strongest between the nearest, where the gradient of the overlap vanishes, and 0
    between centers that are exactly equal, and for splats that sleep.
    """
    awake = is_awake(splats)
    centers = splats.centers - splats.centers.mean(1, keepdim=True)  # small numbers where all are near one another
    gaps = distances(centers)
    pairs = awake[:, :, None] & awake[:, None] & (gaps > 0)
    pull = torch.where(pairs, overlap(splats) / gaps, 0.0)  # [H, M, M]
    force = pull.sum(-1, keepdim=True) * centers - pull @ centers
    return force / (awake.sum(-1) - 1).clamp_min(1)[:, None, None]


def keep_length(moved: Float[Tensor, "*rows P"], before: Float[Tensor, "*rows P"]) -> Float[Tensor, "*rows P"]:
    """`moved`, as far from the origin as `before`: what lay on a sphere stays there. The origin binds nothing."""
    length, wanted = (torch.linalg.vector_norm(part, dim=-1, keepdim=True) for part in (moved, before))
    return torch.where((length > 0) & (wanted > 0), moved * (wanted / length), moved)


@torch.no_grad()
def keep_apart(centers: Float[Tensor, "H M P"], min_distance: float) -> Float[Tensor, "H M P"]:
    """The centers, with those moved that were nearer than `min_distance` to an earlier one of their head.

    One pass over the centers, each to the nearest free place on its way. The way is a great circle about the origin,
    away from the nearest earlier center, so what lay on a sphere stays there. Where up to eight such circles have no
    free place it is a straight line, which always has one. Equal centers part in directions drawn from their index, the
    same in every run. Centers that are far enough from all others keep every bit.

    >>> keep_apart(torch.tensor([[[0.0], [0.0], [5.0]]]), 1.0).diff(dim=1).abs().min().item() >= 1.0
    True
    """
    crowded = (distances(centers) < min_distance).triu(1).flatten(1).any(-1)  # [H]
    if not crowded.any():
        return centers
    # a little more than is asked for, so that rounding to the centers' type takes nothing from it
    length = torch.linalg.vector_norm(centers, dim=-1).max().item()
    room = min_distance + (4 * torch.finfo(centers.dtype).eps + 2 * ROUNDING) * max(length, min_distance)
    places = centers.to("cpu", torch.float64, copy=True)  # many small operations
    for index in crowded.nonzero().flatten().tolist():
        head = places[index]
        for splat in range(1, len(head)):
            if torch.linalg.vector_norm(head[:splat] - head[splat], dim=-1).min() < min_distance:
                head[splat] = _free_place(head[splat], head[:splat], room, seed=splat)
    return places.to(centers)


def _free_place(center: Float[Tensor, "P"], taken: Float[Tensor, "N P"], room: float, seed: int) -> Float[Tensor, "P"]:
    """The nearest place on the first way that has one, `room` or farther from all that are taken."""
    away = center - taken[torch.linalg.vector_norm(taken - center, dim=-1).argmin()]
    rounding = ROUNDING * max(torch.linalg.vector_norm(taken, dim=-1).max().item(), room)
    for way in _ways(center, away, taken, room, seed):
        gaps = torch.linalg.vector_norm(way[:, None] - taken, dim=-1).amin(1)  # [K]
        free = way[gaps >= room - rounding]
        if len(free):
            return free[torch.linalg.vector_norm(free - center, dim=-1).argmin()]
    raise AssertionError("a straight line leaves every ball")


def _ways(
    center: Float[Tensor, "P"], away: Float[Tensor, "P"], taken: Float[Tensor, "N P"], room: float, seed: int
) -> Iterator[Float[Tensor, "K P"]]:
    """For each way from a center: where it leaves or enters the balls of radius `room` around the taken places."""
    generator = torch.Generator().manual_seed(seed)
    width, length = len(center), torch.linalg.vector_norm(center)
    directions = [away, *torch.randn(DIRECTIONS - 1, width, generator=generator, dtype=center.dtype)]
    directions = [direction for direction in directions if torch.linalg.vector_norm(direction) > 0]
    if length > 0:
        outwards = center / length
        for direction in directions:
            tangent = direction - (direction @ outwards) * outwards
            size = torch.linalg.vector_norm(tangent)
            if size > 1e-9 * torch.linalg.vector_norm(direction):
                yield _circle(length, outwards, tangent / size, taken, room)
    yield _line(center, directions[0] / torch.linalg.vector_norm(directions[0]), taken, room)


def _circle(
    length: Float[Tensor, ""], outwards: Float[Tensor, "P"], tangent: Float[Tensor, "P"], taken: Tensor, room: float
) -> Float[Tensor, "K P"]:
    """Where |length (cos t outwards + sin t tangent) - taken| = room: the cosine of t less a phase is known."""
    along, across = taken @ outwards, taken @ tangent
    reach = torch.hypot(along, across)
    cosine = (length.square() + taken.square().sum(-1) - room**2) / (2 * length) / reach
    crossed = cosine.abs() <= 1  # else no point of the circle is at that distance
    phase, half = torch.atan2(across, along)[crossed], cosine[crossed].acos()
    angles = torch.cat([phase - half, phase + half])
    return length * (angles.cos()[:, None] * outwards + angles.sin()[:, None] * tangent)


def _line(center: Float[Tensor, "P"], direction: Float[Tensor, "P"], taken: Tensor, room: float) -> Tensor:
    """Where |center + t direction - taken| = room: a quadratic equation in t."""
    gaps = center - taken
    middle = -gaps @ direction
    square = middle.square() - gaps.square().sum(-1) + room**2
    root = square[square >= 0].sqrt()
    times = torch.cat([middle[square >= 0] - root, middle[square >= 0] + root])
    return center + times[:, None] * direction
