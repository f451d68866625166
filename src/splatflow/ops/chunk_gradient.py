"""The gradient of a block of chunks, written down: half of what differentiating `mix_chunks` op by op would touch.

With q the gradient by the output, dT and dN those by the total and the mass after a chunk, and decay(i, j) within it:

    d read_i  = kept_i total q_i + sum_{j <= i} decay(i, j) <q_i, v_j> send_j
    d mass_i  = -read_i d read_i / mass_i
    d send_j  = left_j (dT v_j + dN) + sum_{i >= j} decay(i, j) (<q_i, v_j> read_i + d mass_i)
    d value_j = left_j dT^T send_j + sum_{i >= j} decay(i, j) <read_i, send_j> q_i

A token that forgets scales all before it: what arrives at a later token of earlier ones is, over all splats,
<read_i, d read_i> + <mass_i, d mass_i>, which is 0 for means, and each token takes its own part <send_j, d send_j> out.
"""

# B batch, S source token, H head, N chunk, C token in a chunk, M splat, D value width

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from .decay import log_decay_after, pairwise_decay
from .splats import MIN_MASS, SplatState

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class ChunkGradients(NamedTuple):
    """By what a block of chunks was given."""

    send: Float[Tensor, "B H N C M"]
    receive: Float[Tensor, "B H N C M"]
    values: Float[Tensor, "B H N C D"]
    log_decay: Float[Tensor, "B H N C 1"] | None
    state: SplatState


def mix_chunks_gradient(
    send: Float[Tensor, "B H N C M"],
    receive: Float[Tensor, "B H N C M"],
    values: Float[Tensor, "B H N C D"],
    log_decay: Float[Tensor, "B H N C 1"] | None,
    state: SplatState,
    running_mean: bool,
    d_output: Float[Tensor, "B H N C D"],
    d_state: SplatState,
) -> ChunkGradients:
    """By the arguments of `mix_chunks`, without a transform and with a decay by heads."""
    fading = _fading(log_decay, send)
    sent = fading.leave(send)
    masses = _running(sent.sum(3), state.mass, fading.faded[..., 0])
    totals = _running(sent.mT @ values, state.total, fading.faded)
    mass, total = masses[:, :, :-1, None], totals[:, :, :-1]

    sent_here = send.cumsum(3) if log_decay is None else fading.pairs @ send
    mass_here = sent_here + fading.keep(mass)
    divisor = mass_here.clamp_min(MIN_MASS) if running_mean else torch.ones_like(mass_here)
    read = receive / divisor
    heard = fading.between(d_output @ values.mT)
    d_read = (heard @ send).add_(fading.keep(d_output @ total.mT))
    d_receive = d_read / divisor
    is_mean = (mass_here >= MIN_MASS) if running_mean else torch.zeros_like(mass_here, dtype=torch.bool)
    d_mass_here = torch.where(is_mean, (read * d_receive).neg_(), 0.0)

    d_masses = _running(fading.keep(d_mass_here).sum(3).flip(2), d_state.mass, fading.faded[..., 0].flip(2)).flip(2)
    d_totals = _running((fading.keep(read).mT @ d_output).flip(2), d_state.total, fading.faded.flip(2)).flip(2)
    d_mass_after, d_total_after = d_masses[:, :, 1:, None], d_totals[:, :, 1:]

    d_send = fading.leave((values @ d_total_after.mT).add_(d_mass_after)).add_(heard.mT @ read)
    d_send += _later(d_mass_here) if log_decay is None else fading.pairs.mT @ d_mass_here
    d_values = (fading.between(read @ send.mT).mT @ d_output).add_(sent @ d_total_after)
    d_log_decay = None
    if log_decay is not None:
        arriving = torch.where(is_mean, 0.0, read * d_read)
        passing = (arriving - send * d_send).sum(-1, keepdim=True)
        after = (d_total_after * totals[:, :, 1:]).sum((-1, -2)) + (d_masses * masses)[:, :, 1:].sum(-1)
        d_log_decay = _later(passing) + after[..., None, None]
    return ChunkGradients(d_send, d_receive, d_values, d_log_decay, SplatState(d_masses[:, :, 0], d_totals[:, :, 0]))


class Fading(NamedTuple):
    """What is left at a token of one before it, and of what was before the chunk; at the end of the chunk of a token,
    and of what was before the chunk. Nothing fades where `kept` and `left` are None.
    """

    pairs: Float[Tensor, "*B C C"]
    kept: Float[Tensor, "B H N C 1"] | None
    left: Float[Tensor, "B H N C 1"] | None
    faded: Float[Tensor, "#B #H N 1 1"]

    def between(self, scores: Float[Tensor, "B H N C C"]) -> Float[Tensor, "B H N C C"]:
        return scores.tril_() if self.kept is None else scores.mul_(self.pairs)

    def keep(self, part: Float[Tensor, "B H N C X"]) -> Float[Tensor, "B H N C X"]:
        return part if self.kept is None else part * self.kept

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


def _later(part: Float[Tensor, "B H N C X"]) -> Float[Tensor, "B H N C X"]:
    """The sum from each token of a chunk to the last."""
    return part.flip(3).cumsum(3).flip(3)


def _running(
    terms: Float[Tensor, "B H N *what"], start: Float[Tensor, "B H *what"], faded: Float[Tensor, "#B #H N *one"]
) -> Float[Tensor, "B H N+1 *what"]:
    """At the start and after each term, what is left of the start and of the terms so far."""
    sums = [start]
    for term, factor in zip(terms.unbind(2), faded.unbind(2), strict=True):
        sums.append(torch.addcmul(term, factor, sums[-1]))
    return torch.stack(sums, 2)
