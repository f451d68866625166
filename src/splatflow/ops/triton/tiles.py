"""What kernels make of one tile: products, weights, decays. All sums are in fp32.

A tile is padded to powers of 2, of at least 16. A padded splat has the log-amplitude -inf, so its share is 0; a padded
token sends nothing.
"""

# C token of a tile (i receives, j sends), M splat, P position width, D value width, X any width, G number of decays or
# gates a token: 1 (per head) or M (per splat)

import math

import triton
import triton.language as tl

from .. import affinity, splats, window

IS_INTERPRETED: bool = triton.knobs.runtime.interpret
INTERPRETED = tl.constexpr(IS_INTERPRETED)
FARTHEST = tl.constexpr(affinity.FARTHEST)
MIN_MASS = tl.constexpr(splats.MIN_MASS)
LOG2_THETA = tl.constexpr(math.log2(window.THETA))


@triton.jit
def tokens_of(program, table, num_tokens, num_heads, num_segments, num_tiles, C: tl.constexpr):
    """What a program works on: its head, the row of its first token (of all tokens and heads), and how many there are
    from there on.

    Programs are numbered by (sequence, head, segment). Packed documents have a `table` [Q, 6] with a row for each
    segment, and programs are numbered by (segment, head): what there is once a segment and head lies in that order.
    """
    if table is None:
        segment, sequence = program % num_segments, program // num_segments
        head, batch = sequence % num_heads, sequence // num_heads
        start = segment * num_tiles * C
        return head, (batch.to(tl.int64) * num_tokens + start) * num_heads + head, num_tokens - start
    else:
        entry, head = table + program // num_heads * 6, program % num_heads
        return head, tl.load(entry).to(tl.int64) * num_heads + head, tl.load(entry + 1)


@triton.jit
def sequence_of(program, table, num_heads, num_segments):
    """The number of a program's sequence (or document) and head, which of the segments there it has, and the last."""
    if table is None:
        return program // num_segments, program % num_segments, num_segments - 1
    else:
        entry, head = table + program // num_heads * 6, program % num_heads
        return tl.load(entry + 2) * num_heads + head, tl.load(entry + 3), tl.load(entry + 4)


