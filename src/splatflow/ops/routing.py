"""From positions to weights: how much a token sends to each splat, and how much it receives from it.

    l(p, m) = log alpha_m - |p - c_m|^2 / (2 sigma_m^2)

A new routing is one function of the log-affinity and one row of `ROUTINGS`.
"""

# B batch, T token, H head, M splat, P position width

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from .splats import Splats, inner_dtype

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# The farthest a token can be, as a log-affinity. Finite, so that a softmax over splats that are all out of reach is
# uniform instead of NaN.
FARTHEST = -1e30


def log_affinity(positions: Float[Tensor, "B T H P"], splats: Splats) -> Float[Tensor, "B T H M"]:
    """Logarithm of each splat's Gaussian at each position: log alpha_m - |p - c_m|^2 / (2 sigma_m^2).

    Computed in fp32 or wider by the expanded square, so nothing of size T x M x P exists. The square cannot turn
    negative by rounding. Scales from 1e-8 to 1e8 are safe in fp32; far outside of that a square may overflow to NaN.

    Example:
        >>> splats = Splats(torch.zeros(1, 1, 2), torch.zeros(1, 1), torch.zeros(1, 1))
        >>> log_affinity(torch.tensor([3.0, 4.0]).view(1, 1, 1, 2), splats).item()
        -12.5
    """
    dtype = inner_dtype(positions.dtype)
    positions = positions.to(dtype)
    centers, log_scales, log_amplitudes = (parameter.to(dtype) for parameter in splats)
    precision = torch.exp(-2.0 * log_scales)  # [H, M], 1 / sigma^2
    # H stands first in the product: one matrix product a head, with the centers as its right side
    cross = torch.einsum("BTHP,HMP->BTHM", positions, centers * precision[..., None])
    squared_norm = torch.linalg.vector_norm(positions, dim=-1, keepdim=True).square()  # [B, T, H, 1]
    half_center = 0.5 * precision * centers.square().sum(-1)  # [H, M]
    nearness = (cross - 0.5 * precision * squared_norm - half_center).clamp_min(FARTHEST)
    # a token on its splat may seem nearer than near by rounding; that is taken off, but not from the gradient
    return log_amplitudes + (nearness - nearness.detach().clamp_min(0.0))


class Routing(NamedTuple):
    """One way to use the log-affinities.

    `weights` makes send and receive weights of them. `running_mean` says what a splat holds: the mean of what was sent
    to it (True), or the plain sum (False).
    """

    weights: Callable[[Float[Tensor, "B T H M"]], Float[Tensor, "B T H M"]]
    running_mean: bool


def posterior(log_affinities: Float[Tensor, "B T H M"]) -> Float[Tensor, "B T H M"]:
    """The share of each splat in a token: the posterior of a Gaussian mixture (the E step of EM)."""
    return log_affinities.softmax(-1)


ROUTINGS: dict[str, Routing] = {
    # the default: shares that sum to 1, and the running mean of what was sent
    "mixture": Routing(posterior, running_mean=True),
    # the idea as first written down: raw Gaussians and plain sums, A (A^T V). Underflows to 0 for wide positions
    "gaussian": Routing(torch.exp, running_mean=False),
}


def route(positions: Float[Tensor, "B T H P"], splats: Splats, routing: str) -> Float[Tensor, "B T H M"]:
    """Weights of the named routing at these positions."""
    return ROUTINGS[routing].weights(log_affinity(positions, splats))
