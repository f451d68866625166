"""The kernels as operators of torch: each with what it returns of tensors without numbers, and with its gradient.

A compiler keeps them as they are, so a model that calls them is one graph. `splats` are the parts of `SplatTensors`.
"""

# B batch, T target token, S source token, H head, M splat, P position width, D value width, Q segment

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..splats import Splats
from ..window_state import WindowState
from . import launch, launch_backward
from .launch import SplatTensors


def whole_of(values: Tensor, scaled: Tensor, log_decay: Tensor | None) -> launch.Cut:
    """How the tokens of `values` [B, T, H, D] are cut, for splats [H, M, P]."""
    batch, num_tokens, num_heads, width = values.shape
    return launch.cut(num_tokens, batch * num_heads, (*scaled.shape[1:], width), launch.grain(log_decay))


def empty_state(values: Tensor, num_splats: int) -> tuple[Tensor, Tensor]:
    batch, _, num_heads, width = values.shape
    mass = values.new_empty(batch, num_heads, num_splats, dtype=torch.float32)
    return mass, mass.new_empty(*mass.shape, width)


def like(*parts: Tensor | None) -> list[Tensor]:
    """Tensors as those that are given, without numbers: their gradients."""
    return [torch.empty_like(part) for part in parts if part is not None]


@torch.library.custom_op("splatflow::mix", mutates_args=())
def mix(
    send_positions: Tensor,
    receive_positions: Tensor | None,
    values: Tensor,
    splats: Sequence[Tensor],
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    mass: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Causal: output, final mass and total; and for the backward pass those before each of several segments."""
    parts, whole = SplatTensors(*splats), whole_of(values, splats[0], log_decay)
    before = launch.states_before(send_positions, values, parts, log_decay, write_gate, mass, total, whole)
    mixed = launch.mix(send_positions, receive_positions, values, parts, log_decay, write_gate, before, whole)
    kept = before if whole.num_segments > 1 else (mass.new_empty(0), mass.new_empty(0))
    return *mixed, *kept


@mix.register_fake
def _(
    send: Tensor, receive: Tensor | None, values: Tensor, splats: Sequence[Tensor], log_decay: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, num_heads, width = values.shape
    num_splats = splats[0].shape[1]
    state = empty_state(values, num_splats)
    segments = whole_of(values, splats[0], log_decay).num_segments
    before = (batch * num_heads, segments, num_splats) if segments > 1 else (0,)
    kept = state[0].new_empty(before), state[0].new_empty(*before, width) if segments > 1 else state[0].new_empty(0)
    return torch.empty_like(values), *state, *kept


@torch.library.custom_op("splatflow::mix_backward", mutates_args=())
def mix_backward(
    send_positions: Tensor,
    receive_positions: Tensor | None,
    values: Tensor,
    splats: Sequence[Tensor],
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
) -> list[Tensor]:
    """From mass and total before each segment, and the gradients by output, mass and total.

    Gradients by all arguments of `mix`, in their order, without those that were None.
    """
    found = launch_backward.mix_backward(
        *(send_positions, receive_positions, values, SplatTensors(*splats), log_decay, write_gate),
        *((before[0], before[1]), (after[0], after[1], after[2]), whole_of(values, splats[0], log_decay)),
    )
    in_order = [*found[:3], *found.splats, *found[3:5], found.mass, found.total]
    return [part for part in in_order if part is not None]


@mix_backward.register_fake
def _(
    send: Tensor,
    receive: Tensor | None,
    values: Tensor,
    splats: Sequence[Tensor],
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
) -> list[Tensor]:
    return like(send, receive, values, *splats, log_decay, write_gate, *after[1:])


def _keep_for_mix(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    send, receive, values, splats, log_decay, write_gate, *state = inputs
    kept = output[3:]
    ctx.save_for_backward(
        send, receive, values, *splats, log_decay, write_gate, *(state if kept[0].ndim == 1 else kept)
    )
    ctx.mark_non_differentiable(*kept)


def _mix_gradient(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    send, receive, values, *splats, log_decay, write_gate, mass, total = ctx.saved_tensors
    given = (send, receive, values, splats, log_decay, write_gate)
    after = [part.contiguous() for part in gradients[:3] if part is not None]
    found = iter(mix_backward(*given, [mass, total], after))
    return *(_taken(found, part) for part in given), *found


def _taken(found: Iterator[Tensor], of: Any) -> Any:
    """The next gradients, as many as an argument has tensors."""
    if isinstance(of, list):
        return [next(found) for _ in of]
    return None if of is None else next(found)


mix.register_autograd(_mix_gradient, setup_context=_keep_for_mix)


@torch.library.custom_op("splatflow::collect", mutates_args=())
def collect(
    positions: Tensor, values: Tensor, splats: Sequence[Tensor], write_gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Not causal: what all tokens together send, mass [B, H, M] and total [B, H, M, D]."""
    whole = whole_of(values, splats[0], None)
    parts = launch.collect(positions, values, SplatTensors(*splats), None, write_gate, whole, whole.num_segments)
    heads = (values.shape[0], values.shape[2])
    mass, total = (part.unflatten(0, heads).sum(2) for part in parts[:2])
    return mass, total


collect.register_fake(lambda positions, values, splats, write_gate: empty_state(values, splats[0].shape[1]))


@torch.library.custom_op("splatflow::hand_out", mutates_args=())
def hand_out(positions: Tensor, contents: Tensor, splats: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Not causal: what targets [B, T, H, P] receive of contents [B, H, M, D]."""
    return launch.hand_out(positions, SplatTensors(*splats), contents, dtype)


@hand_out.register_fake
def _(positions: Tensor, contents: Tensor, splats: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return positions.new_empty(*positions.shape[:3], contents.shape[-1], dtype=dtype)


@torch.library.custom_op("splatflow::weighing_backward", mutates_args=())
def weighing_backward(
    positions: Tensor,
    vectors: Tensor,
    splats: Sequence[Tensor],
    write_gate: Tensor | None,
    offsets: Tensor,
    contents: Tensor,
    sends: bool,
) -> list[Tensor]:
    """Gradients by positions, by vectors if these are sent, by the four parts of the splats, and by a gate."""
    moved, sent, gate, of_splats = launch_backward.weighing_backward(
        positions, vectors, SplatTensors(*splats), write_gate, offsets, contents, sends=sends
    )
    return [part for part in (moved, sent, *of_splats, gate) if part is not None]


@weighing_backward.register_fake
def _(
    positions: Tensor,
    vectors: Tensor,
    splats: Sequence[Tensor],
    write_gate: Tensor | None,
    offsets: Tensor,
    contents: Tensor,
    sends: bool,
) -> list[Tensor]:
    return like(positions, vectors if sends else None, *splats, write_gate)


def _keep_for_collect(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    positions, values, splats, write_gate = inputs
    ctx.save_for_backward(positions, values, *splats, write_gate)


def _collect_gradient(ctx: Any, mass: Tensor, total: Tensor) -> tuple[Any, ...]:
    positions, values, *splats, write_gate = ctx.saved_tensors
    given = (positions, values, splats, write_gate)
    found = iter(weighing_backward(*given, mass.contiguous(), total.contiguous(), True))
    return tuple(_taken(found, part) for part in given)


def _keep_for_hand_out(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    positions, contents, splats, _ = inputs
    ctx.save_for_backward(positions, contents, *splats)


def _hand_out_gradient(ctx: Any, output: Tensor) -> tuple[Any, ...]:
    positions, contents, *splats = ctx.saved_tensors
    output, offsets = output.contiguous(), contents.new_zeros(contents.shape[:3])
    moved, *of_splats = weighing_backward(positions, output, splats, None, offsets, contents, False)
    _, d_contents = collect(positions, output, splats, None)
    return moved, d_contents, of_splats, None


collect.register_autograd(_collect_gradient, setup_context=_keep_for_collect)
hand_out.register_autograd(_hand_out_gradient, setup_context=_keep_for_hand_out)


@torch.library.custom_op("splatflow::step", mutates_args=())
def step(
    send_positions: Tensor,
    receive_positions: Tensor,
    values: Tensor,
    splats: Sequence[Tensor],
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    mass: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mix` of one token, without a gradient: output, mass and total."""
    return launch.step(
        send_positions, receive_positions, values, SplatTensors(*splats), log_decay, write_gate, mass, total
    )


@step.register_fake
def _(
    send: Tensor, receive: Tensor, values: Tensor, splats: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(values), *empty_state(values, splats[0].shape[1])


@torch.library.custom_op("splatflow::window_step", mutates_args=())
def window_step(
    receive_positions: Tensor,
    log_scale: Tensor,
    splats: Sequence[Tensor],
    tokens: Sequence[Tensor | None],
    window: Sequence[Tensor | None],
    mass: Tensor,
    total: Tensor,
) -> list[Tensor]:
    """One token of the hybrid, without a gradient: near and far output, mass, total, and what there is of the window.

    `splats` are the first parts of `Splats`, `tokens` and `window` all parts of a `WindowState`.
    """
    given = Splats(*splats), WindowState._make(tokens), WindowState._make(window)
    *found, after = launch.window_step(receive_positions, log_scale, *given, mass, total)
    return [*found, *(part for part in after if part is not None)]


@window_step.register_fake
def _(
    receive: Tensor,
    log_scale: Tensor,
    splats: Sequence[Tensor],
    tokens: Sequence[Tensor | None],
    window: Sequence[Tensor | None],
    mass: Tensor,
    total: Tensor,
) -> list[Tensor]:
    values = WindowState._make(tokens).values
    near, far = (values.new_empty(*receive.shape[:3], values.shape[-1]) for _ in range(2))
    return [near, far, *like(mass, total, *window)]
