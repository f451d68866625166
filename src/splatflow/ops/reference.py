"""Splat attention by its definition: dense, slow, exact. Every other backend is tested against this file.

    mass_im = decay(i, 0) mass0_m  + sum_j decay(i, j) send_jm
    y_i     = sum_m receive_im / mass_im * (decay(i, 0) total0_m + sum_j decay(i, j) send_jm v_j)

with j <= i if causal, else all j and no decay. Routings without a running mean leave out the division. With a
transform, splat m says A_m of its total.
"""

# B batch, T target token, S source token, H head, M splat, D value width, P position width

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .routing import Router
from .splats import MIN_MASS, Sources, SplatState, Targets
from .transform import transformed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def decay_matrix(log_decay: Float[Tensor, "B S H M"]) -> Float[Tensor, "B H S S M"]:
    """decay(i, j) of every splat for every pair of tokens, exp(sum_{j < t <= i} log_decay_t); 1 for j > i."""
    length = log_decay.shape[1]
    after = torch.ones(length, length, dtype=torch.bool, device=log_decay.device).tril(-1)  # row t, column j: t > j
    steps = log_decay.transpose(1, 2)[:, :, :, None, :]  # [B, H, S (t), 1, M]
    sums = torch.where(after[:, :, None], steps, 0.0).cumsum(2)  # [B, H, S (i), S (j), M]
    return sums.exp()


def reference(
    sources: Sources, targets: Targets, router: Router, state: SplatState, *, causal: bool
) -> tuple[Float[Tensor, "B T H D"], SplatState]:
    """Output and final state from the dense token-token matrix."""
    send, receive = router.send(sources), router.receive(targets)
    values, log_decay = sources.values.to(send.dtype), sources.log_decay
    no_decay = torch.zeros_like(send) if log_decay is None else log_decay.expand_as(send)
    if causal:
        kept = no_decay.cumsum(1).exp()  # [B, T, H, M], decay(i, 0)
        past = torch.ones(send.shape[1], send.shape[1], dtype=torch.bool, device=send.device).tril()[..., None]
        # chosen, not multiplied by 0: what overflows in the future does not reach the past
        paths = torch.where(past, torch.einsum("BHTSM,BSHM->BHTSM", decay_matrix(no_decay), send), 0.0)
    else:
        kept = torch.ones_like(receive)
        paths = send.transpose(1, 2)[:, :, None].expand(-1, -1, receive.shape[1], -1, -1)

    mass = kept * state.mass[:, None] + torch.einsum("BHTSM->BTHM", paths)
    read = receive / mass.clamp_min(MIN_MASS) if router.routing.running_mean else receive
    weights = torch.einsum("BTHM,BHTSM->BHTS", read, paths)
    output = torch.einsum("BHTS,BSHD->BTHD", weights, values)
    output = output + torch.einsum("BTHM,BHMD->BTHD", read * kept, state.total)
    if router.transform is not None:
        totals = torch.einsum("BHTSM,BSHD->BTHMD", paths, values) + kept[..., None] * state.total[:, None]
        output = torch.einsum("BTHM,BTHMD->BTHD", read, transformed(totals, router.transform))
    return output, _final_state(send, values, no_decay, state)


def _final_state(
    send: Float[Tensor, "B S H M"],
    values: Float[Tensor, "B S H D"],
    log_decay: Float[Tensor, "B S H M"],
    state: SplatState,
) -> SplatState:
    """What all the tokens leave behind."""
    later = F.pad(log_decay, (0, 0, 0, 0, 0, 1))[:, 1:]  # a token does not fade by its own arrival
    left = later.flip(1).cumsum(1).flip(1).exp() * send  # [B, S, H, M]
    kept = log_decay.sum(1).exp()  # [B, H, M]
    return SplatState(
        kept * state.mass + left.sum(1),
        kept[..., None] * state.total + torch.einsum("BSHM,BSHD->BHMD", left, values),
    )
