"""How kernels are cut and started: tiles and segments by rule, the splats as kernels want them, a function for each."""

# B batch, T token, H head, N = B H, Q segment, M splat, P position width, D value width, G as in tiles.py

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .backward import mix_backward_kernel, prepare_kernel, weighing_backward_kernel
from .forward import carry_kernel, collect_kernel, hand_out_kernel, mix_kernel, step_kernel

PROGRAMS = 264  # wanted, and not more: two for each of the 132 processors of a Hopper GPU
FEWEST_TILES = 32  # of a segment, so that its state is few bytes beside its tokens
WIDE = 64  # beyond that a tile has half the tokens, so that what is made of it fits into registers
# tokens of a tile, by what decays, if nothing is wider than WIDE; with a decay a splat each of its pairs has M factors
TILES = {"none": 32, "head": 32, "splat": 16}
KEPT_TILES = 4  # of which the backward pass keeps one state
# how numbers are multiplied: fp16 as tf32, which has its digits and the range that a weight over a mass needs; fp32 as
# the sum of three products of tf32, which is exact to about 2^-22
PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "tf32x3"}


class SplatTensors(NamedTuple):
    """The splats of a call, fp32: what log-affinities are made of, -|p|^2 precision / 2 + <p, scaled> - half_norm."""

    scaled: Tensor  # [H, M, P], center / sigma^2
    precision: Tensor  # [H, M], 1 / sigma^2
    half_norm: Tensor  # [H, M], |center|^2 / (2 sigma^2)
    log_amplitude: Tensor  # [H, M]


class Gradients(NamedTuple):
    """By everything that `mix` was given; None by what was not."""

    send_positions: Tensor
    receive_positions: Tensor | None
    values: Tensor
    log_decay: Tensor | None
    write_gate: Tensor | None
    splats: SplatTensors
    mass: Tensor
    total: Tensor


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


def sizes(splats: SplatTensors, width: int) -> dict[str, Any]:
    """M, P and D, and what they are padded to."""
    _, num_splats, position_dim = splats.scaled.shape
    plain = {"M": num_splats, "P": position_dim, "D": width}
    return {**plain, **{f"{name}B": padded(size) for name, size in plain.items()}}


def warps(splats: SplatTensors, width: int, *, heavy: bool) -> int:
    """Heavy is a kernel that has states of the past and the future, or all pairs of a tile for each splat."""
    return 8 if heavy or max(*splats.scaled.shape[1:], width) > WIDE else 4


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
        **sizes(splats, width),
        C=whole.tile,
        DECAY=grain(log_decay),
        GATE=grain(write_gate),
        PRECISION=precision_of(positions, values),
        num_warps=warps(splats, width, heavy=False),
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
        **sizes(splats, width),
        C=whole.tile,
        TIED=receive_positions is None,
        DECAY=grain(log_decay),
        GATE=grain(write_gate),
        PRECISION=precision_of(send_positions, receive_positions, values),
        num_warps=warps(splats, width, heavy=grain(log_decay) == "splat"),
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
        **sizes(splats, width),
        C=whole.tile,
        PRECISION=precision_of(positions, output),
        num_warps=warps(splats, width, heavy=False),
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
        **sizes(splats, width),
        DECAY=grain(log_decay),
        GATE=grain(write_gate),
        num_warps=warps(splats, width, heavy=False),
    )
    return output, mass_after, total_after


