"""Super-splats: by way of them, what one splat holds is heard where others lie."""

# H head, M splat, K super-splat, P position width

from __future__ import annotations

import math
from functools import reduce
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from splatflow.ops import Splats, mixing_of_hop
from splatflow.requirements import require_integers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Float
    from torch import Tensor

STRENGTH_LOGIT = -3.0  # a twentieth: a layer starts nearly as it would without


class SuperSplats(nn.Module):
    """K Gaussians a head over the centers of splats, and how much of what a splat says comes by way of them.

    Example:
        >>> splats = Splats(torch.randn(2, 7, 4), torch.zeros(2, 7), torch.zeros(2, 7))
        >>> mixing = SuperSplats(num_heads=2, num_super_splats=3, position_dim=4)(splats)
        >>> list(mixing.shape), round(mixing.sum().item(), 3)
        ([2, 7, 7], 14.0)
    """

    def __init__(self, num_heads: int, num_super_splats: int, position_dim: int) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.empty(num_heads, num_super_splats, position_dim))
        self.log_scales = nn.Parameter(torch.empty(num_heads, num_super_splats))
        self.log_amplitudes = nn.Parameter(torch.empty(num_heads, num_super_splats))
        self.strength_logit = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """They start as splats do: on the sphere of the positions, with sigma^2 = sqrt(P) / 2."""
        self.centers.copy_(F.rms_norm(torch.randn_like(self.centers), self.centers.shape[-1:]))
        self.log_scales.fill_(0.5 * math.log(math.sqrt(self.centers.shape[-1]) / 2))
        self.log_amplitudes.zero_()
        self.strength_logit.fill_(STRENGTH_LOGIT)

    def forward(self, splats: Splats) -> Float[Tensor, "H M M"]:
        """What each splat hands on of every splat."""
        super_splats = Splats(self.centers, self.log_scales, self.log_amplitudes)
        return mixing_of_hop(splats, super_splats, self.strength_logit.sigmoid())


def mixing_of(hops: Iterable[nn.Module], splats: Splats) -> Float[Tensor, "H M M"]:
    """All hops, one after another."""
    return reduce(lambda earlier, later: later @ earlier, (hop(splats) for hop in hops))


def require_hops(hops: int, num_super_splats: int | None, routing: str, num_splats: int) -> int:
    """How many super-splats each hop has: those asked for, or the root of `num_splats`.

    Raises:
        ValueError, TypeError: hops that there cannot be, or super-splats without a hop.
    """
    require_integers(0, hops=hops)
    if hops and routing == "lattice":
        raise ValueError(
            f"hops is {hops}, expected 0 for routing 'lattice', whose splats are too many to meet each other"
        )
    if num_super_splats is None:
        return math.isqrt(num_splats - 1) + 1
    require_integers(1, num_super_splats=num_super_splats)
    if not hops:
        raise ValueError(
            f"num_super_splats is {num_super_splats} with hops=0, expected None: nothing goes by way of them"
        )
    return num_super_splats
