"""How the kernels of the sparse path are cut and started: the lattice's search, and the scan over its events."""

# B batch, T token, H head, N = B H, K point of half a lattice, P position width, p event of a token, E event,
# Q segment, M row of the table, X row width

import torch
import triton
from torch import Tensor

from .launch import padded
from .search import best_pairs_kernel
from .segments import add_last_kernel, look_up_kernel, running_sums_kernel, segment_sums_kernel

SCORES = 8192  # of a tile in the search: 32 tokens with 256 points
TILE = 16  # events of one row, of which a row of many splats has few
SEGMENT = 1024  # events of one row, so that one that is used very often is summed up by many programs
LOOKED_UP = 32  # events of a tile that reads
COLUMNS = 32  # of a program: 65 are 32, 32 and 1


def best_pairs(
    positions: Tensor, factors: Tensor, bias: Tensor | None, top_p: int, in_first: Tensor, in_second: Tensor
) -> None:
    """Places in both halves [B, T, H, p], for positions [B, T, H, P], `lattice_factors` and a bias [B, T, H, 2 K]."""
    batch, num_tokens, num_heads, position_dim = positions.shape
    num_points, half = factors.shape[2], position_dim // 2
    points = padded(num_points)
    tile = max(16, min(64, SCORES // points))
    best_pairs_kernel[(batch * num_heads * triton.cdiv(num_tokens, tile),)](
        *(positions, factors, bias, in_first, in_second, num_tokens, num_heads),
        P=half,
        K=num_points,
        PB=padded(half),
        KB=points,
        C=tile,
        TOP_P=top_p,
        L=triton.next_power_of_2(top_p),
        BIASED=bias is not None,
        PRECISION="tf32x3",  # which point is nearest hangs on the last digits, in bf16 too
        num_warps=8 if tile * points >= SCORES else 4,
        num_stages=1,
    )


def num_segments_of(num_events: int, num_rows: int) -> int:
    """As many as there can be: whole ones, and a last one for each row.

    >>> num_segments_of(4000, num_rows=9), num_segments_of(4, num_rows=9)
    (12, 4)
    """
    return min(num_events, num_events // SEGMENT + num_rows)


def running_sums(rows: Tensor, by: Tensor, rank: Tensor, starts: Tensor, times: Tensor | None) -> Tensor:
    """At each place in the order the sum so far, [N, E, X]. Segments begin at `starts` [N, Q + 1]."""
    heads, num_events, width = rows.shape
    num_segments = starts.shape[1] - 1
    grid = (heads * num_segments, triton.cdiv(width, COLUMNS))
    shape = {"C": TILE, "LENGTH": SEGMENT, "XB": COLUMNS, "FADES": times is not None}
    shape["num_warps"] = 1 if times is None else 4
    sizes = (num_events, num_segments, width)
    several = num_events > SEGMENT  # as a row may have
    segment_sums = rows.new_empty(heads, num_segments if several else 0, width)
    sums = torch.empty_like(rows)
    if several:
        segment_sums_kernel[grid](rows, by, rank, starts, times, segment_sums, *sizes, **shape)
    running_sums_kernel[grid](rows, by, rank, starts, times, segment_sums, sums, *sizes, **shape)
    return sums


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
    heads, num_events, width = sums.shape
    found = torch.empty_like(sums)
    look_up_kernel[(heads * triton.cdiv(num_events, LOOKED_UP), triton.cdiv(width, COLUMNS))](
        *(table, sums, by, times, begin, read_at, last, found, num_events, table.shape[1], width),
        C=LOOKED_UP,
        XB=COLUMNS,
        FADES=times is not None,
        num_warps=2,
    )
    return found


def add_last(
    table: Tensor, sums: Tensor, sorted_at: Tensor, by: Tensor, times: Tensor | None, end: Tensor | None
) -> None:
    """To the table, in place, what was written to each row."""
    heads, num_events, width = sums.shape
    add_last_kernel[(heads * triton.cdiv(num_events, LOOKED_UP), triton.cdiv(width, COLUMNS))](
        *(table, sums, sorted_at, by, times, end, num_events, table.shape[1], width),
        C=LOOKED_UP,
        XB=COLUMNS,
        FADES=times is not None,
        num_warps=2,
    )
