"""Every wrong call is met here, once, by a typed error that says which argument, what was given, what was expected."""

# B batch, T target token, S source token, H head, M splat, P position width, D value width

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from .routing import ROUTINGS
from .splats import Lattice, Splats, SplatState, inner_dtype
from .transform import Transform

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_arguments(
    send_positions: Tensor,
    receive_positions: Tensor,
    values: Tensor,
    splats: Splats | Lattice,
    *,
    causal: bool,
    routing: str,
    top_p: int | None,
    send_bias: Tensor | None,
    receive_bias: Tensor | None,
    receive_mixing: Tensor | None,
    transform: Transform | None,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    padding_mask: Tensor | None,
    state: SplatState | None,
    cu_seqlens: Tensor | None,
) -> list[int] | None:
    """Raises ValueError or TypeError if the arguments of `splat_attention` do not fit together.

    The boundaries in `cu_seqlens`, if they are given: to read them once more would wait for a GPU once more.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"routing is {routing!r}, expected one of {list(ROUTINGS)}")
    checked = {
        "values": (values, 4),
        "send_positions": (send_positions, 4),
        "receive_positions": (receive_positions, 4),
    }
    splats = _check_kind(splats, routing)
    axes = {part: 3 + (routing == "lattice") - (part != "centers") for part in splats._fields}
    parts = {part: tensor for part, tensor in zip(splats._fields, splats, strict=True) if tensor is not None}
    _check_floats(
        values.device if isinstance(values, torch.Tensor) else None,
        {**checked, **{f"splats.{part}": (tensor, axes[part]) for part, tensor in parts.items()}},
    )
    batch, num_sources, num_heads, _ = values.shape
    *per_splat, width = splats.centers.shape[1:]  # M, or 2 and K
    if isinstance(splats, Lattice):
        per_splat[0] = 2
    num_splats = splats.num_splats
    if num_splats == 0:
        raise ValueError("splats.centers holds 0 splats a head, expected at least 1")
    num_targets, num_receiving = receive_positions.shape[1:3]
    expected = {part: (num_heads, *per_splat, *((width,) if part == "centers" else ())) for part in parts}
    _check_shapes(
        {
            **{f"splats.{part}": (tensor, expected[part]) for part, tensor in parts.items()},
            "send_positions": (send_positions, (batch, num_sources, num_heads, splats.position_dim)),
            "receive_positions": (receive_positions, (batch, num_targets, num_receiving, splats.position_dim)),
        }
    )
    if not num_heads or not num_receiving or num_receiving % num_heads:
        raise ValueError(
            f"receive_positions has {num_receiving} heads, values has {num_heads}: expected as many, or a multiple of "
            "that, to share them out among the heads that send"
        )
    check_top_p(top_p, routing, num_splats)
    num_biases = num_splats if routing != "lattice" else 2 * per_splat[1]
    for name, bias, tokens in (
        ("send_bias", send_bias, (num_sources, num_heads)),
        ("receive_bias", receive_bias, (num_targets, num_receiving)),
    ):
        if bias is not None:
            _check_floats(values.device, {name: (bias, 4)})
            _check_shapes({name: (bias, (batch, *tokens, num_biases))})
    if receive_mixing is not None:
        _check_floats(values.device, {"receive_mixing": (receive_mixing, 3)})
        _check_shapes({"receive_mixing": (receive_mixing, (num_heads, num_splats, num_splats))})
    if transform is not None:
        _check_transform(transform, (num_heads, num_splats, values.shape[-1]), values)
    for name, positions in (("send_positions", send_positions), ("receive_positions", receive_positions)):
        if inner_dtype(positions.dtype) != inner_dtype(values.dtype):
            raise TypeError(f"{name} is {positions.dtype}, values is {values.dtype}: float64 goes with float64 only")
    if causal and num_targets != num_sources:
        raise ValueError(
            f"receive_positions has {num_targets} tokens, values has {num_sources}: causal=True needs as many targets "
            "as sources (cross attention is causal=False)"
        )
    if log_decay is not None and not causal:
        raise ValueError("log_decay was given with causal=False: forgetting needs an order of tokens")
    _check_factor("log_decay", log_decay, values, num_splats, low=-torch.inf, high=0.0)
    _check_factor("write_gate", write_gate, values, num_splats, low=0.0, high=1.0)
    if padding_mask is not None:
        _check_mask(padding_mask, values)
    boundaries = None if cu_seqlens is None else _boundaries_of(cu_seqlens, values, num_targets, padding_mask)
    if state is not None:
        num_states = batch if boundaries is None else len(boundaries) - 1
        check_state(state, (num_states, num_heads, num_splats, values.shape[-1]), values)
    return boundaries


def _check_kind(splats: Splats | Lattice, routing: str) -> Splats | Lattice:
    """The splats as what the routing routes by; a plain tuple will do."""
    kind = ROUTINGS[routing].kind
    fewest = len(kind._fields) - len(kind._field_defaults)
    other = isinstance(splats, Splats | Lattice) and not isinstance(splats, kind)
    if other or not (isinstance(splats, tuple) and fewest <= len(splats) <= len(kind._fields)):
        expected = f"{kind.__name__}({', '.join(kind._fields[:fewest])})"
        raise TypeError(f"splats is a {type(splats).__name__}, expected {expected} for routing {routing!r}")
    splats = kind(*splats)
    reaches = getattr(splats, "log_reaches", None)
    if (reaches is None) == (routing == "compact"):
        given, wanted = ("None", "a tensor") if reaches is None else ("given", "None")
        raise ValueError(f"splats.log_reaches is {given}, expected {wanted} for routing {routing!r}")
    return splats


def check_top_p(top_p: int | None, routing: str, num_splats: int, name: str = "top_p") -> None:
    """Raises TypeError or ValueError unless so many of so many splats can be looked for by this routing."""
    if top_p is None:
        if routing == "grouped":
            raise ValueError(f"{name} is None, expected a number for routing 'grouped', which looks for the nearest")
        return
    if not isinstance(top_p, int) or isinstance(top_p, bool):
        raise TypeError(f"{name} is {top_p!r}, expected an integer or None")
    if ROUTINGS[routing].nearest is None:
        raise ValueError(f"{name} is {top_p}, expected None for routing {routing!r}")
    if not 1 <= top_p <= num_splats:
        raise ValueError(f"{name} is {top_p}, expected 1 to the number of splats, {num_splats}")


def _check_transform(transform: Transform, shape: tuple[int, ...], values: Tensor) -> None:
    if not (isinstance(transform, tuple) and len(transform) == 2):
        raise TypeError(f"transform is a {type(transform).__name__}, expected Transform(listen, say)")
    parts = {f"transform.{name}": part for name, part in zip(Transform._fields, transform, strict=True)}
    _check_floats(values.device, {name: (part, 3) for name, part in parts.items()})
    _check_shapes({name: (part, shape) for name, part in parts.items()})


def check_state(state: SplatState, shape: tuple[int, int, int, int], values: Tensor) -> None:
    """Raises if a `SplatState` is not one for B, H, M, D = `shape` and such values."""
    if not (isinstance(state, tuple) and len(state) == 2):
        raise TypeError(f"state is a {type(state).__name__}, expected SplatState(mass, total)")
    state = SplatState(*state)
    _check_floats(values.device, {"state.mass": (state.mass, 3), "state.total": (state.total, 4)})
    _check_shapes({"state.mass": (state.mass, shape[:3]), "state.total": (state.total, shape)})
    for name, part in (("state.mass", state.mass), ("state.total", state.total)):
        if part.dtype != inner_dtype(values.dtype):
            raise TypeError(
                f"{name} is {part.dtype}, expected {inner_dtype(values.dtype)} for values of {values.dtype}"
            )


def _check_floats(device: torch.device | None, tensors: dict[str, tuple[Tensor, int]]) -> None:
    for name, (tensor, num_axes) in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a tensor")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} is {tensor.dtype}, expected one of {[str(dtype) for dtype in FLOATS]}")
        if tensor.ndim != num_axes:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {num_axes} axes")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, values is on {device}")


def _check_shapes(tensors: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    for name, (tensor, shape) in tensors.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected {list(shape)} to go with the other arguments"
            )


def _check_factor(
    name: str, factor: Tensor | None, values: Tensor, num_splats: int, *, low: float, high: float
) -> None:
    if factor is None:
        return
    per_head = tuple(values.shape[:3])
    if not isinstance(factor, torch.Tensor) or not factor.is_floating_point():
        raise TypeError(f"{name} is {getattr(factor, 'dtype', type(factor).__name__)}, expected a tensor of floats")
    if tuple(factor.shape) not in (per_head, (*per_head, num_splats)):
        raise ValueError(
            f"{name} has shape {list(factor.shape)}, expected {list(per_head)} (per head) or "
            f"{[*per_head, num_splats]} (per splat)"
        )
    if factor.device != values.device:
        raise ValueError(f"{name} is on {factor.device}, values is on {values.device}")
    # on a GPU the look at the numbers would wait for all work before it
    if factor.device.type == "cpu" and not torch.compiler.is_compiling() and factor.numel():
        least, most = (bound.item() for bound in factor.detach().aminmax())
        if least < low or most > high:  # a nan is let through, to show itself in the output
            raise ValueError(f"{name} lies between {least:g} and {most:g}, expected values from {low:g} to {high:g}")


def _check_mask(padding_mask: Tensor, values: Tensor) -> None:
    if not isinstance(padding_mask, torch.Tensor) or padding_mask.dtype != torch.bool:
        kind = getattr(padding_mask, "dtype", type(padding_mask).__name__)
        raise TypeError(f"padding_mask is {kind}, expected a tensor of bool, True for a real token")
    if padding_mask.shape != values.shape[:2]:
        raise ValueError(f"padding_mask has shape {list(padding_mask.shape)}, expected {list(values.shape[:2])}")
    if padding_mask.device != values.device:
        raise ValueError(f"padding_mask is on {padding_mask.device}, values is on {values.device}")


def _boundaries_of(cu_seqlens: Tensor, values: Tensor, num_targets: int, padding_mask: Tensor | None) -> list[int]:
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
        raise TypeError(f"cu_seqlens is {kind}, expected a tensor of int32 or int64")
    if padding_mask is not None:
        raise ValueError("padding_mask was given with cu_seqlens: packed documents have no padding")
    batch, num_tokens = values.shape[:2]
    if batch != 1 or num_targets != num_tokens:
        raise ValueError(
            f"cu_seqlens needs a batch of 1 and as many targets as sources, given a batch of {batch}, "
            f"{num_targets} targets and {num_tokens} sources"
        )
    boundaries = cu_seqlens.tolist() if cu_seqlens.ndim == 1 else []
    rising = all(start <= stop for start, stop in pairwise(boundaries))
    if len(boundaries) < 2 or boundaries[0] != 0 or boundaries[-1] != num_tokens or not rising:
        given = boundaries if len(boundaries) <= 9 else [*boundaries[:4], "...", *boundaries[-4:]]
        raise ValueError(f"cu_seqlens is {given}, expected rising boundaries from 0 to {num_tokens}")
    return boundaries
