"""From positions to weights: how much a token sends to each splat, and how much it receives from it.

    l(p, m) = log alpha_m - |p - c_m|^2 / (2 sigma_m^2)

A new routing is a function or two of this and one row of `ROUTINGS`.
"""

# B batch, T target token, S source token, H head, M splat, K point of half a lattice, P position width,
# R a bias: M or 2 K, N chosen splat

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from . import kernels
from .affinity import FARTHEST, compact_affinity, log_affinity, scores
from .lattice import affinity_of_pairs, lattice_halves
from .search import best, best_pairs, groups_of
from .splats import Lattice, Sources, Splats, Targets, each, inner_dtype
from .transform import Transform

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

GROUPS_SEARCHED = 4  # of about sqrt(M)
SCORED_AT_ONCE = 2**20  # log-affinities, of which few are kept, so that they stay in the cache
SEARCHED_AT_ONCE = 2**22  # numbers of candidates' centers, the same


def all_of_free(affinity: Callable[..., Tensor]) -> Callable[..., Float[Tensor, "B T H M"]]:
    """Log-affinities to all splats that lie anywhere, the bias added."""

    def everywhere(positions: Tensor, splats: Splats, bias: Tensor | None) -> Tensor:
        affinities = affinity(positions, splats)
        return affinities if bias is None else affinities + bias.to(affinities.dtype)

    return everywhere


def all_of_lattice(
    positions: Float[Tensor, "B T H P"], lattice: Lattice, bias: Float[Tensor, "B T H R"] | None
) -> Float[Tensor, "B T H M"]:
    """Log-affinities to all K x K splats: for few of them."""
    first, second = lattice_halves(positions, lattice, bias)
    return (first[..., :, None] + second[..., None, :]).flatten(-2).clamp_min(FARTHEST)


class Chosen(NamedTuple):
    """The splats that a token is nearest to, and what is said of each: a log-affinity or a weight."""

    at: Int[Tensor, "B T H N"]
    of: Float[Tensor, "B T H N"]


def nearest_of_all(
    positions: Float[Tensor, "B T H P"], splats: Splats, bias: Float[Tensor, "B T H M"] | None, top_p: int
) -> Chosen:
    """The exact search: every splat is looked at. Of equals the one of the lower number comes first."""
    with torch.no_grad():
        index = best(all_of_free(log_affinity)(positions, splats, bias), top_p)
    return Chosen(index, affinity_at(positions, splats, bias, index))


