"""The sparse path by kernels, as operators of torch: the search among splats of a lattice, and the scan over events.

Gradients are not found here: the search has none, and the adjoint of a scan is a scan (`ops/scan.py`).
"""

# B batch, T token, H head, N sequence and head, K point of half a lattice, M row of the table, P position width,
# p event of a token, E event = T p, Q segment, X row width

import torch
from torch import Tensor

from ..events import Clock, Order, in_order, last_before
from ..lattice import lattice_factors
from ..splats import Lattice
from . import launch_sparse


@torch.library.custom_op("splatflow::search_lattice", mutates_args=())
def search_lattice(positions: Tensor, factors: Tensor, bias: Tensor | None, top_p: int) -> tuple[Tensor, Tensor]:
    """Places in both halves, [B, T, H, p] each, of the best pairs for positions [B, T, H, P]."""
    in_first = positions.new_empty(*positions.shape[:3], top_p, dtype=torch.int64)
    in_second = torch.empty_like(in_first)
    launch_sparse.best_pairs(positions, factors, bias, top_p, in_first, in_second)
    return in_first, in_second


@search_lattice.register_fake
def _(positions: Tensor, factors: Tensor, bias: Tensor | None, top_p: int) -> tuple[Tensor, Tensor]:
    in_first = positions.new_empty(*positions.shape[:3], top_p, dtype=torch.int64)
    return in_first, torch.empty_like(in_first)


@torch.library.custom_op("splatflow::running_sums", mutates_args=())
def running_sums(rows: Tensor, by: Tensor, rank: Tensor, starts: Tensor, times: Tensor | None) -> Tensor:
    """The sum so far at each place in the order, [N, E, X]."""
    return launch_sparse.running_sums(rows, by, rank, starts, times)


@running_sums.register_fake
def _(rows: Tensor, by: Tensor, rank: Tensor, starts: Tensor, times: Tensor | None) -> Tensor:
    return torch.empty_like(rows)


@torch.library.custom_op("splatflow::look_up", mutates_args=())
def look_up(
    table: Tensor,
    sums: Tensor,
    by: Tensor,
    times: Tensor | None,
    begin: Tensor | None,
    read_at: Tensor,
    last: Tensor,
) -> Tensor:
    """What each reading event finds, [N, E, X]."""
    return launch_sparse.look_up(table, sums, by, times, begin, read_at, last)


@look_up.register_fake
def _(table: Tensor, sums: Tensor, *rest: Tensor | None) -> Tensor:
    return torch.empty_like(sums)


@torch.library.custom_op("splatflow::add_last", mutates_args=("table",))
def add_last(
    table: Tensor, sums: Tensor, sorted_at: Tensor, by: Tensor, times: Tensor | None, end: Tensor | None
) -> None:
    """To each row of the table what was written to it."""
    launch_sparse.add_last(table, sums, sorted_at, by, times, end)


@add_last.register_fake
def _(table: Tensor, sums: Tensor, sorted_at: Tensor, by: Tensor, times: Tensor | None, end: Tensor | None) -> None:
    return None


def best_pairs(positions: Tensor, lattice: Lattice, bias: Tensor | None, top_p: int) -> tuple[Tensor, Tensor]:
    """`best_pairs` of `lattice_halves`, which are never in memory."""
    factors = lattice_factors(lattice, torch.float32).contiguous()
    return search_lattice(positions.contiguous(), factors, None if bias is None else bias.contiguous(), top_p)


def run(
    table: Tensor,
    rows: Tensor,
    write_at: Tensor,
    read_at: Tensor,
    clock: Clock | None,
    per_token: int,
    *,
    backwards: bool = False,
) -> tuple[Tensor, Tensor]:
    """`run` of `ops/scan.py`, for a clock that runs as the scan does: all events at once, in the table itself."""
    # places too: what is made of others in order, be it a sort, lies in memory as they do
    rows, write_at, read_at = rows.contiguous(), write_at.contiguous(), read_at.contiguous()
    order = in_order(write_at.flip(1) if backwards else write_at)
    last = last_before(read_at.flip(1) if backwards else read_at, order.sorted_at, order.by, per_token)
    by = order.by
    if backwards:
        by, last = by.shape[1] - 1 - by, last.flip(1)
    times, begin, end = (None, None, None) if clock is None else (part.contiguous() for part in clock)
    sums = running_sums(rows, by, order.rank, starts_of(order, table.shape[1]), times)
    found = look_up(table, sums, by, times, begin, read_at, last)
    if begin is not None and end is not None:
        table *= (end - begin).exp().to(table.dtype)[:, None, None]
    add_last(table, sums, order.sorted_at, by, times, end)
    return found, table


def starts_of(order: Order, num_rows: int) -> Tensor:
    """The place at which each segment begins, [N, Q + 1]: at the number of events, where no more is left of them."""
    heads, num_events = order.rank.shape
    num_segments = launch_sparse.num_segments_of(num_events, num_rows)
    starts = order.rank.new_full((heads, num_segments + 1), num_events)
    begins = order.rank % launch_sparse.SEGMENT == 0
    here = torch.arange(num_events, device=starts.device).expand(heads, -1)
    segment = torch.where(begins, begins.cumsum(1) - 1, num_segments)
    return starts.scatter_(1, segment, torch.where(begins, here, num_events))
