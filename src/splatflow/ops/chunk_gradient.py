"""The gradient of a block of chunks, written down: unlike that of `mix_chunks` op by op it needs no output.

With q the gradient by the output, dT and dN those by the total and the mass after a chunk, and decay(i, j) within it:

    d read_i  = kept_i total q_i + sum_{j <= i} decay(i, j) <q_i, v_j> send_j
    d mass_i  = -read_i d read_i / mass_i
    d send_j  = left_j (dT v_j + dN) + sum_{i >= j} decay(i, j) (<q_i, v_j> read_i + d mass_i)
    d value_j = left_j dT^T send_j + sum_{i >= j} decay(i, j) <read_i, send_j> q_i

The gradient by a log-decay is the sum of all terms that it scales: of a token before it to one from it on, of the state
before the chunk to a token from it on, of a token before it to the end, and of the state before the chunk to the end.
Each of these sums has small terms if little is left; a difference of larger sums, which is less work, would not.
"""

# B batch, H head, R receiving head of a sending one, N chunk, C token in a chunk, M splat, D value width

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from .decay import log_decay_after, pairwise_decay
from .heads import in_rows
from .splats import MIN_MASS, SplatState

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class ChunkGradients(NamedTuple):
    """By what a block of chunks was given."""

    send: Float[Tensor, "B H N C M"]
    receive: Float[Tensor, "B H N R C M"]
    values: Float[Tensor, "B H N C D"]
    log_decay: Float[Tensor, "B H N C 1"] | None
    state: SplatState


def mix_chunks_gradient(
    send: Float[Tensor, "B H N C M"],
    receive: Float[Tensor, "B H N R C M"],
    values: Float[Tensor, "B H N C D"],
    log_decay: Float[Tensor, "B H N C 1"] | None,
    state: SplatState,
    running_mean: bool,
    d_output: Float[Tensor, "B H N R C D"],
    d_state: SplatState,
) -> ChunkGradients:
    """By the arguments of `mix_chunks`, without a transform and with a decay by heads."""
    fading = _fading(log_decay, send)
    sent = fading.leave(send)
    masses = _sums_after_each(sent.sum(3), state.mass, fading.faded[..., 0])
    totals = _sums_after_each(sent.mT @ values, state.total, fading.faded)
    mass, total = masses[:, :, :-1, None], totals[:, :, :-1]

    sent_here = send.cumsum(3) if log_decay is None else fading.pairs @ send
    mass_here = sent_here + fading.keep(mass)
    divisor = (mass_here.clamp_min(MIN_MASS) if running_mean else torch.ones_like(mass_here))[:, :, :, None]
    read = receive / divisor
    heard = fading.between(in_rows(d_output, values.mT))
    heard_before = in_rows(d_output, total.mT)
    d_read = in_rows(heard, send).add_(fading.keep_each(heard_before))
    d_receive = d_read / divisor
    is_mean = (mass_here >= MIN_MASS) if running_mean else torch.zeros_like(mass_here, dtype=torch.bool)
    d_mass_here = torch.where(is_mean, _together(read * d_receive).neg_(), 0.0)

    d_masses = _sums_after_each(
        fading.keep(d_mass_here).sum(3).flip(2), d_state.mass, fading.faded[..., 0].flip(2)
    ).flip(2)
    d_totals = _sums_after_each(
        _product(fading.keep_each(read), d_output).flip(2), d_state.total, fading.faded.flip(2)
    ).flip(2)
    d_mass_after, d_total_after = d_masses[:, :, 1:, None], d_totals[:, :, 1:]

    d_send = fading.leave((values @ d_total_after.mT).add_(d_mass_after)).add_(_product(heard, read))
    d_send += _later(d_mass_here) if log_decay is None else fading.pairs.mT @ d_mass_here
    scores = in_rows(read, send.mT).tril_()
    faded_scores = scores if log_decay is None else scores * fading.pairs[:, :, :, None]
    d_values = _product(faded_scores, d_output).add_(sent @ d_total_after)
    d_log_decay = None
    if log_decay is not None:
        terms = torch.addcmul(_together(heard * scores), d_mass_here @ send.mT, fading.pairs)  # [i, j]
        between = _later(terms).tril_(-1).sum(-1, keepdim=True)
        from_before = fading.keep(_together(read * heard_before) + d_mass_here * mass).sum(-1, keepdim=True)
        to_the_end = (sent * (values @ d_total_after.mT + d_mass_after)).sum(-1, keepdim=True)
        through = (d_total_after * total).sum((-1, -2), keepdim=True) + (d_mass_after * mass).sum(-1, keepdim=True)
        of_earlier = F.pad(to_the_end[..., :-1, :].cumsum(3), (0, 0, 1, 0))
        d_log_decay = between + _later(from_before) + of_earlier + fading.faded * through
    return ChunkGradients(d_send, d_receive, d_values, d_log_decay, SplatState(d_masses[:, :, 0], d_totals[:, :, 0]))


