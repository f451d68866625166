"""Kernels of the forward pass. Weights are made of positions and used up within a tile, and never reach memory.

A program walks the tiles of one segment of one sequence, or packed document, and head (`tokens_of` in tiles.py).
Bytes below are for one token and head, P = D = M = 64, bf16, without decay and gate, where a state of fp32 for each of
the segments, of L tokens, adds 4 (M D + M) / L for each time that it is read or written. Of packed documents tokens are
read where they lie; a program reads 24 bytes of the table of segments besides. L is at most the length of a document.
"""

# B batch, T token, H head, R receiving heads of one that sends, C token of a tile, M splat, P position width,
# D value width, G as in tiles.py

import triton
import triton.language as tl

from .tiles import (
    MIN_MASS,
    counted,
    cross,
    fading_pairs,
    fading_pairs_of_splats,
    fine_product,
    heard_of,
    known,
    load_fading,
    load_rows,
    load_splats,
    load_state,
    narrow,
    product,
    sequence_of,
    shares,
    store_rows,
    store_state,
    tiles_of,
    tokens_of,
    weigh,
    weights_of,
    written,
)


@triton.jit
def collect_kernel(
    positions, values, scaled, precision, half_norm, log_amplitude, log_decay, write_gate,
    segment_mass, segment_total, segment_decay,
    table, num_tokens, num_heads, num_segments, num_tiles,
    M: tl.constexpr, P: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, PB: tl.constexpr, DB: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr, ALL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What each segment adds to the state by itself, and by how much it fades what came before it: of ALL segments, or
    of all but the last of each sequence.

    Reads P + D numbers: 256 bytes. Operations: 4 P M for the weights (two products, so that centers keep 16 bits) and
    2 M D.
    """
    program = tl.program_id(0)
    head, first, num_here = tokens_of(program, table, num_tokens, num_heads, num_segments, num_tiles, C)
    _sequence, segment, last = sequence_of(program, table, num_heads, num_segments)
    centers, precision, half_norm, log_amplitude = load_splats(
        scaled, precision, half_norm, log_amplitude, head // R, M, P, MB, PB
    )
    mass, total = tl.zeros([MB], tl.float32), tl.zeros([MB, DB], tl.float32)
    fading = tl.zeros([MB], tl.float32)
    wanted = (segment != last) | ALL
    num_here = tl.where(wanted, num_here, 0)
    for tile in range(tiles_of(num_here, num_tiles, C)):
        real = tile * C + tl.arange(0, C) < num_here
        row = first + tile * C * num_heads
        place = load_rows(positions, row, real, num_heads, P, PB, C).to(tl.float32)
        value = load_rows(values, row, real, num_heads, D, DB, C)
        squared = tl.sum(place * place, 1)[None, :]
        send = shares(
            cross(centers, tl.trans(place), True, PRECISION),
            squared, precision[:, None], half_norm[:, None], log_amplitude[:, None], 0,
        )  # fmt: skip
        if GATE == "head":
            send *= tl.trans(load_rows(write_gate, row, real, num_heads, 1, 1, C))
        elif GATE == "splat":
            send *= tl.trans(load_rows(write_gate, row, real, num_heads, M, MB, C))
        send = tl.where(real[None, :], send, 0.0)  # [M, C]
        if DECAY == "none":
            left = send
        else:
            _, _, left, faded = load_fading(log_decay, row, real, num_heads, M, MB, C, DECAY)
            left = send * tl.trans(left)
            mass *= tl.exp(faded)
            total *= tl.exp(faded)[:, None]
            fading += faded
        mass += tl.sum(left, 1)
        total += product(left, value, PRECISION)
    store_state(segment_mass, segment_total, program, mass, total, wanted, M, D, MB, DB, False)
    m = tl.arange(0, MB)
    tl.store(segment_decay + program.to(tl.int64) * M + m, fading, mask=(m < M) & wanted)


@triton.jit
def carry_kernel(
    segment_rows, segment_decay, start, table, num_heads, num_segments,
    M: tl.constexpr, X: tl.constexpr, XB: tl.constexpr, ROWS: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """In place: from what each segment adds, what there is before it (or after it, if time runs backwards).

    The last one's own part is not asked for. A program has a few rows of one state; M X numbers a segment are read and
    written. Of packed documents the program of the first segment does so.
    """
    program, m = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    if table is None:
        sequence, first, stride, count = program, program * num_segments, 1, num_segments
    else:
        sequence, segment, last = sequence_of(program, table, num_heads, num_segments)
        first, stride, count = program, num_heads, tl.where(segment == 0, last + 1, 0)
    x = tl.arange(0, XB)
    inside = (m < M)[:, None] & (x < X)[None, :]
    rows = tl.load(start + (sequence.to(tl.int64) * M + m)[:, None] * X + x[None, :], mask=inside, other=0.0)
    for step in range(counted(count)):
        segment_here = count - 1 - step if BACKWARDS else step
        at = (first + segment_here * stride).to(tl.int64) * M + m
        places = segment_rows + at[:, None] * X + x[None, :]
        more = step < count - 1
        added = tl.load(places, mask=inside & more, other=0.0)
        tl.store(places, rows, mask=inside)
        faded = tl.load(segment_decay + at, mask=(m < M) & more, other=0.0)
        rows = rows * tl.exp(faded)[:, None] + added


@triton.jit
def mix_kernel(
    send_positions, receive_positions, values, scaled, precision, half_norm, log_amplitude, log_decay, write_gate,
    mass_before, total_before, output, mass_after, total_after,
    table, num_tokens, num_heads, num_segments, num_tiles,
    M: tl.constexpr, P: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, PB: tl.constexpr, DB: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, TIED: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The causal mix of each segment, from the state before it; and the state after the last.

    Reads P (tied) or 2 P and D numbers and writes D: 384 or 512 bytes, which is the floor. With more than one segment
    `collect_kernel` has read P + D before: 640 or 768, 1.67 or 1.5 times the floor. Operations: 12 P M (tied 8), 2 C M
    for masses, in tf32, 2 C (M + D) for scores, 4 M D for the state.

    R heads receive from one that sends. What is sent is read, and the state made, once for all of them: 256 + 256 R
    bytes for the R + 1 heads, the floor (512 R if the sending side were repeated). Weights of what receives, scores and
    what is read of the state, 4 P M + 2 C (M + D) + 2 M D operations, are R times as many.
    """
    program = tl.program_id(0)
    head, first, num_here = tokens_of(program, table, num_tokens, num_heads, num_segments, num_tiles, C)
    sequence, segment, last = sequence_of(program, table, num_heads, num_segments)
    centers, precision, half_norm, log_amplitude = load_splats(
        scaled, precision, half_norm, log_amplitude, head, M, P, MB, PB
    )
    mass, total = load_state(mass_before, total_before, program, M, D, MB, DB, False)
    for tile in range(tiles_of(num_here, num_tiles, C)):
        real = tile * C + tl.arange(0, C) < num_here
        row = first + tile * C * num_heads
        # in both orders, each by its own product: turning the one into the other miscompiles on Hopper
        place, share = weigh(
            send_positions, row, real, num_heads, centers, precision, half_norm, log_amplitude, P, PB, C, PRECISION
        )
        send, send_turned = share, shares(
            cross(centers, tl.trans(place), True, PRECISION),
            tl.sum(place * place, 1)[None, :], precision[:, None], half_norm[:, None], log_amplitude[:, None], 0,
        )  # fmt: skip
        value = load_rows(values, row, real, num_heads, D, DB, C)
        if GATE != "none":
            G: tl.constexpr = M if GATE == "splat" else 1
            GB: tl.constexpr = MB if GATE == "splat" else 1
            gate = load_rows(write_gate, row, real, num_heads, G, GB, C)
            send *= gate
            send_turned *= tl.trans(gate)
        send = tl.where(real[:, None], send, 0.0)
        send_turned = tl.where(real[None, :], send_turned, 0.0)

        steps, kept, left, faded = load_fading(log_decay, row, real, num_heads, M, MB, C, DECAY)
        if DECAY == "splat":
            paths = fading_pairs_of_splats(steps, C) * known(send)[None, :, :]  # [i, j, M]
            masses = kept * mass[None, :] + tl.sum(paths, 1)
        else:
            pairs = fading_pairs(steps, C, 0, DECAY)
            masses = kept * mass[None, :] + fine_product(pairs, known(send), PRECISION)
        for receiver in range(R):
            if TIED:
                receive = share
            else:
                _, receive = weigh(
                    receive_positions, row * R + receiver, real, num_heads * R,
                    centers, precision, half_norm, log_amplitude, P, PB, C, PRECISION,
                )  # fmt: skip
            read = receive / tl.maximum(masses, MIN_MASS)
            if DECAY == "splat":
                scores = tl.sum(read[:, None, :] * paths, 2)
            else:
                past = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]
                scores = tl.where(past, product(read, send_turned, PRECISION) * pairs, 0.0)
            mixed = product(scores, value, PRECISION) + product(read * kept, total, PRECISION)
            store_rows(output, mixed, row * R + receiver, real, num_heads * R, D, DB, C)

        mass = mass * tl.exp(faded) + tl.sum(send * left, 0)
        total = total * tl.exp(faded)[:, None] + product(send_turned * tl.trans(left), value, PRECISION)
    store_state(mass_after, total_after, sequence, mass, total, segment == last, M, D, MB, DB, False)


