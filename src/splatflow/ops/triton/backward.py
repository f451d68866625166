"""Kernels of the backward pass. Nothing but the inputs is kept for it: weights and states are computed again.

For G, the gradient by the state after a tile, and q = dL/dy_i of its tokens (all with the decays between tokens):

    d read_im  = <q_i, total_im>,     d receive = d read / mass,     d mass_im = -read_im d read_im / mass_im
    d send_jm  = sum_{i >= j} (read_im <q_i, v_j> + d mass_im) + G.mass_m + <G.total_m, v_j>
    d v_j      = sum_{i >= j} <read_i, send_j> q_i + sum_m send_jm G.total_m
    d log_decay_t = <G, state> before the tile - sum_{i < t} of the products that end there, less those that begin there

so what receives needs the states of the past, and what sends the gradients by those of the future. Sums over tokens are
one a program, and added up afterwards: no atomics, and the same bits each time.
"""

# B batch, T token, H head, R receiving heads of one that sends, C token of a tile (i receives, j sends), M splat,
# P position width, D value width

import triton
import triton.language as tl

from .tiles import (
    MIN_MASS,
    cross,
    fading_pairs,
    fading_pairs_of_splats,
    fine_product,
    kept_of,
    known,
    load_fading,
    load_rows,
    load_splats,
    load_state,
    product,
    sequence_of,
    shares,
    store_rows,
    store_state,
    tiles_of,
    tokens_of,
    weigh,
)


@triton.jit
def gate_of(write_gate, row, real, num_heads, M: tl.constexpr, MB: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr):
    """[C, G], what a tile's shares are multiplied by: 0 for tokens that do not exist."""
    if GATE == "none":
        return tl.where(real, 1.0, 0.0)[:, None]
    elif GATE == "head":
        return load_rows(write_gate, row, real, num_heads, 1, 1, C)
    else:
        return load_rows(write_gate, row, real, num_heads, M, MB, C)


@triton.jit
def masses_of(send, steps, kept, mass, C: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr):
    """Masses [C, M] of a tile that begins with `mass`."""
    if DECAY == "splat":
        sent = tl.sum(fading_pairs_of_splats(steps, C) * known(send)[None, :, :], 1)
    else:
        sent = fine_product(fading_pairs(steps, C, 0, DECAY), known(send), PRECISION)
    return kept * mass[None, :] + sent


