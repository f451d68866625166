"""How kernels are cut and started: tiles and segments by rule, the splats as kernels want them, a function for each."""

# B batch, T token, H head, N = B H, Q segment, M splat, P position width, D value width, G as in tiles.py

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..splats import Splats
from ..window_state import WindowState, each_part
from .forward import carry_kernel, collect_kernel, hand_out_kernel, mix_kernel, step_kernel
from .steps import window_step_kernel

PROGRAMS = 264  # wanted, and not more: two for each of the 132 processors of a Hopper GPU
FEWEST_TILES = 32  # of a segment, so that its state is few bytes beside its tokens
WIDE = 64  # beyond that a tile has half the tokens, so that what is made of it fits into registers
# tokens of a tile, by what decays, if nothing is wider than WIDE; with a decay a splat each of its pairs has M factors
TILES = {"none": 32, "head": 32, "splat": 16}
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


class Cut(NamedTuple):
    """How T tokens are cut: Q segments of `num_tiles` tiles of `tile` tokens."""

    tile: int
    num_tiles: int
    num_segments: int


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


def cut(num_tokens: int, num_sequences: int, widths: tuple[int, int, int], decay: str = "none") -> Cut:
    """Few segments, but enough to occupy a GPU: what is one segment is read only once.

    >>> cut(1000, 1024, (64, 64, 64)), cut(100_000, 16, (64, 64, 64))
    (Cut(tile=32, num_tiles=32, num_segments=1), Cut(tile=32, num_tiles=196, num_segments=16))
    """
    tile = TILES[decay] if max(widths) <= WIDE else max(16, TILES[decay] // 2)
    tiles = math.ceil(num_tokens / tile)
    num_tiles = min(tiles, max(FEWEST_TILES, math.ceil(tiles / max(1, PROGRAMS // num_sequences))))
    return Cut(tile, num_tiles, math.ceil(tiles / num_tiles))


def sizes(centers: Tensor, width: int) -> dict[str, Any]:
    """M, P and D of centers [H, M, P], and what they are padded to."""
    _, num_splats, position_dim = centers.shape
    plain = {"M": num_splats, "P": position_dim, "D": width}
    return {**plain, **{f"{name}B": padded(size) for name, size in plain.items()}}


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
    num_walked: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What each of the first `num_walked` segments adds, [N, Q, M] and [N, Q, M, D], and log of what it leaves."""
    batch, num_tokens, num_heads, width = values.shape
    num_splats = splats.scaled.shape[1]
    mass = positions.new_empty(batch * num_heads, whole.num_segments, num_splats, dtype=torch.float32)
    total, decay = mass.new_empty(*mass.shape, width), torch.empty_like(mass)
    collect_kernel[(mass.shape[0] * num_walked,)](
        *(positions, values, *splats, log_decay, write_gate, mass, total, decay),
        *(num_tokens, num_heads, whole.num_segments, num_walked, whole.num_tiles),
        **sizes(splats.scaled, width),
        C=whole.tile,
        DECAY=grain(log_decay),
        GATE=grain(write_gate),
        PRECISION=precision_of(positions, values),
        num_warps=warps(splats.scaled, width, heavy=False),
        num_stages=2,
    )
    return mass, total, decay


def carry(rows: Tensor, decay: Tensor, start: Tensor, *, backwards: bool) -> None:
    """In place, from what each segment adds to [N, Q, M, X], what there is before it (backwards: after it)."""
    sequences, num_segments, num_splats, width = rows.shape
    carry_kernel[(sequences, math.ceil(num_splats / 4))](
        *(rows, decay, start, num_segments, num_segments),
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
    """Mass and total before each segment, [N, Q, M] and [N, Q, M, D]; with one segment, what was given."""
    if whole.num_segments == 1:
        return mass, total
    masses, totals, decay = collect(
        send_positions, values, splats, log_decay, write_gate, whole, whole.num_segments - 1
    )
    carry(masses[..., None], decay, mass, backwards=False)
    carry(totals, decay, total, backwards=False)
    return masses, totals


def mix(
    send_positions: Tensor,
    receive_positions: Tensor | None,
    values: Tensor,
    splats: SplatTensors,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    before: tuple[Tensor, Tensor],
    whole: Cut,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, T, H, D], and the state after the last token, [B, H, M] and [B, H, M, D]."""
    batch, num_tokens, num_heads, width = values.shape
    output = torch.empty_like(values)
    mass = values.new_empty(batch, num_heads, splats.scaled.shape[1], dtype=torch.float32)
    total = mass.new_empty(*mass.shape, width)
    mix_kernel[(batch * num_heads * whole.num_segments,)](
        *(send_positions, receive_positions, values, *splats, log_decay, write_gate, *before, output, mass, total),
        *(num_tokens, num_heads, whole.num_segments, whole.num_tiles),
        **sizes(splats.scaled, width),
        C=whole.tile,
        TIED=receive_positions is None,
        DECAY=grain(log_decay),
        GATE=grain(write_gate),
        PRECISION=precision_of(send_positions, receive_positions, values),
        num_warps=warps(splats.scaled, width, heavy=grain(log_decay) == "splat"),
        num_stages=2,
    )
    return output, mass, total


def hand_out(positions: Tensor, splats: SplatTensors, contents: Tensor, dtype: torch.dtype) -> Tensor:
    """What targets [B, T, H, P] receive of contents [B, H, M, D]: [B, T, H, D]."""
    batch, num_tokens, num_heads, _ = positions.shape
    width = contents.shape[-1]
    whole = cut(num_tokens, batch * num_heads, (*splats.scaled.shape[1:], width))
    output = contents.new_empty(batch, num_tokens, num_heads, width, dtype=dtype)
    hand_out_kernel[(batch * num_heads * whole.num_segments,)](
        *(positions, *splats, contents, output),
        *(num_tokens, num_heads, whole.num_segments, whole.num_tiles),
        **sizes(splats.scaled, width),
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
    output, mass_after, total_after = torch.empty_like(values), torch.empty_like(mass), torch.empty_like(total)
    step_kernel[(batch * num_heads,)](
        *(send_positions, receive_positions, values, *splats, log_decay, write_gate),
        *(mass, total, output, mass_after, total_after, num_heads),
        **sizes(splats.scaled, width),
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
    num_receivers = receive_positions.shape[2]
    near = tokens.values.new_empty(batch, 1, num_receivers, width)
    far, mass_after, total_after = torch.empty_like(near), torch.empty_like(mass), torch.empty_like(total)
    after = each_part(torch.empty_like, window)
    window_step_kernel[(batch * num_receivers,)](
        *(tokens.send_positions, receive_positions, *tokens[1:5], *window[:5]),
        *(*splats[:3], log_scale, mass, total, near, far, mass_after, total_after, *after[:5]),
        *(window_size, num_senders, math.ceil((window_size - 1) / WINDOW_TILE)),
        **sizes(splats.centers, width),
        C=WINDOW_TILE,
        R=num_receivers // num_senders,
        DECAY=grain(window.log_decay),
        GATE=grain(window.write_gate),
        num_warps=warps(splats.centers, width, heavy=False),
    )
    return near, far, mass_after, total_after, after
