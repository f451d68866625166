"""How kernels are started, a function for each: what they are given, and room for what they write."""

# B batch (N documents if packed), T token, H head, R receiving heads of one that sends, Q segment, W program, M splat,
# P position width, D value width, G as in tiles.py

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..splats import Splats
from ..window_state import WindowState, each_part
from .cutting import WIDE, Cut
from .forward import carry_kernel, collect_kernel, hand_out_kernel, mix_kernel, step_kernel
from .steps import window_step_kernel

WINDOW_TILE = 32  # tokens of the window that a step hears at a time
# how numbers are multiplied: fp16 as tf32, which has its digits and the range that a weight over a mass needs; fp32 as
# the sum of three products of tf32, which is exact to about 2^-22
PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "tf32x3"}


class SplatTensors(NamedTuple):
    """The splats of a call, fp32: what log-affinities are made of, -|p|^2 precision / 2 + <p, scaled> - half_norm."""

    scaled: Tensor  # [H, M, P], center / sigma^2
    precision: Tensor  # [H, M], 1 / sigma^2
    half_norm: Tensor  # [H, M], |center|^2 / (2 sigma^2)
    log_amplitude: Tensor  # [H, M]


def grain(factor: Tensor | None) -> str:
    """What a decay or gate [B, T, H, G] is given for."""
    if factor is None:
        return "none"
    return "splat" if factor.shape[-1] > 1 else "head"


def precision_of(*tensors: Tensor | None) -> str:
    """How tokens of these types are multiplied: as the finest of them asks for."""
    dtypes = [part.dtype for part in tensors if part is not None]
    return PRECISIONS[functools.reduce(torch.promote_types, dtypes)]


def padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def sizes(centers: Tensor, width: int, num_heads: int) -> dict[str, Any]:
    """M, P and D, and what they are padded to; and R, how many of so many heads share splats, of centers [H, M, P]."""
    num_groups, num_splats, position_dim = centers.shape
    plain = {"M": num_splats, "P": position_dim, "D": width}
    return {**plain, **{f"{name}B": padded(size) for name, size in plain.items()}, "R": num_heads // num_groups}


def heads_of(receive_positions: Tensor | None, values: Tensor) -> int:
    """How many heads receive what those of the values send."""
    return values.shape[2] if receive_positions is None else receive_positions.shape[2]


def warps(centers: Tensor, width: int, *, heavy: bool) -> int:
    """Heavy is a kernel that has states of the past and the future, or all pairs of a tile for each splat."""
    return 8 if heavy or max(*centers.shape[1:], width) > WIDE else 4


def collect(
    positions: Tensor,
    values: Tensor,
    splats: SplatTensors,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    whole: Cut,
    *,
    last_too: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What each segment adds, [W, M] and [W, M, D], and log of what it leaves; not the last ones, if not asked for."""
    batch, num_tokens, num_heads, width = values.shape
    num_programs = whole.num_programs(batch, num_heads)
    mass = positions.new_empty(num_programs, splats.scaled.shape[1], dtype=torch.float32)
    total, decay = mass.new_empty(*mass.shape, width), torch.empty_like(mass)
    collect_kernel[(num_programs,)](
        *(positions, values, *splats, log_decay, write_gate, mass, total, decay),
        *(whole.table, num_tokens, num_heads, whole.num_segments, whole.num_tiles),
        **sizes(splats.scaled, width, num_heads),
        C=whole.tile,
        DECAY=grain(log_decay),
        GATE=grain(write_gate),
        ALL=last_too,
        PRECISION=precision_of(positions, values),
        num_warps=warps(splats.scaled, width, heavy=False),
        num_stages=2,
    )
    return mass, total, decay


def of_sequences(rows: Tensor, num_states: int, num_groups: int, whole: Cut) -> Tensor:
    """The sum over the segments of each sequence, or document, [B, H, ...], of what each has, [W, ...].

    And over heads, if `num_groups` are fewer than those of the tokens.
    """
    parts = whole.by_head(rows, num_states, num_groups).sum(2)
    if whole.table is None or whole.alone:
        return parts
    documents = torch.arange(num_states + 1, dtype=torch.int32, device=rows.device)
    first_segments = torch.searchsorted(whole.table[:, 2].contiguous(), documents)
    return torch.segment_reduce(parts, "sum", offsets=first_segments, axis=0)


def carry(rows: Tensor, decay: Tensor, start: Tensor, whole: Cut, *, backwards: bool) -> None:
    """In place, from what each segment adds to [W, M, X], what there is before it (backwards: after it).

    It begins with `start` [B, H, M, X].
    """
    num_programs, num_splats, width = rows.shape
    sequences = num_programs if whole.table is not None else num_programs // whole.num_segments
    carry_kernel[(sequences, math.ceil(num_splats / 4))](
        *(rows, decay, start, whole.table, start.shape[1], whole.num_segments),
        M=num_splats,
        X=width,
        XB=triton.next_power_of_2(width),
        ROWS=4,
        BACKWARDS=backwards,
        num_warps=1,
    )


def states_before(
    send_positions: Tensor,
    values: Tensor,
    splats: SplatTensors,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    mass: Tensor,
    total: Tensor,
    whole: Cut,
) -> tuple[Tensor, Tensor]:
    """Mass and total before each segment, [W, M] and [W, M, D]; with one segment, what was given."""
    if whole.alone:
        return mass, total
    masses, totals, decay = collect(send_positions, values, splats, log_decay, write_gate, whole, last_too=False)
    carry(masses[..., None], decay, mass, whole, backwards=False)
    carry(totals, decay, total, whole, backwards=False)
    return masses, totals


def mix(
    send_positions: Tensor,
    receive_positions: Tensor | None,
    values: Tensor,
    splats: SplatTensors,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    before: tuple[Tensor, Tensor],
    num_states: int,
    whole: Cut,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, T, R H, D], and the state after the last token, [B, H, M] and [B, H, M, D]."""
    batch, num_tokens, num_heads, width = values.shape
    num_receiving = heads_of(receive_positions, values)
    output = values.new_empty(batch, num_tokens, num_receiving, width)
    mass = values.new_empty(num_states, num_heads, splats.scaled.shape[1], dtype=torch.float32)
    total = mass.new_empty(*mass.shape, width)
    mix_kernel[(whole.num_programs(batch, num_heads),)](
        *(send_positions, receive_positions, values, *splats, log_decay, write_gate, *before, output, mass, total),
        *(whole.table, num_tokens, num_heads, whole.num_segments, whole.num_tiles),
        **sizes(splats.scaled, width, num_receiving),
        C=whole.tile,
        TIED=receive_positions is None,
        DECAY=grain(log_decay),
        GATE=grain(write_gate),
        PRECISION=precision_of(send_positions, receive_positions, values),
        num_warps=warps(splats.scaled, width, heavy=grain(log_decay) == "splat"),
        num_stages=2,
    )
    return output, mass, total


def hand_out(positions: Tensor, splats: SplatTensors, contents: Tensor, dtype: torch.dtype, whole: Cut) -> Tensor:
    """What targets [B, T, R H, P] receive of contents [B, H, M, D]: [B, T, R H, D]."""
    batch, num_tokens, num_heads, _ = positions.shape
    width = contents.shape[-1]
    output = contents.new_empty(batch, num_tokens, num_heads, width, dtype=dtype)
    hand_out_kernel[(whole.num_programs(batch, num_heads),)](
        *(positions, *splats, contents, output),
        *(whole.table, num_tokens, num_heads, whole.num_segments, whole.num_tiles),
        **sizes(splats.scaled, width, num_heads),
        C=whole.tile,
        PRECISION=precision_of(positions, output),
        num_warps=warps(splats.scaled, width, heavy=False),
        num_stages=2,
    )
    return output


def step(
    send_positions: Tensor,
    receive_positions: Tensor,
    values: Tensor,
    splats: SplatTensors,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    mass: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mix` of one token."""
    batch, _, num_heads, width = values.shape
    num_receiving = heads_of(receive_positions, values)
    output = values.new_empty(batch, 1, num_receiving, width)
    mass_after, total_after = torch.empty_like(mass), torch.empty_like(total)
    step_kernel[(batch * num_heads,)](
        *(send_positions, receive_positions, values, *splats, log_decay, write_gate),
        *(mass, total, output, mass_after, total_after, num_heads),
        **sizes(splats.scaled, width, num_receiving),
        DECAY=grain(log_decay),
        GATE=grain(write_gate),
        num_warps=warps(splats.scaled, width, heavy=False),
    )
    return output, mass_after, total_after


def window_step(
    receive_positions: Tensor,
    log_scale: Tensor,
    splats: Splats,
    tokens: WindowState,
    window: WindowState,
    mass: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, WindowState]:
    """Near and far output of one token a sequence [B, 1, H, D], mass and total after it, and the window after it.

    Receiving heads H may be R times the heads that send. A decay or gate is [B, W, H, G], and there is no bias.
    """
    batch, window_size, num_senders, width = window.values.shape
    num_receiving = receive_positions.shape[2]
    near = tokens.values.new_empty(batch, 1, num_receiving, width)
    far, mass_after, total_after = torch.empty_like(near), torch.empty_like(mass), torch.empty_like(total)
    after = each_part(torch.empty_like, window)
    window_step_kernel[(batch * num_receiving,)](
        *(tokens.send_positions, receive_positions, *tokens[1:5], *window[:5]),
        *(*splats[:3], log_scale, mass, total, near, far, mass_after, total_after, *after[:5]),
        *(window_size, num_senders, math.ceil((window_size - 1) / WINDOW_TILE)),
        **sizes(splats.centers, width, num_receiving),
        C=WINDOW_TILE,
        DECAY=grain(window.log_decay),
        GATE=grain(window.write_gate),
        num_warps=warps(splats.centers, width, heavy=False),
    )
    return near, far, mass_after, total_after, after