@triton.jit
def kept_of(program, table, num_heads, num_kept):
    """The number of the first state that is kept of a program's segment, and how far it is from one to the next."""
    if table is None:
        return program * num_kept, 1
    else:
        return tl.load(table + program // num_heads * 6 + 5) * num_heads + program % num_heads, num_heads


@triton.jit
def counted(number):
    """A number as what a loop runs to: the interpreter counts to none but Python's own."""
    if INTERPRETED:
        return number.handle.data.item()
    else:
        return number


@triton.jit
def tiles_of(num_here, num_tiles, C: tl.constexpr):
    """How many tiles a program walks, that has a segment of `num_tiles` at most."""
    return counted(tl.minimum(num_tiles, tl.cdiv(num_here, C)))


@triton.jit
def nearest(part, DROPPED: tl.constexpr):
    """fp32 numbers rounded to the nearest that end in so many zeros."""
    bits = part.to(tl.int32, bitcast=True)
    bits += (1 << (DROPPED - 1)) - 1 + ((bits >> DROPPED) & 1)
    return ((bits >> DROPPED) << DROPPED).to(tl.float32, bitcast=True)


@triton.jit
def narrow(part, DTYPE: tl.constexpr):
    """fp32 numbers in another type. The interpreter would cut digits off, so there they are rounded before."""
    if INTERPRETED:
        if tl.bfloat16 == DTYPE:
            part = nearest(part, 16)
        elif tl.float16 == DTYPE:
            part = nearest(part, 13)
    return part.to(DTYPE)


@triton.jit
def product(left, right, PRECISION: tl.constexpr):
    """left @ right. "bf16" rounds what it multiplies, which the interpreter's own product of bf16 does not manage."""
    left, right = left.to(tl.float32), right.to(tl.float32)
    if PRECISION == "bf16":
        left, right = narrow(left, tl.bfloat16), narrow(right, tl.bfloat16)
        if INTERPRETED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        return tl.dot(left, right)
    else:
        return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def fine_product(left, right, PRECISION: tl.constexpr):
    """left @ right where 8 bits are too few: sums of masses and what is subtracted from each other."""
    return product(left, right, "tf32" if PRECISION == "bf16" else PRECISION)


@triton.jit
def cross(left, right, SPLATS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """Positions times centers, of which positions are exact in the narrow type, and centers are the sum of two such."""
    if PRECISION == "bf16":
        if SPLATS_FIRST:
            rest = product(left - narrow(left, tl.bfloat16).to(tl.float32), right, PRECISION)
        else:
            rest = product(left, right - narrow(right, tl.bfloat16).to(tl.float32), PRECISION)
        return product(left, right, PRECISION) + rest
    else:
        return product(left, right, "tf32x3" if PRECISION == "tf32" else PRECISION)


@triton.jit
def shares(crossed, squared_norm, precision, half_norm, log_amplitude, AXIS: tl.constexpr):
    """The posterior of the mixture, softmax over splats (along AXIS) of their log-affinities: `ops/affinity.py`."""
    near = crossed - 0.5 * precision * squared_norm - half_norm
    near = tl.where(near > 0.0, 0.0, near)  # chosen by comparing, which lets NaN through
    affinity = log_amplitude + tl.where(near < FARTHEST, FARTHEST, near)
    shared = tl.exp(affinity - tl.max(affinity, AXIS, keep_dims=True))
    return shared / tl.sum(shared, AXIS, keep_dims=True)


@triton.jit
def weights_of(place, centers, precision, half_norm, log_amplitude):
    """How much one token [P] sends to each splat, or receives from it, [M]."""
    return shares(tl.sum(centers * place[None, :], 1), tl.sum(place * place, 0), precision, half_norm, log_amplitude, 0)


@triton.jit
def written(
    mass, total, send, value, log_decay, write_gate, row, real,
    M: tl.constexpr, MB: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Mass and total after one more token, whose decay and gate are row `row` of all; the same if it is not real."""
    m = tl.arange(0, MB)
    if GATE == "head":
        send *= tl.load(write_gate + row).to(tl.float32)
    elif GATE == "splat":
        send *= tl.load(write_gate + row * M + m, mask=m < M, other=0.0).to(tl.float32)
    if DECAY == "head":
        kept = tl.exp(tl.where(real, tl.load(log_decay + row).to(tl.float32), 0.0))
        mass, total = mass * kept, total * kept
    elif DECAY == "splat":
        kept = tl.exp(tl.load(log_decay + row * M + m, mask=(m < M) & real, other=0.0).to(tl.float32))
        mass, total = mass * kept, total * kept[:, None]
    send = tl.where(real, send, 0.0)
    return mass + send, total + send[:, None] * value[None, :]


@triton.jit
def heard_of(mass, total, receive):
    """What a token that receives so hears of the means, [D]."""
    read = receive / tl.maximum(mass, MIN_MASS)
    return tl.sum(read[:, None] * total, 0)


@triton.jit
def load_rows(pointer, row, real, num_heads, X: tl.constexpr, XB: tl.constexpr, C: tl.constexpr):
    """[C, XB]: `X` numbers of each token of a tile whose first token and head is row `row` of all; 0 if not real."""
    token, x = tl.arange(0, C)[:, None], tl.arange(0, XB)[None, :]
    return tl.load(pointer + row * X + token * (num_heads * X) + x, mask=real[:, None] & (x < X), other=0.0)


@triton.jit
def weigh(
    positions, row, real, num_heads, centers, precision, half_norm, log_amplitude,
    P: tl.constexpr, PB: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a tile: its positions [C, PB] and their shares [C, MB]."""
    place = load_rows(positions, row, real, num_heads, P, PB, C).to(tl.float32)
    crossed = cross(place, tl.trans(centers), False, PRECISION)
    squared = tl.sum(place * place, 1)[:, None]
    return place, shares(crossed, squared, precision[None, :], half_norm[None, :], log_amplitude[None, :], 1)


@triton.jit
def store_rows(pointer, rows, row, real, num_heads, X: tl.constexpr, XB: tl.constexpr, C: tl.constexpr):
    """The other way."""
    token, x = tl.arange(0, C)[:, None], tl.arange(0, XB)[None, :]
    at = pointer + row * X + token * (num_heads * X) + x
    tl.store(at, narrow(rows, pointer.dtype.element_ty), mask=real[:, None] & (x < X))


@triton.jit
def load_splats(
    scaled, precision, half_norm, log_amplitude, head,
    M: tl.constexpr, P: tl.constexpr, MB: tl.constexpr, PB: tl.constexpr,
):  # fmt: skip
    """Of one head: center / sigma^2 [MB, PB], and 1 / sigma^2, |center|^2 / (2 sigma^2), log-amplitude [MB]."""
    m, p = tl.arange(0, MB), tl.arange(0, PB)
    at = head * M + m
    centers = tl.load(scaled + at[:, None] * P + p[None, :], mask=(m < M)[:, None] & (p < P)[None, :], other=0.0)
    return (
        centers,
        tl.load(precision + at, mask=m < M, other=0.0),
        tl.load(half_norm + at, mask=m < M, other=0.0),
        tl.load(log_amplitude + at, mask=m < M, other=-float("inf")),
    )


@triton.jit
def make_splats(
    centers, log_scales, log_amplitudes, head,
    M: tl.constexpr, P: tl.constexpr, MB: tl.constexpr, PB: tl.constexpr,
):  # fmt: skip
    """What `load_splats` gives, made of the splats themselves."""
    m, p = tl.arange(0, MB), tl.arange(0, PB)
    at = head * M + m
    inside = (m < M)[:, None] & (p < P)[None, :]
    center = tl.load(centers + at[:, None] * P + p[None, :], mask=inside, other=0.0).to(tl.float32)
    precision = tl.exp(-2.0 * tl.load(log_scales + at, mask=m < M, other=0.0).to(tl.float32))
    half_norm = 0.5 * precision * tl.sum(center * center, 1)
    log_amplitude = tl.load(log_amplitudes + at, mask=m < M, other=-float("inf")).to(tl.float32)
    return center * precision[:, None], precision, half_norm, log_amplitude


@triton.jit
def load_state(
    mass, total, number, M: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, DB: tl.constexpr, TURNED: tl.constexpr
):
    """State number `number` of many: mass [MB], and total [MB, DB], or [DB, MB] if turned."""
    m, d = tl.arange(0, MB), tl.arange(0, DB)
    at = number.to(tl.int64) * M
    if TURNED:
        places, inside = m[None, :] * D + d[:, None], (m < M)[None, :] & (d < D)[:, None]
    else:
        places, inside = m[:, None] * D + d[None, :], (m < M)[:, None] & (d < D)[None, :]
    return (
        tl.load(mass + at + m, mask=m < M, other=0.0),
        tl.load(total + at * D + places, mask=inside, other=0.0),
    )


@triton.jit
def store_state(
    mass, total, number, mass_here, total_here, wanted,
    M: tl.constexpr, D: tl.constexpr, MB: tl.constexpr, DB: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """The other way, if it is wanted."""
    m, d = tl.arange(0, MB), tl.arange(0, DB)
    at = number.to(tl.int64) * M
    if TURNED:
        places, inside = m[None, :] * D + d[:, None], (m < M)[None, :] & (d < D)[:, None]
    else:
        places, inside = m[:, None] * D + d[None, :], (m < M)[:, None] & (d < D)[None, :]
    tl.store(mass + at + m, mass_here, mask=(m < M) & wanted)
    tl.store(total + at * D + places, narrow(total_here, total.dtype.element_ty), mask=inside & wanted)


@triton.jit
def load_fading(
    log_decay, row, real, num_heads, M: tl.constexpr, MB: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr
):
    """Of a tile: its log-decays [C, G], what is left at each token of what was before the tile, what is left of each
    token at the end of the tile (both [C, G]), and the log of what is left then of what was before [G].
    """
    token = tl.arange(0, C)
    if DECAY == "none":
        one = tl.full([C, 1], 1.0, tl.float32)
        return tl.zeros([C, 1], tl.float32), one, one, tl.zeros([1], tl.float32)
    elif DECAY == "head":
        at = log_decay + row + token * num_heads
        steps = tl.load(at, mask=real, other=0.0)
        later = tl.load(at + num_heads, mask=token + 1 < tl.sum(real.to(tl.int32), 0), other=0.0)
        kept, left = tl.exp(tl.cumsum(steps, 0)), tl.exp(tl.cumsum(later, 0, reverse=True))
        return steps[:, None], kept[:, None], left[:, None], tl.sum(steps[:, None], 0)
    else:
        m = tl.arange(0, MB)[None, :]
        at = log_decay + row * M + token[:, None] * (num_heads * M) + m
        steps = tl.load(at, mask=real[:, None] & (m < M), other=0.0)
        next_real = token + 1 < tl.sum(real.to(tl.int32), 0)
        later = tl.load(at + num_heads * M, mask=next_real[:, None] & (m < M), other=0.0)
        return steps, tl.exp(tl.cumsum(steps, 0)), tl.exp(tl.cumsum(later, 0, reverse=True)), tl.sum(steps, 0)


@triton.jit
def fading_pairs(steps, C: tl.constexpr, AXIS: tl.constexpr, DECAY: tl.constexpr):
    """decay(i, j) [i, j] of one head, of its log-decays [C, 1], or [j, i] if AXIS, that of i, is 1; 0 for j > i.

    Sums are taken from j to i and not as differences, so they are at most 0 and exact however strong the decay.
    """
    t, j = tl.arange(0, C), tl.arange(0, C)
    if DECAY == "none":
        past = t[:, None] >= j[None, :] if AXIS == 0 else t[None, :] >= j[:, None]
        return tl.where(past, 1.0, 0.0)
    elif AXIS == 0:
        reached = tl.where(t[:, None] > j[None, :], steps, 0.0)
        return tl.where(t[:, None] >= j[None, :], tl.exp(tl.cumsum(reached, 0)), 0.0)
    else:
        reached = tl.where(t[None, :] > j[:, None], tl.reshape(steps, (1, C)), 0.0)
        return tl.where(t[None, :] >= j[:, None], tl.exp(tl.cumsum(reached, 1)), 0.0)


@triton.jit
def fading_pairs_of_splats(steps, C: tl.constexpr):
    """decay_m(i, j) [i, j, M], of log-decays [C, M]; 0 for j > i."""
    t, j = tl.arange(0, C)[:, None, None], tl.arange(0, C)[None, :, None]
    return tl.where(t >= j, tl.exp(tl.cumsum(tl.where(t > j, steps[:, None, :], 0.0), 0)), 0.0)


@triton.jit
def known(weights):
    """Weights, 0 where they are not a number: a product with 0 would carry it from the future into the past."""
    return tl.where(weights == weights, weights, 0.0)
