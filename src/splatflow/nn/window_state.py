"""What the exact near memory of a layer keeps of its tokens."""

# B batch, W window_size, H head, M splat, P position width, D value width, R a bias

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from splatflow.ops.window import window_attention

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


class WindowState(NamedTuple):
    """The tokens that are still in the window, with all that the splats will want of them when they leave it."""

    send_positions: Float[Tensor, "B W H P"]
    values: Float[Tensor, "B W H D"]
    real: Bool[Tensor, "B W"]
    log_decay: Float[Tensor, "B W H *M"] | None
    write_gate: Float[Tensor, "B W H *M"] | None
    send_bias: Float[Tensor, "B W H R"] | None


def each_part(function: Callable[..., Tensor], *states: WindowState) -> WindowState:
    """`function` of the corresponding parts of window states, where they exist."""
    parts = (None if parts[0] is None else function(*parts) for parts in zip(*states, strict=True))
    return WindowState._make(parts)


def empty_window(tokens: WindowState, window_size: int) -> WindowState:
    """A window before the first token: zeros, none of them real."""
    return each_part(lambda part: part.new_zeros(part.shape[0], window_size, *part.shape[2:]), tokens)


def hear_window(
    receive_positions: Float[Tensor, "B T H P"], reach: WindowState, log_scale: Float[Tensor, " H"]
) -> Float[Tensor, "B T H D"]:
    """What T tokens hear of the W + T in their reach: positions are queries and keys, sharpened by a scale a head."""
    queries = receive_positions * log_scale.exp()[:, None]
    dtype = reach.values.dtype
    return window_attention(queries.to(dtype), reach.send_positions.to(dtype), reach.values, reach.real)