def mix_backward(
    send_positions: Tensor,
    receive_positions: Tensor | None,
    values: Tensor,
    splats: SplatTensors,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor, Tensor],
    whole: Cut,
) -> Gradients:
    """Gradients by everything that `mix` was given, from those by what it returned."""
    batch, num_tokens, num_heads, width = values.shape
    output_gradient, mass_after, total_after = after
    tied, alone = receive_positions is None, whole.num_segments == 1
    tokens = (send_positions, receive_positions, values, output_gradient, *splats, log_decay, write_gate)
    shape = {**sizes(splats, width), "C": whole.tile, "EVERY": KEPT_TILES, "TIED": tied}
    shape |= {"DECAY": grain(log_decay), "GATE": grain(write_gate), "PRECISION": precision_of(*tokens[:3])}
    num_programs = batch * num_heads * whole.num_segments

    num_kept = math.ceil(whole.num_tiles / KEPT_TILES)
    num_splats = splats.scaled.shape[1]
    kept_masses = mass_after.new_empty(num_programs, num_kept, num_splats)
    narrow = torch.bfloat16 if shape["PRECISION"] == "bf16" else torch.float32
    kept_totals = kept_masses.new_empty(*kept_masses.shape, width, dtype=narrow)
    segments = (batch * num_heads, whole.num_segments, num_splats)
    mass, total, decay = (
        (None, None, None)
        if alone
        else (mass_after.new_empty(segments), mass_after.new_empty(*segments, width), mass_after.new_empty(segments))
    )
    prepare_kernel[(num_programs,)](
        *(*tokens, *before, kept_masses, kept_totals, mass, total, decay),
        *(num_tokens, num_heads, whole.num_segments, num_kept, whole.num_tiles),
        **shape,
        ALONE=alone,
        num_warps=warps(splats, width, heavy=grain(log_decay) == "splat"),
        num_stages=2,
    )
    if mass is not None and total is not None and decay is not None:
        carry(mass[..., None], decay, mass_after, backwards=True)
        carry(total, decay, total_after, backwards=True)
        mass_after, total_after = mass, total

    gradients = Gradients(
        send_positions=torch.empty_like(send_positions),
        receive_positions=None if receive_positions is None else torch.empty_like(receive_positions),
        values=torch.empty_like(values),
        log_decay=None if log_decay is None else torch.empty_like(log_decay),
        write_gate=None if write_gate is None else torch.empty_like(write_gate),
        splats=splats,  # until they are summed up
        mass=mass_after.new_empty(batch, num_heads, num_splats),
        total=mass_after.new_empty(batch, num_heads, num_splats, width),
    )
    partial = per_program(splats, num_programs)
    mix_backward_kernel[(num_programs,)](
        *(*tokens, kept_masses, kept_totals, mass_after, total_after),
        *(*gradients[:5], *partial, *gradients[6:]),
        *(num_tokens, num_heads, whole.num_segments, num_kept, whole.num_tiles),
        **shape,
        num_warps=warps(splats, width, heavy=True),
        num_stages=1,  # its loop holds another one, so nothing is loaded ahead
    )
    return gradients._replace(splats=summed(partial, batch, num_heads))


def weighing_backward(
    positions: Tensor,
    vectors: Tensor,
    splats: SplatTensors,
    write_gate: Tensor | None,
    offsets: Tensor,
    contents: Tensor,
    *,
    sends: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, SplatTensors]:
    """Gradients by positions, by the vectors (if these are what is sent), by the gate and by the splats."""
    batch, num_tokens, num_heads, width = vectors.shape
    whole = cut(num_tokens, batch * num_heads, (*splats.scaled.shape[1:], width))
    num_programs = batch * num_heads * whole.num_segments
    d_positions, d_vectors = torch.empty_like(positions), torch.empty_like(vectors) if sends else None
    d_gate = None if write_gate is None else torch.empty_like(write_gate)
    partial = per_program(splats, num_programs)
    weighing_backward_kernel[(num_programs,)](
        *(positions, vectors, *splats, write_gate, offsets, contents, d_positions, d_vectors, d_gate, *partial),
        *(num_tokens, num_heads, whole.num_segments, whole.num_tiles),
        **sizes(splats, width),
        C=whole.tile,
        GATE=grain(write_gate),
        SENDS=sends,
        PRECISION=precision_of(positions, vectors),
        num_warps=warps(splats, width, heavy=False),
        num_stages=2,
    )
    return d_positions, d_vectors, d_gate, summed(partial, batch, num_heads)


def per_program(splats: SplatTensors, num_programs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients by `scaled`, by `precision` and by log-affinities, that each program finds."""
    scaled, precision, _, log_amplitude = (part.new_empty(num_programs, *part.shape[1:]) for part in splats)
    return scaled, precision, log_amplitude


def summed(partial: tuple[Tensor, Tensor, Tensor], batch: int, num_heads: int) -> SplatTensors:
    """Over batch and segments. A log-affinity grows with the log-amplitude and shrinks by the half norm."""
    scaled, precision, affinity = (part.unflatten(0, (batch, num_heads, -1)).sum((0, 2)) for part in partial)
    return SplatTensors(scaled, precision, -affinity, affinity)
