"""What each token says of itself beside its places and its value: how much it makes splats forget, writes and prefers.

For each a function that reads it off hidden states by a projection, None without one, and where the projection begins.
"""

# B batch, T token, H head that sends, M splat, C hidden size, R a bias

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from splatflow.ops.splats import inner_dtype

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def log_decay_of(
    hidden_states: Float[Tensor, "B T C"], projection: nn.Linear | None, num_heads: int, *, per_splat: bool
) -> Float[Tensor, "B T H *M"] | None:
    """How much of what came before is forgotten when a token arrives, as a logarithm."""
    if projection is None:
        return None
    log_decay = F.logsigmoid(projection(hidden_states).to(inner_dtype(hidden_states.dtype)))
    return log_decay.unflatten(-1, (num_heads, -1)) if per_splat else log_decay


def write_gate_of(
    hidden_states: Float[Tensor, "B T C"], projection: nn.Linear | None, num_heads: int, *, per_splat: bool
) -> Float[Tensor, "B T H *M"] | None:
    """How much of itself a token sends, in [0, 1]."""
    if projection is None:
        return None
    gate = projection(hidden_states).to(inner_dtype(hidden_states.dtype)).sigmoid()
    return gate.unflatten(-1, (num_heads, -1)) if per_splat else gate


def biases_of(
    hidden_states: Float[Tensor, "B T C"],
    projection: nn.Linear | None,
    num_heads: int,
    num_receivers: int,
    token_bias: Float[Tensor, "B T H R"] | None,
) -> tuple[Float[Tensor, "B T H R"] | None, Float[Tensor, "B T heads R"] | None]:
    """What is added to the log-affinities of sending and of receiving, for which each head has so many receivers."""
    of_receivers = token_bias
    if token_bias is not None and num_receivers > 1:
        of_receivers = token_bias.repeat_interleave(num_receivers, 2)
    if projection is None:
        return token_bias, of_receivers
    biases = projection(hidden_states).unflatten(-1, (num_heads * (1 + num_receivers), -1))
    send_bias, receive_bias = biases.split([num_heads, num_heads * num_receivers], 2)
    if token_bias is None:
        return send_bias, receive_bias
    return send_bias + token_bias, receive_bias + of_receivers


def check_token_bias(token_bias: Any, shape: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError unless it is None, or a tensor of floats of this shape, [B, T, H, R]."""
    if token_bias is None:
        return
    if not isinstance(token_bias, torch.Tensor) or not token_bias.is_floating_point():
        given = getattr(token_bias, "dtype", type(token_bias).__name__)
        raise TypeError(f"token_bias is {given}, expected a tensor of floats or None")
    if tuple(token_bias.shape) != shape:
        raise ValueError(f"token_bias has shape {list(token_bias.shape)}, expected {list(shape)}")


@torch.no_grad()
def start_with_half_lives(projection: nn.Linear, num_heads: int) -> None:
    """Decays with half-lives from 5 tokens in the first head to 280 in the last."""
    nn.init.normal_(projection.weight, std=0.02)
    heads = torch.linspace(2.0, 6.0, num_heads)
    projection.bias.copy_(heads.repeat_interleave(projection.out_features // num_heads))


@torch.no_grad()
def start_nearly_open(projection: nn.Linear) -> None:
    """Gates of 0.88."""
    nn.init.normal_(projection.weight, std=0.02)
    nn.init.constant_(projection.bias, 2.0)


@torch.no_grad()
def start_without_preferences(projection: nn.Linear) -> None:
    """Biases of 0."""
    nn.init.zeros_(projection.weight)
    nn.init.zeros_(projection.bias)
