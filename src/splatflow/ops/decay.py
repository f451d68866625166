"""Sums that forget: the arithmetic of decays, without ever dividing by one.

A decay between two tokens is exp(sum of the log-decays after the first, up to and including the second). Taken as a
quotient of two running products it overflows or cancels; here every exponent is a sum of log-decays (<= 0), so a
factor lies in [0, 1], and strong and weak forgetting are equally exact.
"""

# B batch, H head, N chunk, C token in a chunk, M splat (1 if all splats of a head forget alike)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def decayed_cumsum(terms: Float[Tensor, "... C M"], log_decay: Float[Tensor, "... C #M"]) -> Float[Tensor, "... C M"]:
    """y_i = exp(log_decay_i) y_{i-1} + terms_i along the next to last axis, by doubling: log2(C) passes.

    Example:
        >>> decayed_cumsum(torch.ones(3, 1), torch.full((3, 1), 0.5).log()).flatten()
        tensor([1.0000, 1.5000, 1.7500])
    """
    span = 1
    while span < terms.shape[-2]:
        carried = terms[..., :-span, :] * log_decay[..., span:, :].exp()
        terms = torch.cat([terms[..., :span, :], terms[..., span:, :] + carried], -2)
        longer = log_decay[..., span:, :] + log_decay[..., :-span, :]  # the sum over twice the span
        log_decay = torch.cat([log_decay[..., :span, :], longer], -2)
        span *= 2
    return terms


def log_decay_after(log_decay: Float[Tensor, "... C M"]) -> Float[Tensor, "... C M"]:
    """Sum of the log-decays of all later tokens: what is left of token j at the end, as a logarithm."""
    later = log_decay[..., 1:, :].flip(-2).cumsum(-2).flip(-2)
    return torch.cat([later, torch.zeros_like(log_decay[..., :1, :])], -2)


def pairwise_decay(log_decay: Float[Tensor, "... C"]) -> Float[Tensor, "... C C"]:
    """decay(i, j) = exp(sum_{j < t <= i} log_decay_t) for j <= i, and 1 for j > i."""
    length = log_decay.shape[-1]
    after = torch.ones(length, length, dtype=torch.bool, device=log_decay.device).tril(-1)  # row t, column j: t > j
    sums = log_decay[..., None].expand(*log_decay.shape, length).masked_fill(~after, 0.0).cumsum(-2)
    return sums.exp()


def decayed_scores(
    read: Float[Tensor, "... C M"], send: Float[Tensor, "... C M"], log_decay: Float[Tensor, "... C #M"]
) -> Float[Tensor, "... C C"]:
    """scores_ij = sum_m read_im decay_m(i, j) send_jm for j <= i, and 0 for j > i.

    If all splats forget alike the decay stands outside the sum. If each has its own, the pairs are sorted by where
    their paths part: i and j lie in the right and left half of just one block of a binary tree, and the decay between
    them is (from j to the middle) times (from the middle to i), which is one matrix product a level.
    """
    if log_decay.shape[-1] == 1:
        return ((read @ send.mT) * pairwise_decay(log_decay[..., 0])).tril()
    length = read.shape[-2]
    index = torch.arange(length, device=read.device)
    scores = torch.diag_embed((read * send).sum(-1))
    half = 1
    while half < length:
        since, until = sums_within_blocks(log_decay, half)
        level = (read * since.exp()) @ (send * until.exp()).mT
        block = index // half
        parts_here = (block[:, None] % 2 == 1) & (block[None, :] == block[:, None] - 1)
        scores = torch.where(parts_here, level, scores)
        half *= 2
    return scores


def sums_within_blocks(
    log_decay: Float[Tensor, "... C M"], size: int
) -> tuple[Float[Tensor, "... C M"], Float[Tensor, "... C M"]]:
    """In blocks of `size` tokens: the sum from the block's start to a token, and from after it to the block's end."""
    length = log_decay.shape[-2]
    padded = torch.nn.functional.pad(log_decay, (0, 0, 0, -length % size)).unflatten(-2, (-1, size))
    since, until = padded.cumsum(-2), log_decay_after(padded)
    return since.flatten(-3, -2)[..., :length, :], until.flatten(-3, -2)[..., :length, :]
