"""The twin: softmax attention in the same house, to compare with. Its state grows with the context."""

# B batch, T token, S token so far, W window_size, H head, G head of keys and values, P position width, D value width,
# C hidden size

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from splatflow.ops.window import for_each_head, rotate, window_attention
from splatflow.requirements import (
    require_even_positions,
    require_heads,
    require_integers,
    require_no_order,
    share_of_heads,
)

from .blocks import HeadOutput, HeadProjections, check_inputs, check_layer_state, only_real

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


class SoftmaxAttentionState(NamedTuple):
    """Keys and values of the tokens so far (of the last W, if there is a window), and which are real."""

    keys: Float[Tensor, "B S G P"]
    values: Float[Tensor, "B S G D"]
    real: Bool[Tensor, "B S"]
    convolution: Float[Tensor, "B size-1 C"] | None


class SoftmaxAttention(nn.Module):
    """Softmax attention with rotary positions and normalised queries and keys, over all tokens or a window.

    Same projections, convolution, head norm and output gate as `SplatAttention`, called in the same way.

    Args:
        hidden_size, num_heads, num_key_value_heads, conv_size, head_norm, output_gate: as in `SplatAttention`.
        causal: a token hears itself and what came before; otherwise all tokens.
        window_size: tokens W heard, the token itself included; 0 for all.

    Example:
        >>> layer = SoftmaxAttention(hidden_size=64, num_heads=2)
        >>> first, state = layer(torch.randn(3, 100, 64))
        >>> second, state = layer(torch.randn(3, 1, 64), state=state)
        >>> list(state.keys.shape)
        [3, 101, 2, 32]
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_key_value_heads: int | None = None,
        causal: bool = True,
        window_size: int = 0,
        conv_size: int = 0,
        head_norm: bool = False,
        output_gate: bool = False,
    ) -> None:
        super().__init__()
        require_heads(hidden_size, num_heads=num_heads)
        require_integers(0, window_size=window_size, conv_size=conv_size)
        require_even_positions(hidden_size // num_heads)
        if not causal:
            require_no_order(window_size=window_size)
        self.hidden_size, self.num_heads, self.causal, self.window_size = hidden_size, num_heads, causal, window_size
        self.num_key_value_heads = share_of_heads(num_heads, num_key_value_heads)
        self.projections = HeadProjections(
            hidden_size,
            num_heads,
            hidden_size // num_heads,
            num_key_value_heads=self.num_key_value_heads,
            conv_size=conv_size,
            causal=causal,
        )
        self.log_scale = nn.Parameter(torch.empty(num_heads))
        self.output = HeadOutput(hidden_size, num_heads, head_norm=head_norm, output_gate=output_gate)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.log_scale.zero_()

    def forward(
        self,
        hidden_states: Float[Tensor, "B T C"],
        *,
        attention_mask: Bool[Tensor, "B T"] | None = None,
        state: SoftmaxAttentionState | None = None,
    ) -> tuple[Float[Tensor, "B T C"], SoftmaxAttentionState]:
        """Output and the state after the last token. `attention_mask` is False (or 0) for padding."""
        check_inputs(self.hidden_size, hidden_states, attention_mask)
        if state is not None:
            check_layer_state(state, self._shapes_like(state, hidden_states.shape[0]), hidden_states.dtype)
        hidden_states, real = only_real(hidden_states, attention_mask)
        keys, queries, values, convolution = self.projections(
            hidden_states, None if state is None else state.convolution
        )
        queries = (queries * self.log_scale.exp()[:, None]).to(values.dtype)
        keys = keys.to(values.dtype)
        if state is None:
            state = _empty(keys, values, self.window_size, convolution)
        keys, values, real = (
            torch.cat([old, new], 1) for old, new in zip(state[:3], (keys, values, real), strict=True)
        )
        if self.window_size:
            heard = window_attention(queries, keys, values, real)
            # copies: views would keep all tokens alive
            keys, values, real = (part[:, queries.shape[1] :].clone() for part in (keys, values, real))
        else:
            padded = attention_mask is not None or state.keys.shape[1] > 0
            heard = full_attention(queries, keys, values, real if padded else None, causal=self.causal)
        state = SoftmaxAttentionState(keys, values, real, convolution)
        return self.output(heard, hidden_states), state

    def _shapes_like(self, state: Any, batch: int) -> SoftmaxAttentionState:
        """A state that holds a shape in the place of each tensor; without a window `state` says how many tokens."""
        length = self.window_size or (state[0].shape[1] if isinstance(state, SoftmaxAttentionState) else 0)
        heads = (batch, length, self.num_key_value_heads, self.hidden_size // self.num_heads)
        return SoftmaxAttentionState._make([heads, heads, heads[:2], self.projections.shape_of_state(batch)])


def full_attention(
    queries: Float[Tensor, "B T H P"],
    keys: Float[Tensor, "B S G P"],
    values: Float[Tensor, "B S G D"],
    real: Bool[Tensor, "B S"] | None,
    *,
    causal: bool = True,
) -> Float[Tensor, "B T H D"]:
    """Softmax attention of the last T of S tokens over all, or, if causal, over all up to themselves.

    Without `real`, T = S and all are real.
    """
    num_targets, num_sources = queries.shape[1], keys.shape[1]
    keys, values = (for_each_head(part, queries.shape[2]) for part in (keys, values))
    mask = None
    if real is not None:
        target = torch.arange(num_sources - num_targets, num_sources, device=queries.device)[:, None]
        source = torch.arange(num_sources, device=queries.device)
        within_reach = source <= target if causal else source >= 0
        mask = (within_reach & real[:, None, :]) | (source == target)  # padding hears itself: no softmax is empty
        mask = mask[:, None]
    output = F.scaled_dot_product_attention(
        rotate(queries, start=num_sources - num_targets).transpose(1, 2),
        rotate(keys).transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
    )
    return output.transpose(1, 2)


def _empty(
    keys: Float[Tensor, "B T G P"],
    values: Float[Tensor, "B T G D"],
    length: int,
    convolution: Float[Tensor, "B size-1 C"] | None,
) -> SoftmaxAttentionState:
    """Nothing heard yet; a window starts with zeros, none of them real."""
    batch = keys.shape[0]
    return SoftmaxAttentionState(
        keys.new_zeros(batch, length, *keys.shape[2:]),
        values.new_zeros(batch, length, *values.shape[2:]),
        torch.zeros(batch, length, dtype=torch.bool, device=keys.device),
        convolution,
    )
