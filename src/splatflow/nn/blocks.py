"""The parts around a mixer: short convolution, projections into heads and out of them, MLP."""

# B batch, T token, H head that receives, G head that sends, P position width, D value width, C channel

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from splatflow.ops.splats import inner_dtype
from splatflow.requirements import share_of_heads

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

LARGEST = 1e18  # hidden states beyond it count as it


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases. Source: Shazeer 2020."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class ShortConvolution(nn.Module):
    """Depthwise convolution over a few tokens: the last ones, or, if not causal, those around each token.

        y_t = sum_i weight_i x_{t - before + i},    before = size - 1 if causal, else floor(size / 2)

    Centred, an odd size hears as many tokens before as after, an even one one more before. Tokens beyond either end
    count as 0. A handful of shifted multiply-adds is quicker on [B, T, C] than a convolution kernel. The state is the
    last size - 1 inputs, or None if centred: what came before cannot be finished without what follows.
    """

    def __init__(self, num_channels: int, size: int, *, causal: bool = True) -> None:
        super().__init__()
        self.size, self.causal = size, causal
        self.weight = nn.Parameter(torch.empty(size, num_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -(self.size**-0.5), self.size**-0.5)

    def forward(
        self, inputs: Float[Tensor, "B T C"], state: Float[Tensor, "B size-1 C"] | None = None
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B size-1 C"] | None]:
        length = inputs.shape[1]
        if not self.causal:
            inputs = F.pad(inputs, (0, 0, self.size // 2, (self.size - 1) // 2))
        elif state is None:
            inputs = F.pad(inputs, (0, 0, self.size - 1, 0))
        else:
            inputs = torch.cat([state, inputs], 1)
        output = inputs[:, :length] * self.weight[0]
        for shift in range(1, self.size):
            output = torch.addcmul(output, inputs[:, shift : shift + length], self.weight[shift])
        return output, inputs[:, length:].clone() if self.causal else None  # a view would keep all inputs alive


class HeadProjections(nn.Module):
    """Hidden states -> where each head receives and sends (the heirs of query and key), and what it sends.

    Of H heads that receive, G = `num_key_value_heads` send, all if not given. Positions have RMS 1, so |p|^2 = P and
    distances have one size at every width. Values have D = `head_dim` numbers a head, C / H if not given. Nothing here
    has a bias, so that hidden states of 0, which stand for padding, stay 0 and the convolution hears no more of padding
    than of what lies beyond the ends.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        position_dim: int,
        *,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        tied_positions: bool = False,
        conv_size: int = 0,
        causal: bool = True,
    ) -> None:
        super().__init__()
        senders = share_of_heads(num_heads, num_key_value_heads, tied=tied_positions)
        receive, send = num_heads * position_dim, senders * position_dim
        value = senders * (hidden_size // num_heads if head_dim is None else head_dim)
        self.receive_proj = nn.Linear(hidden_size, receive, bias=False)
        self.send_proj = None if tied_positions else nn.Linear(hidden_size, send, bias=False)
        self.value_proj = nn.Linear(hidden_size, value, bias=False)
        self.widths = (receive, value) if tied_positions else (receive, send, value)
        self.heads = (num_heads, senders) if tied_positions else (num_heads, senders, senders)
        self.convolution = ShortConvolution(sum(self.widths), conv_size, causal=causal) if conv_size else None

    def forward(
        self, hidden_states: Float[Tensor, "B T C"], state: Float[Tensor, "B size-1 C"] | None = None
    ) -> tuple[
        Float[Tensor, "B T G P"], Float[Tensor, "B T H P"], Float[Tensor, "B T G D"], Float[Tensor, "B size-1 C"] | None
    ]:
        """(send positions, receive positions, values, state of the convolution)."""
        projections = [layer for layer in (self.receive_proj, self.send_proj, self.value_proj) if layer is not None]
        projected = [layer(hidden_states) for layer in projections]
        if self.convolution is not None:
            convolved, state = self.convolution(torch.cat(projected, -1), state)
            projected = list(convolved.split(self.widths, -1))
        *positions, values = (
            part.unflatten(-1, (heads, -1)) for part, heads in zip(projected, self.heads, strict=True)
        )
        positions = [F.rms_norm(part, part.shape[-1:]) for part in positions]
        return positions[-1], positions[0], values, state

    def shape_of_state(self, batch: int) -> tuple[int, int, int] | None:
        """Shape [B, size - 1, C] of the convolution's state, if there is one."""
        if self.convolution is None or not self.convolution.causal:
            return None
        return (batch, self.convolution.size - 1, sum(self.widths))


class HeadOutput(nn.Module):
    """What the heads heard -> hidden states: optionally an RMS norm in each head, and a gate made of the token.

    `head_dim` is the width D of what a head heard, C / H if not given.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        head_norm: bool = False,
        output_gate: bool = False,
    ) -> None:
        super().__init__()
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        width = num_heads * head_dim
        self.norm = nn.RMSNorm(head_dim, eps=1e-6) if head_norm else None
        self.gate_proj = nn.Linear(hidden_size, width, bias=False) if output_gate else None
        self.out_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, heard: Float[Tensor, "B T H D"], hidden_states: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        if self.norm is not None:
            heard = self.norm(heard)
        heard = heard.flatten(2)
        if self.gate_proj is not None:
            heard = heard * F.silu(self.gate_proj(hidden_states))
        return self.out_proj(heard)


def only_real(
    hidden_states: Float[Tensor, "B T C"], attention_mask: Bool[Tensor, "B T"] | None
) -> tuple[Float[Tensor, "B T C"], Bool[Tensor, "B T"]]:
    """Hidden states with padding set to 0, and which tokens are real."""
    # whatever finite numbers the future holds, no projection of them overflows into the past
    largest = min(LARGEST, torch.finfo(hidden_states.dtype).max)
    hidden_states = hidden_states.clamp(-largest, largest)
    if attention_mask is None:
        return hidden_states, torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
    real = attention_mask.bool()
    return hidden_states.masked_fill(~real[..., None], 0.0), real


def check_inputs(
    hidden_size: int,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    names: tuple[str, str] = ("hidden_states", "attention_mask"),
) -> None:
    """Raises ValueError if a layer of this width cannot take these tokens, or if the mask is of others."""
    tokens_name, mask_name = names
    if hidden_states.ndim != 3 or hidden_states.shape[-1] != hidden_size:
        raise ValueError(
            f"{tokens_name} has shape {list(hidden_states.shape)}, expected [batch, tokens, {hidden_size}]"
        )
    if attention_mask is not None and attention_mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{mask_name} has shape {list(attention_mask.shape)}, expected {list(hidden_states.shape[:2])}, "
            f"one number for each token of {tokens_name}"
        )


def check_layer_state(state: Any, shapes: Any, dtype: torch.dtype, name: str = "state") -> None:
    """Raises TypeError or ValueError if `state` is not one of this layer's, or of another batch or precision.

    Args:
        state: a named tuple of tensors, further named tuples, or None.
        shapes: the same named tuple with the shape in the place of each tensor.
        dtype: of the new hidden states; fp64 goes with fp64 only.
    """
    if type(state) is not type(shapes):
        raise TypeError(f"{name} is a {type(state).__name__}, expected a {type(shapes).__name__} of this layer")
    for field, part, shape in zip(shapes._fields, state, shapes, strict=True):
        if hasattr(shape, "_fields"):
            check_layer_state(part, shape, dtype, f"{name}.{field}")
        elif part is not None and not (isinstance(part, torch.Tensor) and shape is not None):
            wanted = "None" if shape is None else "a tensor"
            raise TypeError(f"{name}.{field} is a {type(part).__name__}, expected {wanted} in this layer")
        elif (None if part is None else tuple(part.shape)) != shape:
            given = None if part is None else list(part.shape)
            expected = None if shape is None else list(shape)
            raise ValueError(f"{name}.{field} has shape {given}, expected {expected} in this layer")
        elif part is not None and part.is_floating_point() and inner_dtype(part.dtype) != inner_dtype(dtype):
            raise TypeError(f"{name}.{field} is {part.dtype}, hidden_states is {dtype}: float64 goes with float64 only")
