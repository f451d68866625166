"""Running sums of rows of a table of which each token touches few: a scan whose cost does not depend on its length.

An event is a token at one row. A writing event adds a row of numbers to the table, a reading event finds what stands
there when its token, and all before it, have written. With a clock, what stands there fades in between.

Within a block of tokens the writing events are brought into the order of (row, time), summed up in that order, and
looked up; between blocks the table itself hands on. The adjoint is the same scan with time reversed and the parts of
reading and writing exchanged, so it costs as much and nothing but the events has to be kept for it.
"""

# N sequence and head, M row of the table, T token, p event of a token, E event = T p, X row width, Q piece,
# G place in a piece

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import kernels
from .decay import decayed_cumsum
from .events import Clock, in_order, last_before

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

BLOCK_EVENTS = 4096  # of all sequences and heads: so that what is made of them stays in the cache
LONGEST_PIECE = 32


def scan(
    table: Float[Tensor, "N M X"],
    rows: Float[Tensor, "N E X"],
    write_at: Int[Tensor, "N E"],
    read_at: Int[Tensor, "N E"],
    log_kept: Float[Tensor, "N T"] | None = None,
    per_token: int = 1,
) -> tuple[Float[Tensor, "N E X"], Float[Tensor, "N M X"]]:
    """What each reading event finds, and the table after the last token.

    Args:
        table: what stands there before the first token. It is the caller's no more: the scan works in it, and in the
            gradient by what it returns.
        rows: what each writing event adds.
        write_at, read_at: where events write and read, those of a token next to each other, `per_token` of each, at
            different places.
        log_kept: the logarithm of what is left, at each token, of what stood there at first: fp64, for differences of
            such sums are taken. None: all.

    Example:
        >>> write_at, read_at = torch.tensor([[0, 1, 0]]), torch.tensor([[1, 1, 0]])  # three tokens, one event each
        >>> found, after = scan(torch.zeros(1, 2, 1), torch.tensor([[[1.0], [2.0], [4.0]]]), write_at, read_at)
        >>> found.flatten().tolist(), after.flatten().tolist()
        ([0.0, 2.0, 5.0], [5.0, 2.0])
    """
    return _Scan.apply(table, rows, log_kept, write_at, read_at, per_token)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        rows: Tensor,
        log_kept: Tensor | None,
        write_at: Tensor,
        read_at: Tensor,
        per_token: int,
    ) -> tuple[Tensor, Tensor]:
        clock = None
        if log_kept is not None:
            clock = Clock(log_kept.repeat_interleave(per_token, 1), torch.zeros_like(log_kept[:, 0]), log_kept[:, -1])
        if clock is None:
            ctx.mark_dirty(table)
        else:
            table = table.clone()
        found, after = run(table, rows, write_at, read_at, clock, per_token)
        ctx.save_for_backward(write_at, read_at, *(() if clock is None else (rows, found, after, *clock)))
        ctx.per_token = per_token
        ctx.set_materialize_grads(False)  # a table of zeros may be larger than all else
        ctx.num_rows = table.shape[1]
        return found, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_found: Tensor | None, d_after: Tensor | None) -> tuple[Tensor | None, ...]:
        write_at, read_at, *rest = ctx.saved_tensors
        if d_found is None and d_after is None:
            return (None,) * 6
        if d_found is None:
            assert d_after is not None
            d_found = d_after.new_zeros(*write_at.shape, d_after.shape[-1])
        clock = Clock(*rest[3:]) if rest else None
        at_end = None if clock is None or d_after is None else (d_after * rest[2]).sum((1, 2))
        table = (
            d_found.new_zeros(len(d_found), ctx.num_rows, d_found.shape[-1])
            if d_after is None
            else d_after.contiguous()
        )
        # as if the readers wrote, the last of them first: each row is summed over all that came to hear of it
        d_rows, d_table = run(table, d_found, read_at, write_at, clock, ctx.per_token, backwards=True)
        if clock is None:
            return d_table, d_rows, None, None, None, None
        rows, found = rest[:2]
        # what is found grows with the time at which it is read, and shrinks with that at which it was written
        d_times = ((d_found * found).sum(-1) - (d_rows * rows).sum(-1)).unflatten(1, (-1, ctx.per_token)).sum(-1)
        if at_end is not None:
            d_times[:, -1] += at_end
        return d_table, d_rows, d_times.to(clock.times.dtype), None, None, None


