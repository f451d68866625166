"""Splat attention of which a token touches p splats, however many there are: p rows written and p rows read.

An event is a token at one of its splats. What a reading token finds is the sum of the rows that were written to the
same splat before: a running sum over the writing events in the order of (splat, time), looked up at the last one that
is not later. The backward pass is the same sum with time reversed and the parts of reading and writing exchanged.

Operations a token: the search, p (D + 1) to write and p (D + 1) to read, and a sort of its p events. Memory: p (D + 1)
numbers a token, and one state a block of tokens, of which there are so few that they hold no more than that.
"""

# B batch, T target token, t token of a block, H head, N sequence and head, M splat, E event, Q piece, G place in it,
# D value width, X row width

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .chunked import Output
from .routing import Router
from .splats import MIN_MASS, Sources, SplatState, Targets, part_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

BLOCK_TOKENS = 2048  # worked on at once, unless there are so many splats that states would take more than events
LONGEST_PIECE = 32


def sparse(
    sources: Sources, targets: Targets, router: Router, state: SplatState, *, causal: bool
) -> tuple[Float[Tensor, "B T H D"], SplatState]:
    """Output and final state, block by block."""
    num_sources, num_targets = sources.values.shape[1], targets.positions.shape[1]
    assert router.top_p is not None, "dispatch has seen to it"
    block = max(BLOCK_TOKENS, -(-router.splats.num_splats // router.top_p))
    output = Output(num_targets)
    batch, num_heads = state.mass.shape[:2]
    mass, total = state.mass.flatten(0, 1)[..., None], state.total.flatten(0, 1)  # [N, M, 1], [N, M, D]
    for start in range(0, num_sources, block):
        tokens = slice(start, min(start + block, num_sources))
        index, rows = written(sources, router, tokens)
        if causal:
            read_at, weights = read(targets, router, tokens)
            found = sums_before(index, rows, read_at, router.splats.num_splats, weights.shape[-1])
            output.append(tokens, heard(found, mass, total, read_at, weights, router))
        total, mass = added(total, index, rows[..., :-1]), added(mass, index, rows[..., -1:])
    if not causal:
        for start in range(0, num_targets, block):
            tokens = slice(start, min(start + block, num_targets))
            output.append(tokens, heard(None, mass, total, *read(targets, router, tokens), router))
    nothing = total.new_empty(batch, num_heads, 0, total.shape[-1])
    after = (part.unflatten(0, (batch, num_heads)) for part in (mass[..., 0], total))
    return output.join(nothing), SplatState(*after)


def written(sources: Sources, router: Router, tokens: slice) -> tuple[Int[Tensor, "N E"], Float[Tensor, "N E X"]]:
    """Where each event of these tokens writes, and what: its share of the value, and the share itself."""
    here = part_of(sources, tokens)
    index, send = router.chosen(here.positions, here.bias)
    if here.write_gate is not None:
        send = send * (here.write_gate if here.write_gate.shape[-1] == 1 else here.write_gate.gather(-1, index))
    values = here.values.to(send.dtype)
    rows = send[..., None] * torch.cat([values, torch.ones_like(values[..., :1])], -1)[..., None, :]
    return _events(index), _events(rows)


def read(targets: Targets, router: Router, tokens: slice) -> tuple[Int[Tensor, "N E"], Float[Tensor, "B t H p"]]:
    """Where each event of these tokens reads, and with which weight."""
    index, receive = router.chosen(*part_of(targets, tokens))
    return _events(index), receive


def heard(
    found: Float[Tensor, "N E X"] | None,
    mass: Float[Tensor, "N M 1"],
    total: Float[Tensor, "N M D"],
    read_at: Int[Tensor, "N E"],
    weights: Float[Tensor, "B t H p"],
    router: Router,
) -> Float[Tensor, "B H t D"]:
    """What tokens make of the rows that they found and of the state: weighted means, or sums, of their splats."""
    total, mass = rows_at(total, read_at), rows_at(mass, read_at)
    if found is not None:
        total, mass = total + found[..., :-1], mass + found[..., -1:]
    batch, _, num_heads, per_token = weights.shape
    if router.transform is not None:
        listen, say = (rows_at(part.expand(batch, *part.shape).flatten(0, 1), read_at) for part in router.transform)
        total = total + (total * listen).sum(-1, keepdim=True) * say
    weights = _events(weights)[..., None]  # [N, E, 1]
    if router.routing.running_mean:
        weights = weights / mass.clamp_min(MIN_MASS)
    return (weights * total).unflatten(1, (-1, per_token)).sum(2).unflatten(0, (batch, num_heads))


def rows_at(rows: Float[Tensor, "N M X"], index: Int[Tensor, "N E"]) -> Float[Tensor, "N E X"]:
    """Rows of the state."""
    return rows.flatten(0, 1).index_select(0, flat(index, rows)).unflatten(0, index.shape)


def added(
    state: Float[Tensor, "N M X"], index: Int[Tensor, "N E"], rows: Float[Tensor, "N E X"]
) -> Float[Tensor, "N M X"]:
    """The state with these rows added to it."""
    return state.flatten(0, 1).index_add(0, flat(index, state), rows.flatten(0, 1)).view_as(state)


def flat(index: Int[Tensor, "N E"], rows: Float[Tensor, "N M X"]) -> Int[Tensor, " places"]:
    """The same rows in `rows.flatten(0, 1)`."""
    return (torch.arange(rows.shape[0], device=index.device)[:, None] * rows.shape[1] + index).flatten()


def _events(tokens: Tensor) -> Tensor:
    """[B, t, H, p, ...] -> [N, t p, ...]."""
    return tokens.transpose(1, 2).flatten(0, 1).flatten(1, 2)


def sums_before(
    write_at: Int[Tensor, "N E"],
    rows: Float[Tensor, "N E X"],
    read_at: Int[Tensor, "N E"],
    num_splats: int,
    per_token: int = 1,
) -> Float[Tensor, "N E X"]:
    """For each reading event the sum of the rows that its own token and those before it wrote to the same splat.

    Events lie in the order of their tokens, `per_token` of each.

    Example:
        >>> write_at, read_at = torch.tensor([[0, 1, 0]]), torch.tensor([[1, 1, 0]])  # three tokens, one event each
        >>> sums_before(write_at, torch.tensor([[[1.0], [2.0], [4.0]]]), read_at, num_splats=2).flatten().tolist()
        [0.0, 2.0, 5.0]
    """
    return _SumsBefore.apply(write_at, rows, read_at, num_splats, per_token)


class _SumsBefore(torch.autograd.Function):
    """`sums_before`, whose adjoint is `sums_before` of what came last first."""

    @staticmethod
    def forward(
        ctx: Any, write_at: Tensor, rows: Tensor, read_at: Tensor, num_splats: int, per_token: int
    ) -> Float[Tensor, "N E X"]:
        ctx.save_for_backward(write_at, read_at)
        ctx.sizes = num_splats, per_token
        order = pieces_of(write_at, num_splats, piece_size(rows.shape[1], num_splats))
        last = last_before(read_at, order, per_token)
        found = running_sums(rows, order).index_select(0, last.clamp_min(0).flatten()).unflatten(0, last.shape)
        return found.masked_fill_((last < 0)[..., None], 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None, None, None]:
        write_at, read_at = ctx.saved_tensors
        # as if the readers wrote, the last of them first: each row is summed over all that came to hear of it
        gradients = sums_before(read_at.flip(1), gradient.flip(1), write_at.flip(1), *ctx.sizes).flip(1)
        return None, gradients, None, None, None


class Pieces(NamedTuple):
    """Writing events in the order of (splat, time), cut into pieces of at most G events of one splat each.

    A piece is padded to G places, so that sums within pieces are one dense operation. What a sum is made of depends on
    the events before it at its own splat and on nothing else, so that no later event changes its rounding.
    """

    sorted_at: Int[Tensor, "N E"]  # the splats, in order
    by: Int[Tensor, "N E"]  # which event stands there
    place: Int[Tensor, "N E"]  # and at which of all N Q G places
    rank: Int[Tensor, " pieces"]  # of each of all N Q pieces among those of its splat
    size: int  # G


def piece_size(num_events: int, num_splats: int) -> int:
    """A power of 2 such that, if all splats are used alike, few places of the pieces stay empty."""
    wanted = max(1, num_events // (4 * num_splats))
    return min(LONGEST_PIECE, 1 << (wanted.bit_length() - 1))


def pieces_of(write_at: Int[Tensor, "N E"], num_splats: int, size: int) -> Pieces:
    """Where each event stands in pieces of this size.

    Example:
        >>> pieces_of(torch.tensor([[4, 2, 4, 4]]), num_splats=9, size=2).place.tolist()  # event 1, then 0 and 2, 3
        [[0, 2, 3, 4]]
    """
    heads, num_events = write_at.shape
    sorted_at, by = write_at.sort(dim=1, stable=True)
    here = torch.arange(num_events, device=write_at.device)
    begins = torch.ones_like(sorted_at, dtype=torch.bool)
    begins[:, 1:] = sorted_at[:, 1:] != sorted_at[:, :-1]
    rank = here - torch.where(begins, here, 0).cummax(1).values  # among the events of its splat
    first = rank % size == 0  # of its piece
    # there cannot be more pieces than events, nor than whole pieces and a last one for each splat
    num_pieces = min(num_events, num_events // size + num_splats)
    offset = torch.arange(heads, device=write_at.device)[:, None] * num_pieces
    piece = offset + first.cumsum(1) - 1
    ranks = torch.zeros(heads * num_pieces, dtype=rank.dtype, device=write_at.device)
    ranks[piece[first]] = rank[first] // size
    return Pieces(sorted_at, by, piece * size + rank % size, ranks, size)


def running_sums(rows: Float[Tensor, "N E X"], order: Pieces) -> Float[Tensor, "places X"]:
    """At each place the sum of what was written to its splat so far."""
    offset = torch.arange(rows.shape[0], device=rows.device)[:, None] * rows.shape[1]
    in_order = rows.flatten(0, 1).index_select(0, (offset + order.by).flatten())
    if order.size == 1:
        return add_up(in_order, order.rank)
    places = rows.new_zeros(len(order.rank) * order.size, rows.shape[-1])
    places.index_copy_(0, order.place.flatten(), in_order)
    places = places.unflatten(0, (-1, order.size))
    until = add_up(places.sum(1), order.rank)  # the end of each piece
    later = order.rank.nonzero()[:, 0]
    places[later, 0] += until[later - 1]
    return places.cumsum(1).flatten(0, 1)


def add_up(sums: Float[Tensor, "pieces X"], rank: Int[Tensor, " pieces"]) -> Float[Tensor, "pieces X"]:
    """Sums over the pieces of one splat so far, in place, by doubling; pieces of a splat are neighbours.

    Each pass touches only those with so many before them: for many splats, of which each is seldom used, few.
    """
    span = 1
    while len(later := (rank >= span).nonzero()[:, 0]):
        sums.index_add_(0, later, sums.index_select(0, later - span))
        span *= 2
    return sums


def last_before(read_at: Int[Tensor, "N E"], order: Pieces, per_token: int) -> Int[Tensor, "N E"]:
    """The place of the last writing event at the splat of each reading event that is not later; -1 if there is none."""
    num_events = read_at.shape[1]
    now = torch.arange(num_events, device=read_at.device) // per_token
    keys = (order.sorted_at * num_events + order.by // per_token).contiguous()
    found = torch.searchsorted(keys, (read_at * num_events + now).contiguous(), right=True) - 1
    at = found.clamp_min(0)
    hit = (found >= 0) & (order.sorted_at.gather(1, at) == read_at)
    return torch.where(hit, order.place.gather(1, at), -1)
