"""Log-affinities in a lattice, whose Gaussians are products of those of the two halves of the space."""

# B batch, T token, H head, K point of half a lattice, P position width, R = 2 K, N chosen splat, X = P / 2 + 2

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .splats import Lattice, inner_dtype

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def lattice_factors(lattice: Lattice, dtype: torch.dtype) -> Float[Tensor, "H 2 K X"]:
    """(c / sigma^2, -1 / (2 sigma^2), log alpha - |c|^2 / (2 sigma^2)): its product with (p, |p|^2, 1) is l(p, m)."""
    centers, log_scales, log_amplitudes = (part.to(dtype) for part in lattice)
    precision = torch.exp(-2.0 * log_scales)[..., None]  # [H, 2, K, 1]
    constant = log_amplitudes[..., None] - 0.5 * precision * centers.square().sum(-1, keepdim=True)
    return torch.cat([centers * precision, -0.5 * precision, constant], -1)


def halves_of(positions: Float[Tensor, "B T H P"]) -> Float[Tensor, "B T H 2 X"]:
    """(p, |p|^2, 1) of both halves p of each position."""
    halves = positions.to(inner_dtype(positions.dtype)).unflatten(-1, (2, -1))
    squared_norm = torch.linalg.vector_norm(halves, dim=-1, keepdim=True).square()
    return torch.cat([halves, squared_norm, torch.ones_like(squared_norm)], -1)


def lattice_halves(
    positions: Float[Tensor, "B T H P"], lattice: Lattice, bias: Float[Tensor, "B T H R"] | None
) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T H K"]]:
    """Log-affinities of the halves of each position to the points of the halves of the space, not clamped."""
    halves, factors = halves_of(positions), lattice_factors(lattice, inner_dtype(positions.dtype))
    first, second = (torch.einsum("BTHX,HKX->BTHK", halves[..., half, :], factors[:, half]) for half in (0, 1))
    if bias is None:
        return first, second
    of_first, of_second = bias.to(first.dtype).chunk(2, -1)
    return first + of_first, second + of_second


def affinity_of_pairs(
    positions: Float[Tensor, "B T H P"],
    lattice: Lattice,
    bias: Float[Tensor, "B T H R"] | None,
    in_first: Int[Tensor, "B T H N"],
    in_second: Int[Tensor, "B T H N"],
) -> Float[Tensor, "B T H N"]:
    """Log-affinities to a few splats, by their points in both halves, not clamped.

    The same as those that `lattice_halves` has of all points, but their gradient is no product with all points.
    """
    num_points = lattice.centers.shape[2]
    points = torch.stack([in_first, in_second + num_points], -1)  # [B, T, H, N, 2]
    heads = torch.arange(points.shape[2], device=points.device)[:, None, None] * (2 * num_points)
    factors = lattice_factors(lattice, inner_dtype(positions.dtype)).flatten(0, 2)
    chosen = factors.index_select(0, (heads + points).flatten()).view(*points.shape, factors.shape[-1])
    affinities = (chosen * halves_of(positions)[..., None, :, :]).sum((-2, -1))
    if bias is None:
        return affinities
    return affinities + bias.to(affinities.dtype).gather(-1, points.flatten(-2)).view_as(points).sum(-1)
