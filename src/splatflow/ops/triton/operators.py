"""The kernels as operators of torch: each with what it returns of tensors without numbers, and with its gradient.

A compiler keeps them as they are, so a model that calls them is one graph.
"""

# B batch, T target token, S source token, H head, M splat, P position width, D value width, Q segment

from typing import Any

import torch
from torch import Tensor

from . import launch
from .launch import SplatTensors


def whole_of(values: Tensor, scaled: Tensor, log_decay: Tensor | None) -> launch.Cut:
    """How the tokens of `values` [B, T, H, D] are cut, for splats [H, M, P]."""
    batch, num_tokens, num_heads, width = values.shape
    return launch.cut(num_tokens, batch * num_heads, (*scaled.shape[1:], width), launch.grain(log_decay))


def empty_state(values: Tensor, num_splats: int) -> tuple[Tensor, Tensor]:
    batch, _, num_heads, width = values.shape
    mass = values.new_empty(batch, num_heads, num_splats, dtype=torch.float32)
    return mass, mass.new_empty(*mass.shape, width)


@torch.library.custom_op("splatflow::mix", mutates_args=())
def mix(
    send_positions: Tensor,
    receive_positions: Tensor | None,
    values: Tensor,
    scaled: Tensor,
    precision: Tensor,
    half_norm: Tensor,
    log_amplitude: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    mass: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Causal: output, final mass and total; and for the backward pass those before each of several segments."""
    splats = SplatTensors(scaled, precision, half_norm, log_amplitude)
    whole = whole_of(values, scaled, log_decay)
    before = launch.states_before(send_positions, values, splats, log_decay, write_gate, mass, total, whole)
    mixed = launch.mix(send_positions, receive_positions, values, splats, log_decay, write_gate, before, whole)
    kept = before if whole.num_segments > 1 else (mass.new_empty(0), mass.new_empty(0))
    return *mixed, *kept


@mix.register_fake
def _(
    send_positions: Tensor,
    receive_positions: Tensor | None,
    values: Tensor,
    scaled: Tensor,
    precision: Tensor,
    half_norm: Tensor,
    log_amplitude: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    mass: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, num_heads, width = values.shape
    segments = whole_of(values, scaled, log_decay).num_segments
    before = (batch * num_heads, segments, scaled.shape[1]) if segments > 1 else (0,)
    kept = mass.new_empty(before), mass.new_empty(*before, width) if segments > 1 else mass.new_empty(0)
    return torch.empty_like(values), *empty_state(values, scaled.shape[1]), *kept


@torch.library.custom_op("splatflow::mix_backward", mutates_args=())
def mix_backward(
    send_positions: Tensor,
    receive_positions: Tensor | None,
    values: Tensor,
    scaled: Tensor,
    precision: Tensor,
    half_norm: Tensor,
    log_amplitude: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    mass_before: Tensor,
    total_before: Tensor,
    output_gradient: Tensor,
    mass_gradient: Tensor,
    total_gradient: Tensor,
) -> list[Tensor]:
    """Gradients by all arguments of `mix`, in their order, without those that were None."""
    gradients = launch.mix_backward(
        *(send_positions, receive_positions, values),
        SplatTensors(scaled, precision, half_norm, log_amplitude),
        *(log_decay, write_gate, (mass_before, total_before)),
        (output_gradient, mass_gradient, total_gradient),
        whole_of(values, scaled, log_decay),
    )
    tokens = [*gradients[:3], *gradients.splats, *gradients[3:5], gradients.mass, gradients.total]
    return [part for part in tokens if part is not None]


@mix_backward.register_fake
def _(
    send_positions: Tensor,
    receive_positions: Tensor | None,
    values: Tensor,
    scaled: Tensor,
    precision: Tensor,
    half_norm: Tensor,
    log_amplitude: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    mass_before: Tensor,
    total_before: Tensor,
    output_gradient: Tensor,
    mass_gradient: Tensor,
    total_gradient: Tensor,
) -> list[Tensor]:
    given = [send_positions, receive_positions, values, scaled, precision, half_norm, log_amplitude]
    given += [log_decay, write_gate, mass_gradient, total_gradient]
    return [torch.empty_like(part) for part in given if part is not None]


def _keep_for_mix(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, ...]) -> None:
    mass_before, total_before = output[3:]
    alone = mass_before.ndim == 1
    ctx.save_for_backward(*inputs[:9], *(inputs[9:] if alone else (mass_before, total_before)))
    ctx.mark_non_differentiable(mass_before, total_before)


def _mix_gradient(
    ctx: Any, output: Tensor, mass: Tensor, total: Tensor, *unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    gradients = iter(mix_backward(*ctx.saved_tensors, *(part.contiguous() for part in (output, mass, total))))
    given = [*ctx.saved_tensors[:9], True, True]
    return tuple(None if part is None else next(gradients) for part in given)


mix.register_autograd(_mix_gradient, setup_context=_keep_for_mix)


@torch.library.custom_op("splatflow::collect", mutates_args=())
def collect(
    positions: Tensor,
    values: Tensor,
    scaled: Tensor,
    precision: Tensor,
    half_norm: Tensor,
    log_amplitude: Tensor,
    write_gate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Not causal: what all tokens together send, mass [B, H, M] and total [B, H, M, D]."""
    splats = SplatTensors(scaled, precision, half_norm, log_amplitude)
    whole = whole_of(values, scaled, None)
    parts = launch.collect(positions, values, splats, None, write_gate, whole, whole.num_segments)
    heads = (values.shape[0], values.shape[2])
    mass, total = (part.unflatten(0, heads).sum(2) for part in parts[:2])
    return mass, total


@collect.register_fake
def _(
    positions: Tensor,
    values: Tensor,
    scaled: Tensor,
    precision: Tensor,
    half_norm: Tensor,
    log_amplitude: Tensor,
    write_gate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return empty_state(values, scaled.shape[1])


@torch.library.custom_op("splatflow::hand_out", mutates_args=())
def hand_out(
    positions: Tensor,
    contents: Tensor,
    scaled: Tensor,
    precision: Tensor,
    half_norm: Tensor,
    log_amplitude: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Not causal: what targets [B, T, H, P] receive of contents [B, H, M, D]."""
    return launch.hand_out(positions, SplatTensors(scaled, precision, half_norm, log_amplitude), contents, dtype)


@hand_out.register_fake
def _(
    positions: Tensor,
    contents: Tensor,
    scaled: Tensor,
    precision: Tensor,
    half_norm: Tensor,
    log_amplitude: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return positions.new_empty(*positions.shape[:3], contents.shape[-1], dtype=dtype)


@torch.library.custom_op("splatflow::weighing_backward", mutates_args=())
def weighing_backward(
    positions: Tensor,
    vectors: Tensor,
    scaled: Tensor,
    precision: Tensor,
    half_norm: Tensor,
    log_amplitude: Tensor,
    write_gate: Tensor | None,
    offsets: Tensor,
    contents: Tensor,
    sends: bool,
) -> list[Tensor]:
    """Gradients by positions, by the four parts of the splats, by vectors if these are sent, and by a gate."""
    splats = SplatTensors(scaled, precision, half_norm, log_amplitude)
    moved, sent, gate, of_splats = launch.weighing_backward(
        positions, vectors, splats, write_gate, offsets, contents, sends=sends
    )
    return [part for part in (moved, *of_splats, sent, gate) if part is not None]


@weighing_backward.register_fake
def _(
    positions: Tensor,
    vectors: Tensor,
    scaled: Tensor,
    precision: Tensor,
    half_norm: Tensor,
    log_amplitude: Tensor,
    write_gate: Tensor | None,
    offsets: Tensor,
    contents: Tensor,
    sends: bool,
) -> list[Tensor]:
    given = [positions, scaled, precision, half_norm, log_amplitude, vectors if sends else None, write_gate]
    return [torch.empty_like(part) for part in given if part is not None]


def _keep_for_collect(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _collect_gradient(ctx: Any, mass: Tensor, total: Tensor) -> tuple[Tensor | None, ...]:
    *rest, gate = ctx.saved_tensors
    found = weighing_backward(*rest, gate, mass.contiguous(), total.contiguous(), True)
    moved, *of_splats, sent = found if gate is None else found[:-1]
    return moved, sent, *of_splats, None if gate is None else found[-1]


def _keep_for_hand_out(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _hand_out_gradient(ctx: Any, output: Tensor) -> tuple[Tensor | None, ...]:
    positions, contents, *splats = ctx.saved_tensors
    output = output.contiguous()
    offsets = contents.new_zeros(contents.shape[:3])
    moved, *of_splats = weighing_backward(positions, output, *splats, None, offsets, contents, False)
    _, d_contents = collect(positions, output, *splats, None)
    return moved, d_contents, *of_splats, None


collect.register_autograd(_collect_gradient, setup_context=_keep_for_collect)
hand_out.register_autograd(_hand_out_gradient, setup_context=_keep_for_hand_out)


@torch.library.custom_op("splatflow::step", mutates_args=())
def step(
    send_positions: Tensor,
    receive_positions: Tensor,
    values: Tensor,
    scaled: Tensor,
    precision: Tensor,
    half_norm: Tensor,
    log_amplitude: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    mass: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mix` of one token, without a gradient: output, mass and total."""
    splats = SplatTensors(scaled, precision, half_norm, log_amplitude)
    return launch.step(send_positions, receive_positions, values, splats, log_decay, write_gate, mass, total)


@step.register_fake
def _(
    send_positions: Tensor,
    receive_positions: Tensor,
    values: Tensor,
    scaled: Tensor,
    precision: Tensor,
    half_norm: Tensor,
    log_amplitude: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    mass: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(values), *empty_state(values, scaled.shape[1])