def nearest_of_groups(
    positions: Float[Tensor, "B T H P"], splats: Splats, bias: Float[Tensor, "B T H M"] | None, top_p: int
) -> Chosen:
    """The search in two levels: the nearest groups of splats, then their members. It may miss some of the best.

    Splats are sorted into about sqrt(M) groups that lie together, and the members of the `GROUPS_SEARCHED` nearest are
    looked at. `missed_share` says what that costs.
    """
    with torch.no_grad():
        members, means = groups_of(splats.centers)
        heads = torch.arange(members.shape[0], device=members.device)[:, None]
        size = max(1, SEARCHED_AT_ONCE // max(1, positions[:, :1].numel() * GROUPS_SEARCHED * members.shape[-1]))
        of_groups = Splats(means, *(means.new_zeros(means.shape[:2]),) * 2)
        found = []
        for start in range(0, max(1, positions.shape[1]), size):
            here = slice(start, start + size)
            groups = best(log_affinity(positions[:, here], of_groups), GROUPS_SEARCHED)
            candidates = members[heads, groups].flatten(-2)
            part = None if bias is None else bias[:, here]
            places = best(affinity_at(positions[:, here], splats, part, candidates), top_p)
            found.append(candidates.gather(-1, places))
        index = torch.cat(found, 1)
    return Chosen(index, affinity_at(positions, splats, bias, index))


def nearest_of_lattice(
    positions: Float[Tensor, "B T H P"], lattice: Lattice, bias: Float[Tensor, "B T H R"] | None, top_p: int
) -> Chosen:
    """The exact search among K x K splats, from 2 K distances: a Gaussian factorises over the halves of the space."""
    with torch.no_grad():
        if (by_kernel := kernels.search_for(positions, lattice, top_p)) is not None:
            in_first, in_second = by_kernel(positions, lattice, bias, top_p)
        else:
            in_first, in_second = best_pairs(*lattice_halves(positions, lattice, bias), top_p)
    affinities = affinity_of_pairs(positions, lattice, bias, in_first, in_second)
    return Chosen(in_first * lattice.centers.shape[2] + in_second, affinities.clamp_min(FARTHEST))


def affinity_at(
    positions: Float[Tensor, "B T H P"],
    splats: Splats,
    bias: Float[Tensor, "B T H M"] | None,
    index: Int[Tensor, "B T H N"],
) -> Float[Tensor, "B T H N"]:
    """Log-affinities to the splats that `index` names, the bias added: N of M, so N x P numbers a token."""
    heads = torch.arange(index.shape[2], device=index.device)[:, None]
    dtype = inner_dtype(positions.dtype)
    centers, log_scales, log_amplitudes = (part.to(dtype)[heads, index] for part in splats[:3])
    distance = (positions.to(dtype)[..., None, :] - centers).square().sum(-1)
    affinities = log_amplitudes - (0.5 * distance * torch.exp(-2.0 * log_scales)).clamp_max(-FARTHEST)
    return affinities if bias is None else affinities + bias.to(dtype).gather(-1, index)


def posterior(log_affinities: Float[Tensor, "B T H N"]) -> Float[Tensor, "B T H N"]:
    """The share of each splat in a token: the posterior of a Gaussian mixture (the E step of EM)."""
    return log_affinities.movedim(2, 0).softmax(-1).movedim(0, 2)  # as they lie in memory, heads first


class Routing(NamedTuple):
    """One way to make weights of positions.

    `affinity(positions, splats, bias)` gives the log-affinities to all splats, `nearest(positions, splats, bias,
    top_p)` the best of them (None: there is no top_p); `weights` makes send and receive weights of either.
    `running_mean` says what a splat holds: the mean of what was sent to it (True), or the plain sum (False). `kind` is
    the type of its splats, and `ends` whether they have a reach.
    """

    affinity: Callable[..., Float[Tensor, "B T H M"]]
    weights: Callable[[Float[Tensor, "B T H N"]], Float[Tensor, "B T H N"]]
    running_mean: bool
    nearest: Callable[..., Chosen] | None = None
    kind: type[Splats] | type[Lattice] = Splats
    ends: bool = False


ROUTINGS: dict[str, Routing] = {
    # the default: shares that sum to 1, and the running mean of what was sent
    "mixture": Routing(all_of_free(scores), posterior, running_mean=True, nearest=nearest_of_all),
    # the idea as first written down: raw Gaussians and plain sums, A (A^T V). Underflows to 0 for wide positions
    "gaussian": Routing(all_of_free(log_affinity), torch.exp, running_mean=False, nearest=nearest_of_all),
    # Gaussians that end at a learned distance
    "compact": Routing(all_of_free(compact_affinity), posterior, running_mean=True, ends=True),
    # all pairs of two small sets of points: very many splats, of which the nearest are found exactly
    "lattice": Routing(all_of_lattice, posterior, running_mean=True, nearest=nearest_of_lattice, kind=Lattice),
    # many splats that lie anywhere, of which near ones are found by way of groups
    "grouped": Routing(all_of_free(scores), posterior, running_mean=True, nearest=nearest_of_groups),
}


class Router(NamedTuple):
    """A routing with its splats, how many of them a token may touch (None: all), and how splats hear each other.

    Row m of `mixing` says what splat m hands to those that receive from it: so much of its own content, so much of
    each other's. None: its own. `transform` is what a splat makes of its content before that.
    """

    routing: Routing
    splats: Splats | Lattice
    top_p: int | None
    mixing: Float[Tensor, "H M M"] | None = None
    transform: Transform | None = None

    def repeated(self, count: int) -> Router:
        """So many copies of each head."""

        def copy(part: Tensor) -> Tensor:
            return part.repeat_interleave(count, 0)

        mixing = None if self.mixing is None else copy(self.mixing)
        transform = None if self.transform is None else each(copy, self.transform)
        return self._replace(splats=each(copy, self.splats), mixing=mixing, transform=transform)

    def send(self, sources: Sources) -> Float[Tensor, "B S H M"]:
        """How much each token sends to each splat."""
        weights = self.weights(sources.positions, sources.bias)
        return weights if sources.write_gate is None else weights * sources.write_gate

    def receive(self, targets: Targets) -> Float[Tensor, "B T H M"]:
        """How much each token receives of what each splat holds."""
        weights = self.weights(*targets)
        if self.mixing is None:
            return weights
        return torch.einsum("BTHM,HMN->BTHN", weights, self.mixing.to(weights.dtype))

    def weights(
        self, positions: Float[Tensor, "B T H P"], bias: Float[Tensor, "B T H R"] | None = None
    ) -> Float[Tensor, "B T H M"]:
        """A weight for every splat, 0 for those that are not among the nearest."""
        if self.top_p is None:
            return self.routing.weights(self.routing.affinity(positions, self.splats, bias))
        index, weights = self.chosen(positions, bias)
        nothing = weights.new_zeros(*weights.shape[:-1], self.splats.num_splats)
        return nothing.scatter(-1, index, weights)

    def chosen(self, positions: Float[Tensor, "B T H P"], bias: Float[Tensor, "B T H R"] | None = None) -> Chosen:
        """The nearest splats and their weights."""
        assert self.routing.nearest is not None, "the border has checked it"
        assert self.top_p is not None, "the border has checked it"
        if kernels.search_for(positions, self.splats, self.top_p) is not None:
            at_once = positions.shape[1]  # they keep no scores
        else:
            num_scores = positions[:, :1, :, 0].numel() * self.splats.log_scales[0].numel()  # of one token
            at_once = max(1, SCORED_AT_ONCE // max(1, num_scores))
        parts = positions.split(at_once, 1)  # and not slices, whose gradients are each as large as the whole
        biases = [None] * len(parts) if bias is None else bias.split(at_once, 1)
        found = [
            self.routing.nearest(part, self.splats, preferences, self.top_p)
            for part, preferences in zip(parts, biases, strict=True)
        ]
        index, affinities = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return Chosen(index, self.routing.weights(affinities))


def route(
    positions: Float[Tensor, "B T H P"], splats: Splats | Lattice, routing: str, top_p: int | None = None
) -> Float[Tensor, "B T H M"]:
    """Weights of the named routing at these positions."""
    return Router(ROUTINGS[routing], splats, top_p).weights(positions)


def missed_share(
    positions: Float[Tensor, "B T H P"], splats: Splats | Lattice, routing: str, top_p: int
) -> Float[Tensor, "B T H"]:
    """What share of the posterior over all splats lies with those that a top-p routing leaves out.

    Example:
        >>> splats = Splats(torch.zeros(1, 4, 2), torch.zeros(1, 4), torch.zeros(1, 4))  # four alike: a quarter each
        >>> missed_share(torch.zeros(1, 1, 1, 2), splats, "mixture", top_p=3).item()
        0.25
    """
    row = ROUTINGS[routing]
    index, _ = Router(row, splats, top_p).chosen(positions)
    return 1.0 - posterior(row.affinity(positions, splats, None)).gather(-1, index).sum(-1)
