"""The kernel that decodes a token of the hybrid: the window moves on, and both memories are heard, in one launch."""

# B batch, W token of the window, R receiving heads of a sending one, C token of a tile, M splat, P position width,
# D value width, X any width, G and F numbers of a gate and of a decay

import triton
import triton.language as tl

from .tiles import (
    LOG2_THETA,
    counted,
    heard_of,
    load_rows,
    load_state,
    make_splats,
    narrow,
    store_rows,
    store_state,
    weights_of,
    written,
)


@triton.jit
def keep_row(new, after, token, row, wanted, X: tl.constexpr, XB: tl.constexpr):
    """`X` numbers of the new token, [XB], which go to row `row` of the window after it."""
    x = tl.arange(0, XB)
    numbers = tl.load(new + token * X + x, mask=x < X, other=0.0).to(tl.float32)
    tl.store(after + row * X + x, narrow(numbers, after.dtype.element_ty), mask=(x < X) & wanted)
    return numbers


@triton.jit
def keep_rows(before, after, row, exist, wanted, num_senders, X: tl.constexpr, XB: tl.constexpr, C: tl.constexpr):
    """[C, XB]: a tile of the window after, from row `row` of all on. Before the token its rows came one later."""
    rows = load_rows(before, row + num_senders, exist, num_senders, X, XB, C).to(tl.float32)
    store_rows(after, rows, row, exist & wanted, num_senders, X, XB, C)
    return rows


