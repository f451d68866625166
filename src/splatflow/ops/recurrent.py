"""One token at a time: the form that decodes, and a second, independent definition.

mass  <- exp(log_decay) mass  + send
total <- exp(log_decay) total + send v
y      = sum_m receive_m total_m / mass_m
"""

# B batch, T target token, S source token, H head, M splat, D value width, P position width

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

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


def read(state: SplatState, receive: Float[Tensor, "B H M"], router: Router) -> Float[Tensor, "B H D"]:
    """What a token that receives with these weights hears."""
    mass, total = state
    weights = receive / mass.clamp_min(MIN_MASS) if router.routing.running_mean else receive
    return (weights[..., None, :] @ transformed(total, router.transform)).squeeze(-2)


def recurrent(
    sources: Sources, targets: Targets, router: Router, state: SplatState, *, causal: bool
) -> tuple[Float[Tensor, "B T H D"], SplatState]:
    """Output and final state, token by token. With one token this is the decoding step."""
    send, receive = router.send(sources), router.receive(targets)
    values, log_decay = sources.values.to(send.dtype), sources.log_decay

    outputs = []
    for source in range(values.shape[1]):
        state = write(state, send[:, source], values[:, source], None if log_decay is None else log_decay[:, source])
        if causal:
            outputs.append(read(state, receive[:, source], router))
    if not causal:
        outputs = [read(state, receive[:, target], router) for target in range(receive.shape[1])]
    if not outputs:
        return values.new_zeros(values.shape[0], receive.shape[1], *values.shape[2:]), state
    return torch.stack(outputs, 1), state
