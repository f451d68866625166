"""Two memories at once: near tokens are heard in the window, far ones through the splats; a token is in one of them.

It is sent to the splats when it leaves the window, with all that it was given at its own time.
"""

# B batch, T token, W window_size, H head, G head that sends, M splat, P position width, D value width

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import triton
from .dispatch import splat_attention
from .lagged import Attend
from .routing import ROUTINGS, Router
from .splats import Lattice, Splats, SplatState, Targets, Tokens, inner_dtype
from .transform import Transform
from .validate import check_arguments
from .window_state import WindowState, each_part, hear_window, slide

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Heard(NamedTuple):
    """What T tokens hear of each memory, both memories after them, and the T tokens that went from one to the other."""

    near: Float[Tensor, "B T H D"]
    far: Float[Tensor, "B T H D"]
    window: WindowState
    splats: SplatState
    leaving: WindowState


def hybrid_attention(
    targets: Targets,
    tokens: WindowState,
    log_scale: Float[Tensor, " H"],
    splats: Splats | Lattice,
    window: WindowState,
    state: SplatState | None,
    *,
    routing: str = "mixture",
    top_p: int | None = None,
    receive_mixing: Float[Tensor, "G M M"] | None = None,
    transform: Transform | None = None,
    backend: str = "auto",
) -> Heard:
    """T tokens hear the last W, themselves included, in the window, and those before through the splats.

        near_i = sum_j softmax_j(exp(log_scale) <R_i x_i, R_j u_j> / sqrt(P)) v_j,    i - W < j <= i and real, or j = i
        far_i = `splat_attention` of all j <= i - W

    x and u are receive and send positions, R_i the rotary embedding. The weighing of the two is the caller's.

    Args:
        targets: where the T tokens receive.
        tokens: the same tokens as the splats will want them when they leave the window.
        log_scale: of the scores in the window, a head.
        splats, routing, top_p, receive_mixing, transform: as `splat_attention` has them.
        window, state: both memories before the first token. `empty_window` has no tokens yet; a state of None is empty.
            What stands where a token is not real has to be finite.
        backend: "triton", on CUDA or interpreted, decodes a token in one launch (`triton.supports_step` says what it is
            built for); "portable" works out one memory after the other; "auto" is the first, if it can, on CUDA.

    Raises:
        ValueError, TypeError: as `splat_attention`, whose `padding_mask` is `real` here; a window of other tokens than
            these; a backend that cannot do this, with the reason.

    Source: `docs/mathematics.md`, section 3.
    """
    targets = _parts(Targets, "targets", targets, ("positions",))
    tokens = _parts(WindowState, "tokens", tokens, ("send_positions", "values", "real"))
    window = _parts(WindowState, "window", window, ("send_positions", "values", "real"))
    how: dict[str, Any] = {"routing": routing, "top_p": top_p, "receive_mixing": receive_mixing, "transform": transform}
    in_one_launch = _in_one_launch(backend, tokens.values.device)
    _check_tokens(targets, tokens, splats, state, **how)
    _check_window(window, tokens, log_scale, targets.positions.shape[2])
    if state is None:
        state = SplatState.empty(tokens.values, len(tokens.values), ROUTINGS[routing].kind(*splats).num_splats)
    if in_one_launch:
        router = Router(ROUTINGS[routing], ROUTINGS[routing].kind(*splats), top_p, receive_mixing, transform)
        step = router, targets, tokens, log_scale, window, state
        reason = triton.supports_step(*step)
        if reason is None:
            near, far, after, left = triton.window_step(*step)
            return Heard(near, far, after, left, each_part(lambda part: part[:, :1], window))
        if backend == "triton":
            raise ValueError(f"backend 'triton' cannot do this: {reason}")
    reach, leaving, after = slide(window, tokens)
    far, left = hear_splats(splat_attention, targets, leaving, state, splats=splats, padded=True, **how)
    near = hear_window(targets.positions, reach, log_scale)
    return Heard(near, far, after, left, leaving)


