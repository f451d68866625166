"""Log-affinities: how close a position is to a splat, as the logarithm of the splat's Gaussian there.

l(p, m) = log alpha_m - |p - c_m|^2 / (2 sigma_m^2)
"""

# B batch, T token, H head, M splat, P position width

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from .gradients import with_gradient
from .splats import Splats, inner_dtype

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

# The farthest a token can be, as a log-affinity. Finite, so that a softmax over splats that are all out of reach is
# uniform instead of NaN.
FARTHEST = -1e30


def scores(positions: Float[Tensor, "B T H P"], splats: Splats) -> Float[Tensor, "B T H M"]:
    """`log_affinity` but for rounding, which may put a token on its splat nearer than near: for a softmax.

    Computed in fp32 or wider by the expanded square, so nothing of size T x M x P exists. Scales from 1e-8 to 1e8 are
    safe in fp32; far outside of that a square may overflow to NaN.
    """
    dtype = inner_dtype(positions.dtype)
    return _expanded(positions.to(dtype), splats, splats.log_amplitudes.to(dtype)).clamp_min(FARTHEST)


def nearness(positions: Float[Tensor, "B T H P"], splats: Splats) -> Float[Tensor, "B T H M"]:
    """-|p - c_m|^2 / (2 sigma_m^2), the exponent of each splat's Gaussian at each position; never above 0."""
    dtype = inner_dtype(positions.dtype)
    near = _expanded(positions.to(dtype), splats, torch.zeros_like(splats.log_scales, dtype=dtype)).clamp_min(FARTHEST)
    # what rounding has put above 0 is taken off, but not from the gradient
    return near - near.detach().clamp_min(0.0)


def _expanded(
    positions: Float[Tensor, "B T H P"], splats: Splats, constant: Float[Tensor, "H M"]
) -> Float[Tensor, "B T H M"]:
    """constant - |p|^2 / (2 sigma^2) + <p, c> / sigma^2 - |c|^2 / (2 sigma^2): one pass and one product a head."""
    batch, num_tokens = positions.shape[:2]
    positions, centers = positions.flatten(0, 1).transpose(0, 1), splats.centers.to(positions.dtype)
    precision = torch.exp(-2.0 * splats.log_scales.to(positions.dtype))  # [H, M]
    constant = constant - 0.5 * precision * centers.square().sum(-1)
    squares = _squares(positions, centers * precision[..., None], precision, constant)
    return squares.unflatten(1, (batch, num_tokens)).movedim(0, 2)


def _square(
    positions: Float[Tensor, "H N P"],
    scaled: Float[Tensor, "H M P"],
    precision: Float[Tensor, "H M"],
    constant: Float[Tensor, "H M"],
) -> Float[Tensor, "H N M"]:
    """constant - |p|^2 precision / 2 + <p, scaled>."""
    without = torch.addcmul(constant[:, None], _squared_norm(positions), -0.5 * precision[:, None])
    return without.baddbmm_(positions, scaled.mT)