@triton.jit
def window_step_kernel(
    send_positions, receive_positions, values, real, log_decay, write_gate,
    positions_before, values_before, real_before, log_decay_before, write_gate_before,
    centers, log_scales, log_amplitudes, log_scale, mass_before, total_before,
    near, far, mass_after, total_after,
    positions_after, values_after, real_after, log_decay_after, write_gate_after,
    window_size, num_senders, num_tiles,
    M: tl.constexpr, P: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, PB: tl.constexpr, DB: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """One token of each sequence, all in fp32: what it hears of the window and of the splats, and both after it.

    A program has one receiving head; of the R that share a sender the first writes, and each reads. A program reads the
    rows of the window once, and both hears them and writes them to where they stand after the token.

    Bytes a head, M = P = D = 64, W = 32, bf16, without decay and gate: the window is read and written, 2 x 2 W (P + D),
    16,384; the state too, 2 x 4 (M D + M), 33,280; with the token's own 640 that is 50,304. Were the window a ring that
    changes in place, one row of it would be written, which is the floor: 42,368. But states are left as they were, and
    then all of a ring is written too. A decay or a gate adds 2 x 4 W to a head, or 2 x 4 W M if each splat has its own.
    The splats themselves, 4 (M P + 2 M), are read by all sequences alike. With R heads a sender these bytes are read R
    times, though from the cache, and written once.
    """
    receiver = tl.program_id(0).to(tl.int64)
    head, batch = receiver % (num_senders * R), receiver // (num_senders * R)
    sender, wanted = head // R, head % R == 0
    token = batch * num_senders + sender  # its row among the new tokens
    first = batch * window_size * num_senders + sender  # the oldest row of the window, which is its first
    last = first + (window_size - 1) * num_senders  # and where the token will stand
    G: tl.constexpr = M if GATE == "splat" else 1
    GB: tl.constexpr = MB if GATE == "splat" else 1
    F: tl.constexpr = M if DECAY == "splat" else 1  # numbers of a decay
    FB: tl.constexpr = MB if DECAY == "splat" else 1

    # the token hears itself, real or not: with it the softmax begins
    place = keep_row(send_positions, positions_after, token, last, wanted, P, PB)
    heard = keep_row(values, values_after, token, last, wanted, D, DB)
    if DECAY != "none":
        keep_row(log_decay, log_decay_after, token, last, wanted, F, FB)
    if GATE != "none":
        keep_row(write_gate, write_gate_after, token, last, wanted, G, GB)
    tl.store(real_after + batch * window_size + window_size - 1, tl.load(real + batch), mask=head == 0)
    p, d = tl.arange(0, PB), tl.arange(0, DB)
    target = tl.load(receive_positions + receiver * P + p, mask=p < P, other=0.0).to(tl.float32)
    # rotations turn the pairs (p, p + P / 2): what is added to each number of a pair is the other one, one of them less
    partner = tl.where(p < P // 2, p + P // 2, p - P // 2)
    turned = tl.load(receive_positions + receiver * P + partner, mask=p < P, other=0.0).to(tl.float32)
    turned = tl.where(p < P // 2, -turned, turned)
    sharpness = tl.exp(tl.load(log_scale + head).to(tl.float32)) * P**-0.5
    query, turned = target * sharpness, turned * sharpness
    rate = tl.exp2((p % (P // 2)).to(tl.float32) * (-2.0 / P * LOG2_THETA))
    within = tl.arange(0, C)[:, None] * rate[None, :]
    cos_within, sin_within = tl.cos(within), tl.sin(within)
    most = tl.sum(query * place, 0)
    weight = 1.0

    for tile in range(counted(num_tiles)):
        rows = tile * C + tl.arange(0, C)
        exist = rows < window_size - 1
        row = first + tile * C * num_senders
        key = keep_rows(positions_before, positions_after, row, exist, wanted, num_senders, P, PB, C)
        value = keep_rows(values_before, values_after, row, exist, wanted, num_senders, D, DB, C)
        if DECAY != "none":
            keep_rows(log_decay_before, log_decay_after, row, exist, wanted, num_senders, F, FB, C)
        if GATE != "none":
            keep_rows(write_gate_before, write_gate_after, row, exist, wanted, num_senders, G, GB, C)
        at = batch * window_size + rows
        known = tl.load(real_before + at + 1, mask=exist, other=0)
        tl.store(real_after + at, known, mask=exist & (head == 0))

        # the query is turned by its distance from each key: from the first of the tile, and back by the steps within
        angle = rate * (window_size - 1 - tile * C)
        along = query * tl.cos(angle) + turned * tl.sin(angle)
        across = turned * tl.cos(angle) - query * tl.sin(angle)
        turned_query = along[None, :] * cos_within - across[None, :] * sin_within
        scores = tl.where(exist & (known != 0), tl.sum(key * turned_query, 1), -float("inf"))
        more = tl.maximum(most, tl.max(scores, 0))
        weights, faded = tl.exp(scores - more), tl.exp(most - more)
        heard = heard * faded + tl.sum(weights[:, None] * value, 0)
        weight = weight * faded + tl.sum(weights, 0)
        most = more
    tl.store(near + receiver * D + d, narrow(heard / weight, near.dtype.element_ty), mask=d < D)

    # the oldest token goes to the splats
    leaves = tl.load(real_before + batch * window_size) != 0
    place = tl.load(positions_before + first * P + p, mask=(p < P) & leaves, other=0.0).to(tl.float32)
    value = tl.load(values_before + first * D + d, mask=(d < D) & leaves, other=0.0).to(tl.float32)
    centers, precision, half_norm, log_amplitude = make_splats(
        centers, log_scales, log_amplitudes, sender, M, P, MB, PB
    )
    send = weights_of(place, centers, precision, half_norm, log_amplitude)
    receive = weights_of(target, centers, precision, half_norm, log_amplitude)
    mass, total = load_state(mass_before, total_before, token, M, D, MB, DB, False)
    mass, total = written(
        mass, total, send, value, log_decay_before, write_gate_before, first, leaves, M, MB, DECAY, GATE
    )
    mixed = heard_of(mass, total, receive)
    tl.store(far + receiver * D + d, narrow(mixed, far.dtype.element_ty), mask=d < D)
    store_state(mass_after, total_after, token, mass, total, wanted, M, D, MB, DB, False)
