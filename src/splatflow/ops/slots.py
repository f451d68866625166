"""Which splats a chunk of tokens can reach, and the weights of its tokens over those alone.

The splats of a head are split into groups that lie together. A *slot* is a group that a chunk needs: the first slot of
each chunk is the first group that it needs, and so on, and chunks that need fewer than others get some they do not.

All arithmetic is done slot by slot, in arrays whose shapes do not depend on what is skipped, and added up slot by slot
in the order of the groups. What a group gives that a token does not need is exactly 0, and adding 0 changes no bit. So
no bit of a token's weights depends on what the tokens after it need.
"""

# B batch, L token of a block, H head, X chunk of a head of a sequence, C token in a chunk, M splat, G group,
# E splat in a group, K slot, P position width, F = P + 2

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from .affinity import FARTHEST, Kernels, alone, ending, kernels_of, squared_distance
from .routing import Router
from .search import groups_of
from .splats import Sources, Splats, SplatState, Targets, each
from .transform import Transform

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

ROUNDING = 1e-5  # of a squared distance, in units of the squares that it is a difference of
MARGIN = 1e-3  # by which a squared reach is taken too large
NEGLIGIBLE = -78.0  # the logarithm of a share that is taken for 0


class Groups(NamedTuple):
    """The splats of each head in the order of groups that lie together, and which number each of them had."""

    numbers: Int[Tensor, "H G E"]
    centers: Float[Tensor, "H M P"]
    factors: Float[Tensor, "H M P+2"]  # of `with_squares`, for what is `nearness`
    kernels: Kernels
    transform: Transform | None

    @property
    def num_groups(self) -> int:
        return self.numbers.shape[1]

    @property
    def order(self) -> Int[Tensor, "H M"]:
        return self.numbers.flatten(1)


class Slot(NamedTuple):
    """One group for each chunk: its splats, their numbers, and its row among those of all chunks."""

    rows: Int[Tensor, " X"]
    numbers: Int[Tensor, "X 1 E"]
    factors: Float[Tensor, "X E P+2"]
    kernels: Kernels  # [X, 1, E] each
    transform: Transform | None  # [X, E, D] each


def grouped(router: Router, dtype: torch.dtype) -> Groups:
    """The splats of a router, and their transforms, in groups and in the type that affinities are computed in."""
    assert isinstance(router.splats, Splats), "the border has checked it"
    numbers, _ = groups_of(router.splats.centers.detach())
    order = numbers.flatten(1)
    centers = in_order(router.splats.centers.to(dtype), order)
    kernels = each(lambda part: in_order(part, order), kernels_of(router.splats, dtype))
    precision = torch.exp(-2.0 * kernels.log_scales)[..., None]
    half_center = 0.5 * precision * centers.square().sum(-1, keepdim=True)
    factors = torch.cat([precision * centers, -0.5 * precision, -half_center], -1)
    transform = None if router.transform is None else each(lambda part: in_order(part, order), router.transform)
    return Groups(numbers, centers, factors, kernels, transform)


def in_order(part: Float[Tensor, "H M *X"], order: Int[Tensor, "H M"]) -> Float[Tensor, "H M *X"]:
    """The rows of each head in this order."""
    heads = torch.arange(order.shape[0], device=order.device)[:, None] * order.shape[1]
    return part.flatten(0, 1).index_select(0, (heads + order).flatten()).unflatten(0, order.shape)


def reordered(state: SplatState, order: Int[Tensor, "H M"]) -> SplatState:
    """The state with the splats of each head in this order."""
    expanded = order.expand(state.mass.shape)
    return SplatState(state.mass.gather(2, expanded), state.total.gather(2, expanded[..., None].expand_as(state.total)))


@torch.no_grad()
def needed(tokens: Sources | Targets, groups: Groups, length: int) -> Bool[Tensor, "X G"]:
    """Which groups have a splat within reach of a token of a chunk, or the nearest one to a token out of every reach.

    One product and one pass over tokens x splats, where the weights take some twenty passes. A group too many costs
    time and changes no bit.
    """
    here = tokens.positions.to(groups.centers.dtype).transpose(1, 2)  # [B, H, L, P]
    reach_squared = (1.0 + MARGIN) * torch.exp(2.0 * groups.kernels.log_reaches)
    center_squared = groups.centers.square().sum(-1)
    constant = (center_squared - reach_squared).masked_fill(groups.kernels.asleep(), torch.inf)
    # the members of groups first: a minimum over neighbours in memory would take ten times as long
    factors, reach_squared = (
        members_first(part, groups)
        for part in (torch.cat([-2.0 * groups.centers, constant[..., None]], -1), reach_squared)
    )
    # |c|^2 - tau^2 - 2 <p, c>, of which the least in a group is looked for
    excess = factors @ torch.cat([here, torch.ones_like(here[..., :1])], -1).mT  # [B, H, E G, L]
    squared = here.square().sum(-1)[:, :, None]  # [B, H, 1, L]
    rounding = ROUNDING * (squared + center_squared.amax(-1)[:, None, None])
    least = excess.unflatten(2, (-1, groups.num_groups)).amin(2) + squared  # [B, H, G, L]
    need = ~(least > rounding)
    surely = 2.0 * (MARGIN * reach_squared.amax(-1)[:, None, None] + rounding)
    lonely = ~(least.amin(2, keepdim=True) < -surely)
    if lonely.any():
        distance = (excess + reach_squared[..., None]).unflatten(2, (-1, groups.num_groups)).amin(2)
        need |= lonely & ~(distance > distance.amin(2, keepdim=True) + 2.0 * rounding)
    if tokens.bias is not None:  # one that is as large as what is out of reach is far
        need |= ~(tokens.bias.permute(0, 2, 3, 1).abs() < -0.1 * FARTHEST).all(2, keepdim=True)
    return need.unflatten(3, (-1, length)).any(-1).transpose(2, 3).flatten(0, 2)


