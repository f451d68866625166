"""How the kernels of the backward pass are started, as `launch.py` does; gradients by splats are summed up."""

# B batch (N documents if packed), T token, H head, Q segment, W program, M splat, P position width, D value width

from typing import NamedTuple

import torch
from torch import Tensor

from . import cutting
from .backward import mix_backward_kernel, prepare_kernel, weighing_backward_kernel
from .cutting import Cut
from .launch import SplatTensors, carry, grain, precision_of, sizes, warps


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
    tied, alone = receive_positions is None, whole.alone
    tokens = (send_positions, receive_positions, values, output_gradient, *splats, log_decay, write_gate)
    shape = sizes(splats.scaled, width, output_gradient.shape[2])
    shape |= {"C": whole.tile, "EVERY": cutting.KEPT_TILES, "TIED": tied}
    shape |= {"DECAY": grain(log_decay), "GATE": grain(write_gate), "PRECISION": precision_of(*tokens[:3])}
    num_programs, num_splats = whole.num_programs(batch, num_heads), splats.scaled.shape[1]

    kept = whole.num_kept * (num_programs if whole.table is None else num_heads)
    kept_masses = mass_after.new_empty(kept, num_splats)
    narrow = torch.bfloat16 if shape["PRECISION"] == "bf16" else torch.float32
    kept_totals = kept_masses.new_empty(*kept_masses.shape, width, dtype=narrow)
    segments = (num_programs, num_splats)
    mass, total, decay = (
        (None, None, None)
        if alone
        else (mass_after.new_empty(segments), mass_after.new_empty(*segments, width), mass_after.new_empty(segments))
    )
    prepare_kernel[(num_programs,)](
        *(*tokens, *before, kept_masses, kept_totals, mass, total, decay),
        *(whole.table, num_tokens, num_heads, whole.num_segments, whole.num_kept, whole.num_tiles),
        **shape,
        ALONE=alone,
        num_warps=warps(splats.scaled, width, heavy=grain(log_decay) == "splat"),
        num_stages=2,
    )
    if mass is not None and total is not None and decay is not None:
        carry(mass[..., None], decay, mass_after, whole, backwards=True)
        carry(total, decay, total_after, whole, backwards=True)
        mass_after, total_after = mass, total

    gradients = Gradients(
        send_positions=torch.empty_like(send_positions),
        receive_positions=None if receive_positions is None else torch.empty_like(receive_positions),
        values=torch.empty_like(values),
        log_decay=None if log_decay is None else torch.empty_like(log_decay),
        write_gate=None if write_gate is None else torch.empty_like(write_gate),
        splats=splats,  # until they are summed up
        mass=torch.empty_like(after[1]),
        total=torch.empty_like(after[2]),
    )
    partial = per_program(splats, num_programs)
    mix_backward_kernel[(num_programs,)](
        *(*tokens, kept_masses, kept_totals, mass_after, total_after),
        *(*gradients[:5], *partial, *gradients[6:]),
        *(whole.table, num_tokens, num_heads, whole.num_segments, whole.num_kept, whole.num_tiles),
        **shape,
        num_warps=warps(splats.scaled, width, heavy=True),
        num_stages=1,  # its loop holds another one, so nothing is loaded ahead
    )
    return gradients._replace(splats=summed(partial, batch, num_heads, whole))


def weighing_backward(
    positions: Tensor,
    vectors: Tensor,
    splats: SplatTensors,
    write_gate: Tensor | None,
    offsets: Tensor,
    contents: Tensor,
    whole: Cut,
    *,
    sends: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, SplatTensors]:
    """Gradients by positions, by the vectors (if these are what is sent), by the gate and by the splats."""
    batch, num_tokens, num_heads, width = vectors.shape
    num_programs = whole.num_programs(batch, num_heads)
    d_positions, d_vectors = torch.empty_like(positions), torch.empty_like(vectors) if sends else None
    d_gate = None if write_gate is None else torch.empty_like(write_gate)
    partial = per_program(splats, num_programs)
    weighing_backward_kernel[(num_programs,)](
        *(positions, vectors, *splats, write_gate, offsets, contents, d_positions, d_vectors, d_gate, *partial),
        *(whole.table, num_tokens, num_heads, whole.num_segments, whole.num_tiles),
        **sizes(splats.scaled, width, num_heads),
        C=whole.tile,
        GATE=grain(write_gate),
        SENDS=sends,
        PRECISION=precision_of(positions, vectors),
        num_warps=warps(splats.scaled, width, heavy=False),
        num_stages=2,
    )
    return d_positions, d_vectors, d_gate, summed(partial, batch, splats.scaled.shape[0], whole)


def per_program(splats: SplatTensors, num_programs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients by `scaled`, by `precision` and by log-affinities, that each program finds."""
    scaled, precision, _, log_amplitude = (part.new_empty(num_programs, *part.shape[1:]) for part in splats)
    return scaled, precision, log_amplitude


def summed(partial: tuple[Tensor, Tensor, Tensor], batch: int, num_heads: int, whole: Cut) -> SplatTensors:
    """Over batch and segments. A log-affinity grows with the log-amplitude and shrinks by the half norm."""
    scaled, precision, affinity = (whole.by_head(part, batch, num_heads).sum((0, 2)) for part in partial)
    return SplatTensors(scaled, precision, -affinity, affinity)