def hear_splats(
    attend: Attend, targets: Targets, tokens: WindowState, state: SplatState, *, padded: bool, **options: Any
) -> tuple[Float[Tensor, "B T H D"], SplatState]:
    """What targets receive of splats to which these tokens are sent. Not `padded`: all tokens are real."""
    return attend(
        tokens.send_positions,
        targets.positions,
        tokens.values,
        send_bias=tokens.send_bias,
        receive_bias=targets.bias,
        log_decay=tokens.log_decay,
        write_gate=tokens.write_gate,
        padding_mask=tokens.real if padded else None,
        state=state,
        **options,
    )


def _parts(kind: type[Tokens], name: str, given: Any, needed: Sequence[str]) -> Tokens:
    """A named tuple of its kind, made of one or of a plain one, in which some parts have to be tensors."""
    fields: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]  # a named tuple, which cannot be said
    if not (isinstance(given, tuple) and len(given) == len(fields)):
        raise TypeError(f"{name} is a {type(given).__name__}, expected {kind.__name__}({', '.join(fields)})")
    parts = kind(*given)
    for part in needed:
        if not isinstance(getattr(parts, part), torch.Tensor):
            raise TypeError(f"{name}.{part} is a {type(getattr(parts, part)).__name__}, expected a tensor")
    return parts


def _in_one_launch(backend: str, device: torch.device) -> bool:
    """Whether the kernel is to be tried."""
    if backend not in ("auto", "portable", "triton"):
        raise ValueError(f"backend is {backend!r}, expected one of ['auto', 'portable', 'triton']")
    return backend == "triton" or (backend == "auto" and device.type == "cuda")


def _check_tokens(
    targets: Targets, tokens: WindowState, splats: Splats | Lattice, state: SplatState | None, **how: Any
) -> None:
    """What `splat_attention` checks, of tokens that it will see when they leave the window."""
    check_arguments(
        tokens.send_positions,
        targets.positions,
        tokens.values,
        splats,
        causal=True,
        send_bias=tokens.send_bias,
        receive_bias=targets.bias,
        log_decay=tokens.log_decay,
        write_gate=tokens.write_gate,
        padding_mask=tokens.real,
        state=state,
        cu_seqlens=None,
        **how,
    )
    if (width := tokens.send_positions.shape[-1]) % 2:
        raise ValueError(f"send_positions is {width} wide, expected an even width, which rotary positions need")


def _check_window(window: WindowState, tokens: WindowState, log_scale: Float[Tensor, " H"], num_heads: int) -> None:
    """Raises unless a window holds of its tokens what there is of the new ones, and each head has a scale."""
    if not isinstance(log_scale, torch.Tensor) or not log_scale.is_floating_point():
        given = getattr(log_scale, "dtype", type(log_scale).__name__)
        raise TypeError(f"log_scale is {given}, expected a tensor of floats")
    if tuple(log_scale.shape) != (num_heads,):
        raise ValueError(f"log_scale has shape {list(log_scale.shape)}, expected [{num_heads}], one number a head")
    if window.real.ndim != 2:
        raise ValueError(f"window.real has shape {list(window.real.shape)}, expected [batch, tokens of the window]")
    for name, old, new in zip(window._fields, window, tokens, strict=True):
        if (old is None) != (new is None):
            given, wanted = ("None", "a tensor") if old is None else ("given", "None")
            raise ValueError(f"window.{name} is {given}, expected {wanted} as of the tokens")
        if old is None or new is None:
            continue
        expected = (new.shape[0], window.real.shape[1], *new.shape[2:])
        if tuple(old.shape) != expected or old.device != new.device:
            raise ValueError(
                f"window.{name} has shape {list(old.shape)} on {old.device}, expected {list(expected)} on {new.device}"
            )
        kinds = [inner_dtype(part.dtype) if part.is_floating_point() else part.dtype for part in (old, new)]
        if kinds[0] != kinds[1]:
            raise TypeError(f"window.{name} is {old.dtype}, of the tokens it is {new.dtype}")
