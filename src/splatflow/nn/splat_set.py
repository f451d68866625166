"""The splats of a layer: their parameters, where they start, and what they hold before the first token."""

# B batch, H head, M splat, K point of half a lattice, P position width, D value width

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from splatflow.ops import ROUTINGS, Lattice, Splats, SplatState
from splatflow.ops.splats import inner_dtype
from splatflow.ops.validate import check_top_p
from splatflow.requirements import require_integers, require_one_of

# The mass that a splat starts with. Small, so that the first token sent to a splat is heard at nearly full strength.
PRIOR_LOG_MASS = -6.0


class SplatSet(nn.Module):
    """M Gaussians of each of H heads in a space of width P, and a learned prior of what they hold, D numbers each.

    For the routing "lattice" they are all pairs of K = sqrt(M) points of each half of the space. Who makes a set calls
    `reset_splats` when its other parts are made.

    Raises:
        ValueError: a size below 1, an unknown routing, or numbers that do not go with it.

    Example:
        >>> splats = SplatSet(num_heads=2, num_splats=49, position_dim=6, value_dim=5, routing="lattice", top_p=4)
        >>> list(splats.centers.shape), list(splats.initial_state(3).total.shape)
        ([2, 2, 7, 3], [3, 2, 49, 5])
    """

    def __init__(
        self,
        num_heads: int,
        num_splats: int,
        position_dim: int,
        value_dim: int,
        *,
        routing: str = "mixture",
        top_p: int | None = None,
    ) -> None:
        super().__init__()
        require_routing(routing, num_splats, position_dim, top_p)
        self.num_sets, self.num_splats, self.position_dim = num_heads, num_splats, position_dim
        self.value_dim = value_dim
        self.routing, self.top_p = routing, top_p
        self.num_biases = num_splats  # numbers that a bias of the log-affinities has for each head of a token
        shape, width = [num_heads, num_splats], position_dim
        if routing == "lattice":
            points = math.isqrt(num_splats)
            shape, width, self.num_biases = [num_heads, 2, points], position_dim // 2, 2 * points
        self.centers = nn.Parameter(torch.empty(*shape, width))
        self.log_scales = nn.Parameter(torch.empty(shape))
        self.log_amplitudes = nn.Parameter(torch.empty(shape))
        self.log_reaches = nn.Parameter(torch.empty(shape)) if routing == "compact" else None
        self.prior_log_mass = nn.Parameter(torch.empty(num_heads, num_splats))
        self.prior_content = nn.Parameter(torch.empty(num_heads, num_splats, value_dim))

    @torch.no_grad()
    def reset_splats(self) -> None:
        """Initial values: centers on the sphere of the positions, |c|^2 = P, and sigma^2 = sqrt(P) / 2."""
        self.centers.copy_(F.rms_norm(torch.randn_like(self.centers), self.centers.shape[-1:]))
        self.log_scales.fill_(0.5 * math.log(math.sqrt(self.position_dim) / 2))
        self.log_amplitudes.zero_()
        if self.log_reaches is not None:  # tau^2 = 2 P: half of the sphere
            self.log_reaches.fill_(0.5 * math.log(2 * self.position_dim))
        self.prior_log_mass.fill_(PRIOR_LOG_MASS)
        self.prior_content.zero_()

    @property
    def splats(self) -> Splats | Lattice:
        if self.routing == "lattice":
            return Lattice(self.centers, self.log_scales, self.log_amplitudes)
        return Splats(self.centers, self.log_scales, self.log_amplitudes, self.log_reaches)

    def free_splats(self) -> Splats:
        """The splats, if each lies where it will.

        Raises:
            ValueError: they form a lattice.
        """
        if isinstance(splats := self.splats, Lattice):
            raise ValueError("routing is 'lattice', expected splats that lie free: those of a lattice move in rows")
        return splats

    def initial_state(self, batch: int) -> SplatState:
        """The learned prior: what the splats hold before the first token."""
        dtype = inner_dtype(self.prior_content.dtype)
        mass = self.prior_log_mass.to(dtype).exp()
        total = mass[..., None] * self.prior_content.to(dtype)
        return SplatState(mass.expand(batch, *mass.shape), total.expand(batch, *total.shape))


def require_routing(
    routing: str, num_splats: int, position_dim: int, top_p: int | None, name_of_top_p: str = "top_p"
) -> None:
    """Raises ValueError or TypeError unless a set of splats can be routed so."""
    require_one_of(ROUTINGS, routing=routing)
    require_integers(1, num_splats=num_splats, position_dim=position_dim)
    if routing == "lattice":
        if math.isqrt(num_splats) ** 2 != num_splats:
            raise ValueError(f"num_splats is {num_splats}, expected a square for routing 'lattice'")
        if position_dim % 2:
            raise ValueError(f"position_dim is {position_dim}, expected an even width for routing 'lattice'")
    check_top_p(top_p, routing, num_splats, name_of_top_p)