@triton.jit
def read_gradients(
    q, value, send, steps, kept, read, masses, total_turned,
    C: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients by `read` and by the masses, [C, M], of a tile that begins with `total_turned` [D, M]."""
    heard = product(q, tl.trans(value), PRECISION)  # [i, j]
    if DECAY == "splat":
        d_read = tl.sum(heard[:, :, None] * (fading_pairs_of_splats(steps, C) * send[None, :, :]), 1)
    else:
        d_read = product(heard * fading_pairs(steps, C, 0, DECAY), send, PRECISION)
    d_read += kept * product(q, total_turned, PRECISION)
    return d_read, tl.where(masses >= MIN_MASS, -d_read * read / tl.maximum(masses, MIN_MASS), 0.0)


@triton.jit
def prepare_kernel(
    send_positions, receive_positions, values, output_gradient, scaled, precision, half_norm, log_amplitude,
    log_decay, write_gate, mass_before, total_before, kept_masses, kept_totals,
    segment_mass, segment_total, segment_decay,
    table, num_tokens, num_heads, num_segments, num_kept, num_tiles,
    M: tl.constexpr, P: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, PB: tl.constexpr, DB: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, EVERY: tl.constexpr, ALONE: tl.constexpr, TIED: tl.constexpr,
    DECAY: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Forwards through each segment: the state before each EVERY-th tile, and what the segment adds to the gradient
    by the state before it (not if it is ALONE).

    Reads P + D numbers (with segments, all of a token: P or 2 P and 2 D), and writes M D in bf16 (fp32 unless bf16 is
    multiplied) and M in fp32 for EVERY C tokens: with 128 of these 256 + 66 bytes, with segments 384 or 512 + 66, and
    256 + 256 R + 66 if R heads receive from one that sends.
    """
    program = tl.program_id(0)
    head, first, num_here = tokens_of(program, table, num_tokens, num_heads, num_segments, num_tiles, C)
    centers, precision, half_norm, log_amplitude = load_splats(
        scaled, precision, half_norm, log_amplitude, head, M, P, MB, PB
    )
    mass, total = load_state(mass_before, total_before, program, M, D, MB, DB, True)  # [D, M]
    kept_first, kept_stride = kept_of(program, table, num_heads, num_kept)
    fading = tl.zeros([MB], tl.float32)
    mass_gradient, total_gradient = tl.zeros([MB], tl.float32), tl.zeros([DB, MB], tl.float32)
    for tile in range(tiles_of(num_here, num_tiles, C)):
        number = kept_first + tile // EVERY * kept_stride
        store_state(kept_masses, kept_totals, number, mass, total, tile % EVERY == 0, M, D, MB, DB, True)
        real = tile * C + tl.arange(0, C) < num_here
        row = first + tile * C * num_heads
        _, share = weigh(
            send_positions, row, real, num_heads, centers, precision, half_norm, log_amplitude, P, PB, C, PRECISION
        )
        value = load_rows(values, row, real, num_heads, D, DB, C)
        send = share * gate_of(write_gate, row, real, num_heads, M, MB, C, GATE)
        steps, kept, left, faded = load_fading(log_decay, row, real, num_heads, M, MB, C, DECAY)
        if not ALONE:
            masses = masses_of(send, steps, kept, mass, C, DECAY, PRECISION)
            since = kept * tl.exp(fading)[None, :]  # what is left of the state before the segment
            for receiver in range(R):
                heard_row = row * R + receiver
                if TIED:
                    receive = share
                else:
                    _target, receive = weigh(
                        receive_positions, heard_row, real, num_heads * R, centers, precision, half_norm, log_amplitude,
                        P, PB, C, PRECISION,
                    )  # fmt: skip
                q = load_rows(output_gradient, heard_row, real, num_heads * R, D, DB, C)
                read = receive / tl.maximum(masses, MIN_MASS)
                _d_read, d_masses = read_gradients(
                    q, value, send, steps, kept, read, masses, total, C, DECAY, PRECISION
                )
                mass_gradient += tl.sum(since * d_masses, 0)
                total_gradient += product(tl.trans(q), since * read, PRECISION)
            fading += faded
        mass = mass * tl.exp(faded) + tl.sum(send * left, 0)
        total = total * tl.exp(faded)[None, :] + product(tl.trans(value), send * left, PRECISION)
    if not ALONE:
        store_state(segment_mass, segment_total, program, mass_gradient, total_gradient, True, M, D, MB, DB, True)
        m = tl.arange(0, MB)
        tl.store(segment_decay + program.to(tl.int64) * M + m, fading, mask=m < M)


@triton.jit
def through_shares(share, gradient):
    """From the gradient by a softmax to that by what it was taken of."""
    weighted = share * gradient
    return weighted - share * tl.sum(weighted, 1)[:, None]


@triton.jit
def store_splat_gradients(
    scaled_gradient, precision_gradient, affinity_gradient, program, d_scaled, d_precision, d_affinity,
    M: tl.constexpr, P: tl.constexpr, MB: tl.constexpr, PB: tl.constexpr,
):  # fmt: skip
    """Of one program: gradients by center / sigma^2 (here [P, M]), by 1 / sigma^2, and by the log-affinity itself."""
    m, p = tl.arange(0, MB), tl.arange(0, PB)
    at = program.to(tl.int64) * M + m
    tl.store(scaled_gradient + at[None, :] * P + p[:, None], d_scaled, mask=(m < M)[None, :] & (p < P)[:, None])
    tl.store(precision_gradient + at, d_precision, mask=m < M)
    tl.store(affinity_gradient + at, d_affinity, mask=m < M)


@triton.jit
def mix_backward_kernel(
    send_positions, receive_positions, values, output_gradient, scaled, precision, half_norm, log_amplitude,
    log_decay, write_gate, kept_masses, kept_totals, mass_after, total_after,
    d_send_positions, d_receive_positions, d_values, d_log_decay, d_write_gate,
    d_scaled, d_precision, d_affinity, d_mass, d_total,
    table, num_tokens, num_heads, num_segments, num_kept, num_tiles,
    M: tl.constexpr, P: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, PB: tl.constexpr, DB: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, EVERY: tl.constexpr, TIED: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Backwards through each segment, from the gradient by the state after it (`mass_after`, `total_after`).

    Reads P (tied) or 2 P and 2 D numbers and the kept states, writes P or 2 P and D: 640 or 896 bytes, the floor, and
    66; if R heads receive from one that sends 512 + 384 R, for the gradients by what is sent are summed over them here.
    With `prepare_kernel` 1,028 or 1,284 bytes, 1.6 or 1.4 times the floor; with segments 1,156 or 1,540, 1.8 or
    1.7 times. Between kept states what is sent is weighed again, from the cache, 1.5 times on average.
    """
    program = tl.program_id(0)
    head, first, num_here = tokens_of(program, table, num_tokens, num_heads, num_segments, num_tiles, C)
    sequence, segment, _last = sequence_of(program, table, num_heads, num_segments)
    centers, precision, half_norm, log_amplitude = load_splats(
        scaled, precision, half_norm, log_amplitude, head, M, P, MB, PB
    )
    mass_gradient, total_gradient = load_state(mass_after, total_after, program, M, D, MB, DB, True)  # [D, M]
    kept_first, kept_stride = kept_of(program, table, num_heads, num_kept)
    scaled_sum, precision_sum = tl.zeros([PB, MB], tl.float32), tl.zeros([MB], tl.float32)
    affinity_sum = tl.zeros([MB], tl.float32)
    for tile in range(tiles_of(num_here, num_tiles, C) - 1, -1, -1):
        # the state before the tile, from that before the last kept one
        number = kept_first + tile // EVERY * kept_stride
        mass, total = load_state(kept_masses, kept_totals, number, M, D, MB, DB, True)
        total = total.to(tl.float32)
        for past_tile in range(tile - tile % EVERY, tile):
            past_real = past_tile * C + tl.arange(0, C) < num_here
            past_row = first + past_tile * C * num_heads
            _, past_share = weigh(
                send_positions, past_row, past_real, num_heads, centers, precision, half_norm, log_amplitude,
                P, PB, C, PRECISION,
            )  # fmt: skip
            past_send = past_share * gate_of(write_gate, past_row, past_real, num_heads, M, MB, C, GATE)
            past_value = load_rows(values, past_row, past_real, num_heads, D, DB, C)
            _, _, past_left, past_faded = load_fading(log_decay, past_row, past_real, num_heads, M, MB, C, DECAY)
            mass = mass * tl.exp(past_faded) + tl.sum(past_send * past_left, 0)
            added = product(tl.trans(past_value), past_send * past_left, PRECISION)
            total = total * tl.exp(past_faded)[None, :] + added

        real = tile * C + tl.arange(0, C) < num_here
        row = first + tile * C * num_heads
        place, share = weigh(
            send_positions, row, real, num_heads, centers, precision, half_norm, log_amplitude, P, PB, C, PRECISION
        )
        value = load_rows(values, row, real, num_heads, D, DB, C)
        gate = gate_of(write_gate, row, real, num_heads, M, MB, C, GATE)
        send = share * gate
        steps, kept, left, faded = load_fading(log_decay, row, real, num_heads, M, MB, C, DECAY)
        masses = masses_of(send, steps, kept, mass, C, DECAY, PRECISION)

        # products are taken anew in the other order: turning one into the other miscompiles on Hopper
        d_send = left * (mass_gradient[None, :] + product(value, total_gradient, PRECISION))
        send_turned = shares(
            cross(centers, tl.trans(place), True, PRECISION),
            tl.sum(place * place, 1)[None, :], precision[:, None], half_norm[:, None], log_amplitude[:, None], 0,
        ) * tl.trans(gate)  # fmt: skip
        d_value = tl.zeros([DB, C], tl.float32)  # [D, j], turned as the gradient of the state is
        mass_added, total_added = tl.zeros([MB], tl.float32), tl.zeros([DB, MB], tl.float32)
        unfaded, d_sent = tl.zeros([C, MB], tl.float32), tl.zeros([C, MB], tl.float32)
        for receiver in range(R):
            heard_row = row * R + receiver
            q = load_rows(output_gradient, heard_row, real, num_heads * R, D, DB, C)
            if TIED:
                target, receive = place, share
            else:
                target, receive = weigh(
                    receive_positions, heard_row, real, num_heads * R, centers, precision, half_norm, log_amplitude,
                    P, PB, C, PRECISION,
                )  # fmt: skip
            read = receive / tl.maximum(masses, MIN_MASS)
            d_read, d_masses = read_gradients(q, value, send, steps, kept, read, masses, total, C, DECAY, PRECISION)
            if DECAY == "splat":
                pairs = fading_pairs_of_splats(steps, C)  # [i, j, M]
                heard = product(q, tl.trans(value), PRECISION)
                d_send += tl.sum(pairs * (heard[:, :, None] * read[:, None, :] + d_masses[:, None, :]), 0)
                scores = tl.sum(read[:, None, :] * (pairs * send[None, :, :]), 2)
            else:
                pairs_turned = fading_pairs(steps, C, 1, DECAY)
                d_scores_turned = product(value, tl.trans(q), PRECISION) * pairs_turned  # [j, i]
                d_send += product(d_scores_turned, read, PRECISION) + fine_product(pairs_turned, d_masses, PRECISION)
                scores = product(read, send_turned, PRECISION) * fading_pairs(steps, C, 0, DECAY)
            d_value += product(tl.trans(q), scores, PRECISION)
            mass_added += tl.sum(kept * d_masses, 0)
            total_added += product(tl.trans(q), kept * read, PRECISION)
            # a mean does not change if all of its mass fades alike; a mass below the least one is no mean
            unfaded += tl.where(masses >= MIN_MASS, 0.0, read * d_read)

            d_received = through_shares(receive, d_read / tl.maximum(masses, MIN_MASS))
            if TIED:
                d_sent += d_received
            else:
                drawn = tl.sum(d_received * precision[None, :], 1)[:, None]
                moved = product(d_received, centers, PRECISION) - target * drawn
                store_rows(d_receive_positions, moved, heard_row, real, num_heads * R, P, PB, C)
                scaled_sum += product(tl.trans(target), d_received, PRECISION)
                precision_sum -= 0.5 * tl.sum(d_received * tl.sum(target * target, 1)[:, None], 0)
                affinity_sum += tl.sum(d_received, 0)

        d_value += product(total_gradient, send_turned * tl.trans(left), PRECISION)
        mass_gradient = mass_gradient * tl.exp(faded) + mass_added
        total_gradient = total_gradient * tl.exp(faded)[None, :] + total_added
        store_rows(d_values, tl.trans(d_value), row, real, num_heads, D, DB, C)
        if GATE == "head":
            gate_gradient = tl.sum(share * d_send, 1)[:, None]
            store_rows(d_write_gate, gate_gradient, row, real, num_heads, 1, 1, C)
        elif GATE == "splat":
            store_rows(d_write_gate, share * d_send, row, real, num_heads, M, MB, C)
        if DECAY != "none":
            across = mass_gradient * mass + tl.sum(total_gradient * total, 0)
            passed = unfaded - send * d_send
            d_steps = across[None, :] - (tl.cumsum(passed, 0) - passed)
            if DECAY == "splat":
                store_rows(d_log_decay, d_steps, row, real, num_heads, M, MB, C)
            else:
                store_rows(d_log_decay, tl.sum(d_steps, 1)[:, None], row, real, num_heads, 1, 1, C)

        # from weights to positions and splats
        d_sent += through_shares(share, d_send * gate)
        moved = product(d_sent, centers, PRECISION) - place * tl.sum(d_sent * precision[None, :], 1)[:, None]
        store_rows(d_send_positions, moved, row, real, num_heads, P, PB, C)
        scaled_sum += product(tl.trans(place), d_sent, PRECISION)
        precision_sum -= 0.5 * tl.sum(d_sent * tl.sum(place * place, 1)[:, None], 0)
        affinity_sum += tl.sum(d_sent, 0)
    store_splat_gradients(
        d_scaled, d_precision, d_affinity, program, scaled_sum, precision_sum, affinity_sum, M, P, MB, PB
    )
    store_state(d_mass, d_total, sequence, mass_gradient, total_gradient, segment == 0, M, D, MB, DB, True)


@triton.jit
def weighing_backward_kernel(
    positions, vectors, scaled, precision, half_norm, log_amplitude, write_gate, offsets, contents,
    d_positions, d_vectors, d_write_gate, d_scaled, d_precision, d_affinity,
    table, num_tokens, num_heads, num_segments, num_tiles,
    M: tl.constexpr, P: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, PB: tl.constexpr, DB: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, SENDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Without a causal mask the gradient by a weight is <vector, content> + offset of its token and splat.

    For what receives the vectors are those of the output's gradient; for what sends (SENDS) they are the values, whose
    gradient is wanted, and contents and offsets the gradients by the state. Reads P + D numbers, writes P (and D): 384
    or 512 bytes; with `collect_kernel` for the gradient by the contents (256) 1,152 of both sides, floor 896.
    """
    program = tl.program_id(0)
    head, first, num_here = tokens_of(program, table, num_tokens, num_heads, num_segments, num_tiles, C)
    sequence, _segment, _last = sequence_of(program, table, num_heads, num_segments)
    centers, precision, half_norm, log_amplitude = load_splats(
        scaled, precision, half_norm, log_amplitude, head // R, M, P, MB, PB
    )
    offset, content_turned = load_state(offsets, contents, sequence // R, M, D, MB, DB, True)
    if SENDS:
        _, content = load_state(offsets, contents, sequence // R, M, D, MB, DB, False)
    scaled_sum, precision_sum = tl.zeros([PB, MB], tl.float32), tl.zeros([MB], tl.float32)
    affinity_sum = tl.zeros([MB], tl.float32)
    for tile in range(tiles_of(num_here, num_tiles, C)):
        real = tile * C + tl.arange(0, C) < num_here
        row = first + tile * C * num_heads
        place, share = weigh(
            positions, row, real, num_heads, centers, precision, half_norm, log_amplitude, P, PB, C, PRECISION
        )
        vector = load_rows(vectors, row, real, num_heads, D, DB, C)
        gate = gate_of(write_gate, row, real, num_heads, M, MB, C, GATE)
        d_weight = offset[None, :] + product(vector, content_turned, PRECISION)
        if SENDS:
            store_rows(d_vectors, product(share * gate, content, PRECISION), row, real, num_heads, D, DB, C)
        if GATE == "head":
            store_rows(d_write_gate, tl.sum(share * d_weight, 1)[:, None], row, real, num_heads, 1, 1, C)
        elif GATE == "splat":
            store_rows(d_write_gate, share * d_weight, row, real, num_heads, M, MB, C)
        d_near = through_shares(share, d_weight * gate)
        moved = product(d_near, centers, PRECISION) - place * tl.sum(d_near * precision[None, :], 1)[:, None]
        store_rows(d_positions, moved, row, real, num_heads, P, PB, C)
        scaled_sum += product(tl.trans(place), d_near, PRECISION)
        precision_sum -= 0.5 * tl.sum(d_near * tl.sum(place * place, 1)[:, None], 0)
        affinity_sum += tl.sum(d_near, 0)
    store_splat_gradients(
        d_scaled, d_precision, d_affinity, program, scaled_sum, precision_sum, affinity_sum, M, P, MB, PB
    )