@triton.jit
def hand_out_kernel(
    positions, scaled, precision, half_norm, log_amplitude, contents, output,
    table, num_tokens, num_heads, num_segments, num_tiles,
    M: tl.constexpr, P: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, PB: tl.constexpr, DB: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each token receives what the splats of its group of R heads hold, the same for all.

    Reads P and writes D numbers, 256 bytes: with `collect_kernel` 512, and the floor without a causal mask is 384 tied
    and 512 untied. Operations: 4 P M for the weights and 2 M D.
    """
    program = tl.program_id(0)
    head, first, num_here = tokens_of(program, table, num_tokens, num_heads, num_segments, num_tiles, C)
    sequence, _segment, _last = sequence_of(program, table, num_heads, num_segments)
    centers, precision, half_norm, log_amplitude = load_splats(
        scaled, precision, half_norm, log_amplitude, head // R, M, P, MB, PB
    )
    m, d = tl.arange(0, MB), tl.arange(0, DB)
    content = tl.load(
        contents + ((sequence // R).to(tl.int64) * M + m)[:, None] * D + d[None, :],
        mask=(m < M)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    for tile in range(tiles_of(num_here, num_tiles, C)):
        real = tile * C + tl.arange(0, C) < num_here
        row = first + tile * C * num_heads
        _, receive = weigh(
            positions, row, real, num_heads, centers, precision, half_norm, log_amplitude, P, PB, C, PRECISION
        )
        store_rows(output, product(receive, content, PRECISION), row, real, num_heads, D, DB, C)


@triton.jit
def step_kernel(
    send_positions, receive_positions, values, scaled, precision, half_norm, log_amplitude, log_decay, write_gate,
    mass_before, total_before, output, mass_after, total_after, num_heads,
    M: tl.constexpr, P: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, PB: tl.constexpr, DB: tl.constexpr,
    R: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """One token of each sequence: the state written, and read by R heads, in one launch, all in fp32.

    Reads and writes the state, 2 x 4 (M D + M) bytes a head: 33 kB, beside which a token's own 512 bytes are nothing.
    """
    sequence = tl.program_id(0)
    head = sequence % num_heads
    centers, precision, half_norm, log_amplitude = load_splats(
        scaled, precision, half_norm, log_amplitude, head, M, P, MB, PB
    )
    mass, total = load_state(mass_before, total_before, sequence, M, D, MB, DB, False)
    p, d = tl.arange(0, PB), tl.arange(0, DB)
    token = sequence.to(tl.int64)
    place = tl.load(send_positions + token * P + p, mask=p < P, other=0.0).to(tl.float32)
    value = tl.load(values + token * D + d, mask=d < D, other=0.0).to(tl.float32)
    send = weights_of(place, centers, precision, half_norm, log_amplitude)
    mass, total = written(mass, total, send, value, log_decay, write_gate, token, True, M, MB, DECAY, GATE)
    for receiver in range(R):
        place_here = token * R + receiver
        target = tl.load(receive_positions + place_here * P + p, mask=p < P, other=0.0).to(tl.float32)
        heard = heard_of(mass, total, weights_of(target, centers, precision, half_norm, log_amplitude))
        tl.store(output + place_here * D + d, narrow(heard, output.dtype.element_ty), mask=d < D)
    store_state(mass_after, total_after, sequence, mass, total, True, M, D, MB, DB, False)
