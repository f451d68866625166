"""Splat attention by kernels that make weights of positions where they are used up: no weight ever reaches memory.

causal:   the kernels walk tiles of C tokens as `chunked` does its chunks, the state in registers
not so:   one kernel sums up what is sent, one hands out what the splats then hold
"""

# B batch (of states: N documents if packed), T target token, S source token, H head, M splat, D value width

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..routing import Router
from ..splats import Sources, Splats, SplatState, Targets, each
from ..window_state import WindowState, each_part
from . import operators, wants_gradient
from .launch import SplatTensors

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def fused(
    sources: Sources,
    targets: Targets,
    router: Router,
    state: SplatState,
    *,
    causal: bool,
    boundaries: Sequence[int] | None = None,
) -> tuple[Float[Tensor, "B T H D"], SplatState]:
    """Output and final state; of documents packed between `boundaries`, each with its state.

    What is not contiguous is copied first. Packed documents are read where they lie: nothing is gathered or padded.
    """
    assert isinstance(router.splats, Splats), "supports has seen to it"
    tied = sources.positions is targets.positions
    sources, targets = each(torch.Tensor.contiguous, sources), each(torch.Tensor.contiguous, targets)
    splats = for_kernels(router.splats)
    if causal:
        return _causal(sources, None if tied else targets.positions, splats, state, boundaries)
    positions, values = sources.positions, sources.values
    if values.numel():
        mass, total = operators.collect(positions, values, [*splats], sources.write_gate, boundaries)
        state = SplatState(state.mass + mass, state.total + total)
    contents = state.contents(running_mean=True)
    if not targets.positions.numel():
        return values.new_empty(*targets.positions.shape[:3], values.shape[-1]), state
    parts = (targets.positions, contents.contiguous(), [*splats], values.dtype, boundaries)
    return operators.hand_out(*parts), state


@torch.compiler.disable  # a graph would be made anew for each way that documents lie
def fused_over_documents(
    boundaries: Sequence[int],
    sources: Sources,
    targets: Targets,
    router: Router,
    state: SplatState,
    *,
    causal: bool,
) -> tuple[Float[Tensor, "1 T H D"], SplatState]:
    """The same of packed documents, outside of what is compiled: how they are cut depends on where they end."""
    return fused(sources, targets, router, state, causal=causal, boundaries=boundaries)


def window_step(
    router: Router,
    targets: Targets,
    tokens: WindowState,
    log_scale: Float[Tensor, " H"],
    window: WindowState,
    state: SplatState,
) -> tuple[Float[Tensor, "B 1 H D"], Float[Tensor, "B 1 H D"], WindowState, SplatState]:
    """Near and far output of one token, and both memories after it. What is not contiguous is copied first."""
    splats = [part.contiguous() for part in router.splats[:3]]
    given = [[None if part is None else part.contiguous() for part in _with_grains(part)] for part in (tokens, window)]
    before = [part.contiguous() for part in state]
    near, far, mass, total, *parts = operators.window_step(
        targets.positions.contiguous(), log_scale.contiguous(), splats, *given, *before
    )
    left = iter(parts)
    after = each_part(lambda part: next(left).view_as(part), window)
    return near, far, after, SplatState(mass, total)


def _with_grains(tokens: WindowState) -> WindowState:
    """A decay and a gate a head as [B, W, H, 1]."""
    return each_part(lambda part: part[..., None] if part.ndim == 3 else part, tokens)


def _causal(
    sources: Sources,
    receive_positions: Float[Tensor, "B T H P"] | None,
    splats: SplatTensors,
    state: SplatState,
    boundaries: Sequence[int] | None,
) -> tuple[Float[Tensor, "B T H D"], SplatState]:
    send_positions, values, _, log_decay, write_gate = sources
    if not values.numel():
        num_heads = values.shape[2] if receive_positions is None else receive_positions.shape[2]
        return values.new_empty(*values.shape[:2], num_heads, values.shape[-1]), state
    before = [part.contiguous() for part in state]
    single = values.shape[1] == 1 and boundaries is None
    if single and not wants_gradient(*sources, receive_positions, *splats, *before):
        target = send_positions if receive_positions is None else receive_positions
        output, *after = operators.step(send_positions, target, values, [*splats], log_decay, write_gate, *before)
    else:
        output, *after = operators.mix(
            send_positions, receive_positions, values, [*splats], log_decay, write_gate, *before, boundaries
        )[:3]
    return output, SplatState(*after)


def for_kernels(splats: Splats) -> SplatTensors:
    """The splats as the expanded square has them, `nearness` in `ops/affinity.py`; gradients come back through here."""
    centers, log_scales, log_amplitudes = (part.float() for part in splats[:3])
    precision = torch.exp(-2.0 * log_scales)
    half_norm = 0.5 * precision * centers.square().sum(-1)
    parts = (centers * precision[..., None], precision, half_norm, log_amplitudes)
    return SplatTensors(*(part.contiguous() for part in parts))
