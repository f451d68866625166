"""One token at a time: the form that decodes, and a second, independent definition.

mass  <- exp(log_decay) mass  + send
total <- exp(log_decay) total + send v
y      = sum_m receive_m total_m / mass_m
"""

# B batch, T target token, S source token, H head, R receiving head of a sending one, M splat, D value width

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .heads import as_tokens
from .routing import Router
from .splats import MIN_MASS, Sources, SplatState, Targets
from .transform import transformed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def write(
    state: SplatState,
    send: Float[Tensor, "B H M"],
    value: Float[Tensor, "B H D"],
    log_decay: Float[Tensor, "B H #M"] | None,
) -> SplatState:
    """The state after one more token."""
    mass, total = state
    if log_decay is not None:
        kept = log_decay.exp()
        mass, total = mass * kept, total * kept[..., None]
    return SplatState(mass + send, total + send[..., None] * value[..., None, :])


def read(state: SplatState, receive: Float[Tensor, "B R H M"], router: Router) -> Float[Tensor, "B H R D"]:
    """What the heads of a token that receive with these weights hear."""
    mass, total = state
    weights = receive / mass[:, None].clamp_min(MIN_MASS) if router.routing.running_mean else receive
    return weights.transpose(1, 2) @ transformed(total, router.transform)


def recurrent(
    sources: Sources, targets: Targets, router: Router, state: SplatState, *, causal: bool
) -> tuple[Float[Tensor, "B T H D"], SplatState]:
    """Output and final state, token by token. With one token this is the decoding step."""
    batch, num_sources, num_heads, width = sources.values.shape
    send, receive = router.send(sources), router.receive(as_tokens(targets, num_heads, length=1))
    values, log_decay = sources.values.to(send.dtype), sources.log_decay
    of_each = receive.split(targets.positions.shape[2] // num_heads, 1)  # [B, R, H, M] of each target

    outputs = []
    for source in range(num_sources):
        state = write(state, send[:, source], values[:, source], None if log_decay is None else log_decay[:, source])
        if causal:
            outputs.append(read(state, of_each[source], router))
    if not causal:
        outputs = [read(state, receive, router) for receive in of_each[: targets.positions.shape[1]]]
    if not outputs:
        return values.new_zeros(batch, *targets.positions.shape[1:3], width), state
    return torch.stack(outputs, 1).flatten(2, 3), state
