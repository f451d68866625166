"""What the exact near memory of a layer keeps of its tokens."""

# B batch, T token, W window_size, H head, G head that sends, M splat, P position width, D value width, R a bias

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from .documents import without_padding
from .splats import Sources, inner_dtype, per_splat
from .window import window_attention

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


class WindowState(NamedTuple):
    """The tokens that are still in the window, with all that the splats will want of them when they leave it."""

    send_positions: Float[Tensor, "B W G P"]
    values: Float[Tensor, "B W G D"]
    real: Bool[Tensor, "B W"]
    log_decay: Float[Tensor, "B W G *M"] | None
    write_gate: Float[Tensor, "B W G *M"] | None
    send_bias: Float[Tensor, "B W G R"] | None


def each_part(function: Callable[..., Tensor], *states: WindowState) -> WindowState:
    """`function` of the corresponding parts of window states, where they exist."""
    parts = (None if parts[0] is None else function(*parts) for parts in zip(*states, strict=True))
    return WindowState._make(parts)


def empty_window(tokens: WindowState, window_size: int) -> WindowState:
    """A window before the first token: zeros, none of them real."""
    return each_part(lambda part: part.new_zeros(part.shape[0], window_size, *part.shape[2:]), tokens)


def slide(earlier: WindowState, tokens: WindowState) -> tuple[WindowState, WindowState, WindowState]:
    """All W + T tokens in reach of T new ones, those T of them that leave the window, and the W that are then in it."""
    reach = each_part(lambda old, new: torch.cat([old, new], 1), earlier, tokens)
    length = tokens.values.shape[1]
    leaving = each_part(lambda part: part[:, :length], reach)
    return reach, leaving, each_part(lambda part: part[:, length:].clone(), reach)  # a view would keep all tokens alive


def sources_of(tokens: WindowState) -> Sources:
    """These tokens as those that send to the splats; padding sends nothing and forgets nothing."""
    dtype = inner_dtype(tokens.values.dtype)
    factors = per_splat(tokens.log_decay, dtype), per_splat(tokens.write_gate, dtype)
    return without_padding(tokens.real, Sources(tokens.send_positions, tokens.values, tokens.send_bias, *factors))


def hear_window(
    receive_positions: Float[Tensor, "B T H P"], reach: WindowState, log_scale: Float[Tensor, " H"]
) -> Float[Tensor, "B T H D"]:
    """What T tokens hear of the W + T in their reach: positions are queries and keys, sharpened by a scale a head."""
    queries = receive_positions * log_scale.exp()[:, None]
    dtype = reach.values.dtype
    return window_attention(queries.to(dtype), reach.send_positions.to(dtype), reach.values, reach.real)