def members_first(part: Float[Tensor, "H M *Y"], groups: Groups) -> Float[Tensor, "H M *Y"]:
    """The first splats of all groups, the second ones, and so on."""
    return part.unflatten(1, (groups.num_groups, -1)).transpose(1, 2).flatten(1, 2)


def slots_of(need: Bool[Tensor, "X G"], groups: Groups, num_chunks: int) -> list[Slot]:
    """As many slots as the chunk needs that needs the most, each chunk's groups in their order."""
    num_slots = max(1, int(need.sum(-1).amax()))
    index = (~need).byte().argsort(dim=-1, stable=True)[:, :num_slots].sort(-1).values.T  # [K, X]
    chunk = torch.arange(need.shape[0], device=need.device)
    of_head = (chunk // num_chunks % groups.numbers.shape[0]) * groups.num_groups + index
    of_chunk = chunk * groups.num_groups + index

    def slot(here: Int[Tensor, " X"], rows: Int[Tensor, " X"]) -> Slot:
        def pick(part: Tensor) -> Tensor:
            return part.unflatten(1, (groups.num_groups, -1)).flatten(0, 1).index_select(0, here)

        kernels = each(lambda part: pick(part)[:, None], groups.kernels)
        transform = None if groups.transform is None else each(pick, groups.transform)
        return Slot(rows, pick(groups.order)[:, None], pick(groups.factors), kernels, transform)

    return [slot(*rows) for rows in zip(of_head, of_chunk, strict=True)]


def of_slots(part: Float[Tensor, "X C #M"], slots: Sequence[Slot]) -> Sequence[Float[Tensor, "X C #E"]]:
    """What there is for each splat, for the splats of each slot."""
    if part.shape[-1] == 1:
        return [part] * len(slots)
    numbers = torch.cat([slot.numbers for slot in slots], -1)  # [X, 1, K E]
    return part.gather(-1, numbers.expand(-1, part.shape[1], -1)).chunk(len(slots), -1)


def sent(sources: Sources, slots: Sequence[Slot], length: int) -> list[Float[Tensor, "X C E"]]:
    """How much each token sends to the splats of each slot."""
    send = weights(sources.positions, sources.bias, slots, length)
    if sources.write_gate is None:
        return send
    gates = of_slots(in_chunks(sources.write_gate, length), slots)
    return [part * gate for part, gate in zip(send, gates, strict=True)]


def weights(
    positions: Float[Tensor, "B L H P"], bias: Float[Tensor, "B L H M"] | None, slots: Sequence[Slot], length: int
) -> list[Float[Tensor, "X C E"]]:
    """The posterior over the splats of all slots."""
    tokens = with_squares(in_chunks(positions, length).to(slots[0].factors.dtype))
    near = [near_splats(tokens, slot.factors) for slot in slots]
    ended = [ending(part, slot.kernels) for part, slot in zip(near, slots, strict=True)]
    affinities = [part for part, _ in ended]
    lonely = reduce(torch.maximum, [out for _, out in ended]).amax(-1, keepdim=True) < 0
    if lonely.any():
        distances = [squared_distance(part, slot.kernels) for part, slot in zip(near, slots, strict=True)]
        nearest = nearest_of(distances, slots)
        affinities = [
            torch.where(lonely, alone(slot.numbers == nearest, part), part)
            for part, slot in zip(affinities, slots, strict=True)
        ]
    if bias is not None:
        biases = of_slots(in_chunks(bias, length), slots)
        affinities = [part + of.to(part.dtype) for part, of in zip(affinities, biases, strict=True)]
    largest = reduce(torch.maximum, [part.detach() for part in affinities]).amax(-1, keepdim=True)
    # the exponential of what underflows takes ten times as long as that of other numbers
    exponentials = [
        F.threshold((part - largest).clamp_min(NEGLIGIBLE - 1.0).exp(), math.exp(NEGLIGIBLE), 0.0)
        for part in affinities
    ]
    total = reduce(torch.add, exponentials).sum(-1, keepdim=True)
    return [part / total for part in exponentials]


def with_squares(positions: Float[Tensor, "*tokens P"]) -> Float[Tensor, "*tokens P+2"]:
    """(p, |p|^2, 1), of which a log-affinity is a linear function."""
    squared = torch.linalg.vector_norm(positions, dim=-1, keepdim=True).square()
    return torch.cat([positions, squared, torch.ones_like(squared)], -1)


def near_splats(tokens: Float[Tensor, "X C F"], factors: Float[Tensor, "X E F"]) -> Float[Tensor, "X C E"]:
    """`nearness`, as one product."""
    near = (tokens @ factors.mT).clamp_min(FARTHEST)
    return near - near.detach().clamp_min(0.0)


def nearest_of(distances: Sequence[Float[Tensor, "X C E"]], slots: Sequence[Slot]) -> Int[Tensor, "X C 1"]:
    """The number of the nearest splat; of equals the lowest."""
    least = reduce(torch.minimum, distances).amin(-1, keepdim=True)
    beyond = torch.iinfo(slots[0].numbers.dtype).max
    found = [torch.where(part == least, slot.numbers, beyond) for part, slot in zip(distances, slots, strict=True)]
    return reduce(torch.minimum, found).amin(-1, keepdim=True)


def in_chunks(part: Float[Tensor, "B L H Y"], length: int) -> Float[Tensor, "X C Y"]:
    """The tokens of a block by head and chunk."""
    return part.transpose(1, 2).unflatten(2, (-1, length)).flatten(0, 2)