def run(
    table: Float[Tensor, "N M X"],
    rows: Float[Tensor, "N E X"],
    write_at: Int[Tensor, "N E"],
    read_at: Int[Tensor, "N E"],
    clock: Clock | None,
    per_token: int,
    *,
    backwards: bool = False,
) -> tuple[Float[Tensor, "N E X"], Float[Tensor, "N M X"]]:
    """`scan`, block by block, in the table itself; or as if time ran backwards."""
    if backwards and clock is not None:
        clock = Clock(-clock.times, -clock.end, -clock.begin)
    if (by_kernels := kernels.scan_for(table)) is not None:
        return by_kernels(table, rows, write_at, read_at, clock, per_token, backwards=backwards)
    num_rows = table.shape[1]
    flat = table.view(-1, table.shape[-1])
    offset = torch.arange(len(rows), device=rows.device)[:, None] * num_rows
    since = None if clock is None else clock.begin.repeat_interleave(num_rows)  # when each row of the table was so
    found = torch.empty_like(rows)
    size = max(1, BLOCK_EVENTS // (len(rows) * per_token)) * per_token
    starts = range(0, rows.shape[1], size)
    for start in reversed(starts) if backwards else starts:
        here = slice(start, start + size)
        parts = [part[:, here] for part in (write_at, read_at, rows, *(() if clock is None else (clock.times,)))]
        write, read, sent, *rest = (part.flip(1) for part in parts) if backwards else parts
        times = rest[0] if rest else None
        order = pieces_of(write, times, num_rows)
        sums = running_sums(sent, order)
        heard = _looked_up(sums, order, last_before(read, order.sorted_at, order.by, per_token), times)
        heard += _faded(flat, since, (offset + read).flatten(), times)
        heard = heard.view_as(sent)
        found[:, here] = heard.flip(1) if backwards else heard

        ends = order.is_last
        at = (offset + order.sorted_at)[ends]
        if since is None:
            flat.index_add_(0, at, sums[order.place[ends]])
        else:
            assert order.times is not None
            now = order.times[ends]
            flat[at] = _faded(flat, since, at, now) + sums[order.place[ends]]
            since[at] = now
    if since is not None:
        assert clock is not None
        flat *= (clock.end.repeat_interleave(num_rows) - since).exp().to(flat.dtype)[:, None]
    return found, table


def _looked_up(
    sums: Float[Tensor, "places X"], order: Pieces, last: Int[Tensor, "N E"], times: Float[Tensor, "N E"] | None
) -> Float[Tensor, "NE X"]:
    """The sum at the last event before each reading one, as it is when it is read; 0 if there is none."""
    at = last.clamp_min(0)
    found = sums.index_select(0, order.place.gather(1, at).flatten())
    if times is not None:
        assert order.times is not None
        found *= (times - order.times.gather(1, at)).exp().flatten().to(found.dtype)[:, None]
    return found.masked_fill_((last < 0).flatten()[:, None], 0)


def _faded(
    flat: Float[Tensor, "NM X"],
    since: Float[Tensor, " NM"] | None,
    at: Int[Tensor, " events"],
    now: Float[Tensor, "*events"] | None,
) -> Float[Tensor, "events X"]:
    """Rows of the table as they are now."""
    rows = flat.index_select(0, at)
    if since is None or now is None:
        return rows
    return rows.mul_((now.flatten() - since[at]).exp().to(rows.dtype)[:, None])


class Pieces(NamedTuple):
    """Writing events in the order of (row, time), cut into pieces of at most G events of one row each.

    A piece is padded to G places, so that sums within pieces are one dense operation. What a sum is made of depends on
    the events before it at its own row and on nothing else, so that no later event changes its rounding.
    """

    sorted_at: Int[Tensor, "N E"]  # the rows, in order
    by: Int[Tensor, "N E"]  # which event stands there
    place: Int[Tensor, "N E"]  # and at which of all N Q G places
    times: Float[Tensor, "N E"] | None
    is_last: Bool[Tensor, "N E"]  # of the events of its row
    rank: Int[Tensor, " pieces"]  # of each of all N Q pieces among those of its row
    size: int  # G


def piece_size(num_events: int, num_rows: int) -> int:
    """A power of 2 such that, if all rows are used alike, few places of the pieces stay empty."""
    wanted = max(1, num_events // (4 * num_rows))
    return min(LONGEST_PIECE, 1 << (wanted.bit_length() - 1))


def pieces_of(
    write_at: Int[Tensor, "N E"], times: Float[Tensor, "N E"] | None, num_rows: int, size: int | None = None
) -> Pieces:
    """Where each event stands in pieces of this size.

    Example:
        >>> pieces_of(torch.tensor([[4, 2, 4, 4]]), None, num_rows=9, size=2).place.tolist()  # event 1, 0 and 2, 3
        [[0, 2, 3, 4]]
    """
    heads, num_events = write_at.shape
    size = piece_size(num_events, num_rows) if size is None else size
    sorted_at, by, rank, is_last = in_order(write_at)
    first = rank % size == 0  # of its piece
    # there cannot be more pieces than events, nor than whole pieces and a last one for each row
    num_pieces = min(num_events, num_events // size + num_rows)
    offset = torch.arange(heads, device=write_at.device)[:, None] * num_pieces
    piece = offset + first.cumsum(1) - 1
    ranks = torch.zeros(heads * num_pieces, dtype=rank.dtype, device=write_at.device)
    ranks[piece[first]] = rank[first] // size
    sorted_times = None if times is None else times.gather(1, by)
    return Pieces(sorted_at, by, piece * size + rank % size, sorted_times, is_last, ranks, size)


def running_sums(rows: Float[Tensor, "N E X"], order: Pieces) -> Float[Tensor, "places X"]:
    """At each place the sum of what was written to its row so far, faded to the time of that place."""
    offset = torch.arange(rows.shape[0], device=rows.device)[:, None] * rows.shape[1]
    sorted_rows = rows.flatten(0, 1).index_select(0, (offset + order.by).flatten())
    if order.size == 1:
        return add_up(sorted_rows, order.rank, None if order.times is None else order.times.flatten())
    places = rows.new_zeros(len(order.rank) * order.size, rows.shape[-1])
    places.index_copy_(0, order.place.flatten(), sorted_rows)
    places = places.unflatten(0, (-1, order.size))  # [pieces, G, X]
    later = order.rank.nonzero()[:, 0]
    if order.times is None:
        until = add_up(places.sum(1), order.rank, None)  # the end of each piece
        places[later, 0] += until[later - 1]
        return places.cumsum(1).flatten(0, 1)
    times = order.times.new_full((len(order.rank) * order.size,), torch.inf)
    times.index_copy_(0, order.place.flatten(), order.times.flatten())
    times = times.view(-1, order.size)
    ends = times.amin(1)  # time runs down; an empty place counts as the last of its piece
    times = torch.where(times.isinf(), ends[:, None], times).nan_to_num(posinf=0.0)
    ends = times[:, -1]
    # by doubling, and not as a product with what is left: 0 times infinity would reach the past
    sums = decayed_cumsum(places, times.diff(dim=1, prepend=times[:, :1])[..., None].to(rows.dtype))
    until = add_up(sums[:, -1].clone(), order.rank, ends)
    before = (times[later] - ends[later - 1, None]).exp().to(rows.dtype)
    sums[later] += before[..., None] * until[later - 1, None]
    return sums.flatten(0, 1)


def add_up(
    sums: Float[Tensor, "pieces X"], rank: Int[Tensor, " pieces"], ends: Float[Tensor, " pieces"] | None
) -> Float[Tensor, "pieces X"]:
    """Sums over the pieces of one row so far, in place, by doubling; pieces of a row are neighbours.

    Each pass touches only those with so many before them: for many rows, of which each is seldom used, few.
    """
    span = 1
    while len(later := (rank >= span).nonzero()[:, 0]):
        earlier = sums.index_select(0, later - span)
        if ends is not None:
            earlier *= (ends[later] - ends[later - span]).exp().to(sums.dtype)[:, None]
        sums.index_add_(0, later, earlier)
        span *= 2
    return sums