class Fading(NamedTuple):
    """How much is left. Nothing fades where `kept` and `left` are None."""

    pairs: Float[Tensor, "*B C C"]  # at token i of token j
    kept: Float[Tensor, "B H N C 1"] | None  # at each token, of what was before the chunk
    left: Float[Tensor, "B H N C 1"] | None  # at the end of the chunk, of each token
    faded: Float[Tensor, "#B #H N 1 1"]  # at the end of the chunk, of what was before it

    def between(self, scores: Float[Tensor, "B H N R C C"]) -> Float[Tensor, "B H N R C C"]:
        past = scores.tril_()  # at once: what a late token has too much of is infinite, and no 0 times that
        return past if self.kept is None else past.mul_(self.pairs[:, :, :, None])

    def keep(self, part: Float[Tensor, "B H N C X"]) -> Float[Tensor, "B H N C X"]:
        return part if self.kept is None else part * self.kept

    def keep_each(self, part: Float[Tensor, "B H N R C X"]) -> Float[Tensor, "B H N R C X"]:
        return part if self.kept is None else part * self.kept[:, :, :, None]

    def leave(self, part: Float[Tensor, "B H N C X"]) -> Float[Tensor, "B H N C X"]:
        return part if self.left is None else part * self.left


def _fading(log_decay: Float[Tensor, "B H N C 1"] | None, send: Float[Tensor, "B H N C M"]) -> Fading:
    if log_decay is None:
        return Fading(send.new_ones(1, 1), None, None, send.new_ones(1, 1, send.shape[2], 1, 1))
    return Fading(
        pairwise_decay(log_decay[..., 0]).tril_(),
        log_decay.cumsum(3).exp(),
        log_decay_after(log_decay).exp(),
        log_decay.sum(3, keepdim=True).exp(),
    )


def _together(part: Float[Tensor, "B H N R C X"]) -> Float[Tensor, "B H N C X"]:
    """The sum over the receiving heads of a sending one."""
    return part[:, :, :, 0] if part.shape[3] == 1 else part.sum(3)  # a sum over one would be a copy


def _product(left: Float[Tensor, "B H N R C X"], right: Float[Tensor, "B H N R C Y"]) -> Float[Tensor, "B H N X Y"]:
    """left^T right, summed over tokens and receiving heads."""
    return left.flatten(3, 4).mT @ right.flatten(3, 4)


def _later(part: Float[Tensor, "B H N C X"]) -> Float[Tensor, "B H N C X"]:
    """The sum from each token of a chunk to the last."""
    return part.flip(3).cumsum(3).flip(3)


def _sums_after_each(
    terms: Float[Tensor, "B H N *what"], start: Float[Tensor, "B H *what"], faded: Float[Tensor, "#B #H N *one"]
) -> Float[Tensor, "B H N+1 *what"]:
    """At the start and after each term, what is left of the start and of the terms so far."""
    sums = [start]
    for term, factor in zip(terms.unbind(2), faded.unbind(2), strict=True):
        sums.append(torch.addcmul(term, factor, sums[-1]))
    return torch.stack(sums, 2)