def _square_gradient(
    d_square: Float[Tensor, "H N M"],
    positions: Float[Tensor, "H N P"],
    scaled: Float[Tensor, "H M P"],
    precision: Float[Tensor, "H M"],
    constant: Float[Tensor, "H M"],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weighed = (d_square * precision[:, None]).sum(-1, keepdim=True)
    d_positions = (d_square @ scaled).addcmul_(positions, weighed, value=-1.0)
    d_precision = -0.5 * (d_square * _squared_norm(positions)).sum(1)  # a product with one column is slower
    return d_positions, d_square.mT @ positions, d_precision, d_square.sum(1)


def _squared_norm(positions: Float[Tensor, "H N P"]) -> Float[Tensor, "H N 1"]:
    return torch.linalg.vector_norm(positions, dim=-1, keepdim=True).square()


_squares = with_gradient(_square, _square_gradient)


def log_affinity(positions: Float[Tensor, "B T H P"], splats: Splats) -> Float[Tensor, "B T H M"]:
    """Logarithm of each splat's Gaussian at each position: log alpha_m - |p - c_m|^2 / (2 sigma_m^2).

    Example:
        >>> splats = Splats(torch.zeros(1, 1, 2), torch.zeros(1, 1), torch.zeros(1, 1))
        >>> log_affinity(torch.tensor([3.0, 4.0]).view(1, 1, 1, 2), splats).item()
        -12.5
    """
    return splats.log_amplitudes.to(inner_dtype(positions.dtype)) + nearness(positions, splats)


def compact_affinity(positions: Float[Tensor, "B T H P"], splats: Splats) -> Float[Tensor, "B T H M"]:
    """Gaussians that end: log alpha_m - |p - c_m|^2 / (2 sigma_m^2) + log max(0, 1 - |p - c_m|^2 / tau_m^2).

    A token out of reach of every splat goes to the nearest one, as if it were the only one; those of amplitude 0 do not
    count. The kernel falls to 0 without a jump, so that the reach tau has a gradient.

    Example:
        >>> zero, one = torch.zeros(1, 2), torch.tensor([[0.0, 3.0]])
        >>> splats = Splats(one[..., None], zero, zero, zero)  # at 0 and 3, both of reach 1
        >>> compact_affinity(torch.tensor([0.5, 2.0, 5.0]).view(1, 3, 1, 1), splats).softmax(-1)[0, :, 0].tolist()
        [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    """
    near = nearness(positions, splats)
    kernels = kernels_of(splats, near.dtype)
    affinities, out = ending(near, kernels)
    distance = squared_distance(near, kernels)
    nearest = torch.zeros_like(out, dtype=torch.bool).scatter(-1, distance.argmin(-1, keepdim=True), True)
    return torch.where(out.amax(-1, keepdim=True) < 0, alone(nearest, affinities), affinities)


class Kernels(NamedTuple):
    """All of Gaussians that end but where they lie."""

    log_scales: Float[Tensor, "*heads M"]
    log_amplitudes: Float[Tensor, "*heads M"]
    log_reaches: Float[Tensor, "*heads M"]

    def asleep(self) -> Bool[Tensor, "*heads M"]:
        return self.log_amplitudes <= 0.5 * FARTHEST


def kernels_of(splats: Splats, dtype: torch.dtype) -> Kernels:
    """Their kernels, in the type that affinities are computed in."""
    assert splats.log_reaches is not None, "the border has checked it"
    return Kernels(*(part.to(dtype) for part in (splats.log_scales, splats.log_amplitudes, splats.log_reaches)))


def ending(
    near: Float[Tensor, "*tokens M"], kernels: Kernels
) -> tuple[Float[Tensor, "*tokens M"], Float[Tensor, "*tokens M"]]:
    """Log-affinities to Gaussians that end, of `nearness`, and what tells who is out of reach: `FARTHEST`, or else 0.

    A sleeping splat reaches nobody. Not a number stays what it is. Made of thresholds and sums, which on a CPU take a
    tenth of the time of masks.
    """
    share = 2.0 * torch.exp(2.0 * (kernels.log_scales - kernels.log_reaches)) * near  # -|p - c|^2 / tau^2
    kernel = torch.log1p(F.threshold(share, -1.0, 0.0))
    out = (F.threshold(share.detach(), -1.0, FARTHEST) + 1.0).clamp_max(0.0) + FARTHEST * kernels.asleep()
    return (kernels.log_amplitudes + near + kernel + out).clamp_min(FARTHEST), out


def squared_distance(near: Float[Tensor, "*tokens M"], kernels: Kernels) -> Float[Tensor, "*tokens M"]:
    """|p - c_m|^2, of `nearness`, without a gradient. A sleeping splat is infinitely far."""
    distance = -2.0 * near.detach() * torch.exp(2.0 * kernels.log_scales.detach())
    return distance.masked_fill(kernels.asleep(), torch.inf)


def alone(nearest: Bool[Tensor, "*tokens M"], affinities: Float[Tensor, "*tokens M"]) -> Float[Tensor, "*tokens M"]:
    """Log-affinities, of such a type, of tokens for which there is one splat only."""
    return torch.where(nearest, 0.0, FARTHEST).to(affinities.dtype)
