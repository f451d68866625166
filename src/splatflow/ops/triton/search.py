"""The kernel of the lattice's search: the best p of K x K splats of each token, of which only 2 K are looked at.

The rule is that of `ops/search.py`. A score and its number are one integer, so the largest of such integers is the
largest score, and of equals the one of the lower number; what was taken is less than all of them.
"""

# B batch, T token, H head, N = B H, C token of a tile, K point of half a lattice, P width of half a position,
# L place among the best (L >= p, a power of 2)

import triton
import triton.language as tl

from .tiles import load_rows, product

LEAST = tl.constexpr(-3.4028234663852886e38)  # of fp32: what is infinitely far counts as so far
TAKEN = tl.constexpr(-(2**63))
NAN_BITS = tl.constexpr(2**31 - 1)  # of a NaN, and more than those of any number


@triton.jit
def ranked(scores, numbers):
    """A score and its number as one integer. NaN is the largest, as it is to torch, and -0 is 0."""
    scores = tl.where(scores < LEAST, LEAST, scores)
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ NAN_BITS, bits)  # of negative numbers the larger one has the smaller bits
    bits = tl.where(scores == scores, bits, NAN_BITS)
    return bits.to(tl.int64) * 4294967296 - numbers


@triton.jit
def number_of(best):
    """The number in such an integer."""
    return (0 - best) & 4294967295


@triton.jit
def score_of(best):
    """The score in such an integer. What is as far as can be may have been farther: plus anything it stays there."""
    bits = ((best + number_of(best)) >> 32).to(tl.int32)
    scores = tl.where(bits < 0, bits ^ NAN_BITS, bits).to(tl.float32, bitcast=True)
    return tl.where(scores == LEAST, -float("inf"), scores)


@triton.jit
def largest(candidates, COUNT: tl.constexpr, L: tl.constexpr):
    """The largest `COUNT` in each row of such integers, the first of all first, [C, L]; the rest is `TAKEN`."""
    slot = tl.arange(0, L)[None, :]
    found = tl.full([candidates.shape[0], L], TAKEN, tl.int64)
    for place in tl.static_range(COUNT):
        top = tl.max(candidates, 1, keep_dims=True)
        found = tl.where(slot == place, top, found)
        candidates = tl.where(candidates == top, TAKEN, candidates)
    return found


@triton.jit
def best_of_half(
    positions, factors, bias, half, head, row, real, num_heads,
    P: tl.constexpr, K: tl.constexpr, PB: tl.constexpr, KB: tl.constexpr, C: tl.constexpr,
    COUNT: tl.constexpr, L: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The best points of one half of the space for each token of a tile, as integers [C, L]."""
    k, x = tl.arange(0, KB), tl.arange(0, PB)
    token = tl.arange(0, C)[:, None]
    at = factors + ((head * 2 + half) * K + k) * (P + 2)
    scaled = tl.load(at[None, :] + x[:, None], mask=(k < K)[None, :] & (x < P)[:, None], other=0.0)  # [PB, KB]
    curvature = tl.load(at + P, mask=k < K, other=0.0)[None, :]
    constant = tl.load(at + P + 1, mask=k < K, other=0.0)[None, :]
    # half a row of positions is a row of half the width, of twice as many heads
    place = load_rows(positions, 2 * row + half, real, 2 * num_heads, P, PB, C).to(tl.float32)
    squared = tl.sum(place * place, 1)[:, None]
    scores = product(place, scaled, PRECISION) + (curvature * squared + constant)
    if BIASED:
        inside = real[:, None] & (k < K)[None, :]
        preferences = bias + (2 * row + half) * K + token * (2 * num_heads * K) + k[None, :]
        scores += tl.load(preferences, mask=inside, other=0.0).to(tl.float32)
    return largest(tl.where((k < K)[None, :], ranked(scores, k[None, :]), TAKEN), COUNT, L)


@triton.jit
def best_pairs_kernel(
    positions, factors, bias, in_first, in_second, num_tokens, num_heads,
    P: tl.constexpr, K: tl.constexpr, PB: tl.constexpr, KB: tl.constexpr, C: tl.constexpr,
    TOP_P: tl.constexpr, L: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The best p pairs of points of each token, as the places in both halves. A program has a tile of one sequence.

    Reads 2 P numbers a token, with a bias 2 K more, and writes 2 p int64: 128 + 64 bytes for P = 32 in bf16 and p = 4,
    which is the floor; a tile also reads the factors, 2 K (P + 2) numbers of fp32, which the cache of the GPU holds.
    Operations: 4 K P for the products, three times where they are in three parts, and 2 p K + p L^2 to compare.
    """
    tiles = tl.cdiv(num_tokens, C)
    tile, sequence = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, batch = sequence % num_heads, sequence // num_heads
    token = tile * C + tl.arange(0, C)
    real = token < num_tokens
    row = (batch.to(tl.int64) * num_tokens + tile * C) * num_heads + head
    COUNT: tl.constexpr = TOP_P if TOP_P < K else K
    first = best_of_half(
        positions, factors, bias, 0, head, row, real, num_heads,
        P, K, PB, KB, C, COUNT, L, BIASED, PRECISION,
    )  # fmt: skip
    second = best_of_half(
        positions, factors, bias, 1, head, row, real, num_heads,
        P, K, PB, KB, C, COUNT, L, BIASED, PRECISION,
    )  # fmt: skip
    i, j = tl.arange(0, L)[None, :, None], tl.arange(0, L)[None, None, :]
    sums = score_of(first)[:, :, None] + score_of(second)[:, None, :]
    # a pair has (i + 1) (j + 1) - 1 before it
    possible = ((i + 1) * (j + 1) <= TOP_P) & (i < COUNT) & (j < COUNT)
    candidates = tl.where(possible, ranked(sums, i * L + j), TAKEN)
    pairs = number_of(largest(tl.reshape(candidates, (C, L * L)), TOP_P, L))  # [C, L]

    slot = tl.arange(0, L)[None, :]
    # the slot of each of the best pairs [C, L, 1], among the slots of the halves [1, 1, L]
    chosen = slot[:, None, :] == (pairs // L)[:, :, None]
    a = tl.sum(tl.where(chosen, number_of(first)[:, None, :], 0), 2)
    chosen = slot[:, None, :] == (pairs % L)[:, :, None]
    b = tl.sum(tl.where(chosen, number_of(second)[:, None, :], 0), 2)
    at = (row + tl.arange(0, C) * num_heads)[:, None] * TOP_P + slot
    tl.store(in_first + at, a, mask=real[:, None] & (slot < TOP_P))
    tl.store(in_second + at, b, mask=real[:, None] & (slot < TOP_P))
