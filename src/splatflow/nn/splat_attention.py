"""Splat attention as a layer: tokens meet only at the splats, and, if asked, in a window of near ones."""

# B batch, T token, W window_size, H head, M splat, P position width, D value width, C hidden size

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import nn

from splatflow.ops import ROUTINGS, Splats, SplatState, splat_attention
from splatflow.ops.splats import inner_dtype
from splatflow.ops.window import window_attention
from splatflow.requirements import require_even_positions, require_heads, require_integers, require_one_of

from .blocks import HeadOutput, HeadProjections, check_inputs, check_layer_state, only_real

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

# The mass that a splat starts with. Small, so that the first token sent to a splat is heard at nearly full strength.
PRIOR_LOG_MASS = -6.0
# What learns to forget, if anything does: each head, or each splat of each head
Grain = Literal["head", "splat"]
GRAINS = (None, *get_args(Grain))


class WindowState(NamedTuple):
    """The tokens that are still in the window, with all that the splats will want of them when they leave it."""

    send_positions: Float[Tensor, "B W H P"]
    values: Float[Tensor, "B W H D"]
    real: Bool[Tensor, "B W"]
    log_decay: Float[Tensor, "B W H *M"] | None
    write_gate: Float[Tensor, "B W H M"] | None


class SplatAttentionState(NamedTuple):
    """All that a layer remembers; its size does not depend on how many tokens there were."""

    splats: SplatState
    window: WindowState | None
    convolution: Float[Tensor, "B size-1 C"] | None


class SplatAttention(nn.Module):
    """Each token sends its value to the splats near it and receives what the splats near it hold.

    With a window, near tokens are heard exactly and far ones through the splats: a token is sent to the splats when it
    leaves the window, so that nothing is counted twice, and a gate per head and token weighs the two.

    Args:
        hidden_size: width C of the hidden states.
        num_heads: heads H, each with its own splats; D = C / H.
        num_splats: splats M a head.
        causal: a token hears itself and what came before; otherwise all tokens.
        window_size: tokens W heard exactly, the token itself included; 0 for none.
        routing: "mixture" or "gaussian", a row of `splatflow.ops.ROUTINGS`.
        position_dim: width P of the space in which tokens and splats lie; D if not given.
        tied_positions: a token sends and receives from one place, by one projection.
        decay: None, "head" or "splat": learn from each token how much of what came before is forgotten.
        write_gate: learn from each token how much it sends to each splat, in [0, 1].
        conv_size: tokens under a short convolution of positions and values, centred if not causal; 0 for none.
        head_norm: RMS norm of what each head heard.
        output_gate: multiply what was heard by silu of a projection of the token.
        value_skip: add the token's own value to what was heard, times a learned factor a head.

    Source: `docs/mathematics.md`, sections 1 and 3.

    Example:
        >>> layer = SplatAttention(hidden_size=64, num_heads=2, num_splats=16, window_size=8)
        >>> first, state = layer(torch.randn(3, 100, 64))
        >>> second, state = layer(torch.randn(3, 1, 64), state=state)
        >>> list(first.shape), list(second.shape)
        ([3, 100, 64], [3, 1, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_splats: int,
        *,
        causal: bool = True,
        window_size: int = 0,
        routing: str = "mixture",
        position_dim: int | None = None,
        tied_positions: bool = False,
        decay: Grain | None = None,
        write_gate: bool = False,
        conv_size: int = 0,
        head_norm: bool = False,
        output_gate: bool = False,
        value_skip: bool = False,
    ) -> None:
        super().__init__()
        require_heads(hidden_size, num_heads=num_heads)
        head_dim = hidden_size // num_heads
        position_dim = head_dim if position_dim is None else position_dim
        require_integers(1, num_splats=num_splats, position_dim=position_dim)
        require_integers(0, window_size=window_size, conv_size=conv_size)
        require_one_of(ROUTINGS, routing=routing)
        require_one_of(GRAINS, decay=decay)
        if window_size:
            require_even_positions(position_dim)
        for name, given in (("window_size", window_size), ("decay", decay)):
            if not causal and given:
                raise ValueError(f"{name} is {given!r} with causal=False: it needs an order of tokens")
        self.hidden_size, self.num_heads, self.num_splats = hidden_size, num_heads, num_splats
        self.causal, self.window_size, self.routing, self.decay = causal, window_size, routing, decay
        self.silenced: frozenset[str] = frozenset()  # memories switched off, see `silence`

        self.projections = HeadProjections(
            hidden_size,
            num_heads,
            position_dim,
            tied_positions=tied_positions,
            conv_size=conv_size,
            causal=causal,
        )
        self.centers = nn.Parameter(torch.empty(num_heads, num_splats, position_dim))
        self.log_scales = nn.Parameter(torch.empty(num_heads, num_splats))
        self.log_amplitudes = nn.Parameter(torch.empty(num_heads, num_splats))
        self.prior_log_mass = nn.Parameter(torch.empty(num_heads, num_splats))
        self.prior_content = nn.Parameter(torch.empty(num_heads, num_splats, head_dim))
        decays = {None: 0, "head": num_heads, "splat": num_heads * num_splats}[decay]
        self.decay_proj = nn.Linear(hidden_size, decays) if decays else None
        self.write_gate_proj = nn.Linear(hidden_size, num_heads * num_splats) if write_gate else None
        self.memory_gate_proj = nn.Linear(hidden_size, 2 * num_heads) if window_size else None
        self.window_log_scale = nn.Parameter(torch.empty(num_heads)) if window_size else None
        self.value_skip = nn.Parameter(torch.empty(num_heads)) if value_skip else None
        self.output = HeadOutput(hidden_size, num_heads, head_norm=head_norm, output_gate=output_gate)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values of this layer's own parameters (its submodules know theirs)."""
        width = self.centers.shape[-1]
        # centers lie on the sphere of the positions, |c|^2 = P, and sigma^2 = sqrt(P) / 2
        self.centers.copy_(F.rms_norm(torch.randn_like(self.centers), (width,)))
        self.log_scales.fill_(0.5 * math.log(math.sqrt(width) / 2))
        self.log_amplitudes.zero_()
        self.prior_log_mass.fill_(PRIOR_LOG_MASS)
        self.prior_content.zero_()
        if self.decay_proj is not None:  # half-lives from 5 to 280 tokens
            nn.init.normal_(self.decay_proj.weight, std=0.02)
            heads = torch.linspace(2.0, 6.0, self.num_heads)
            self.decay_proj.bias.copy_(heads.repeat_interleave(self.decay_proj.out_features // self.num_heads))
        if self.write_gate_proj is not None:  # nearly open
            nn.init.normal_(self.write_gate_proj.weight, std=0.02)
            nn.init.constant_(self.write_gate_proj.bias, 2.0)
        if self.memory_gate_proj is not None:
            nn.init.normal_(self.memory_gate_proj.weight, std=0.02)
            nn.init.zeros_(self.memory_gate_proj.bias)
        if self.window_log_scale is not None:
            self.window_log_scale.zero_()
        if self.value_skip is not None:
            self.value_skip.fill_(1.0)

    @property
    def splats(self) -> Splats:
        return Splats(self.centers, self.log_scales, self.log_amplitudes)

    def initial_state(self, batch: int) -> SplatState:
        """The learned prior: what the splats hold before the first token."""
        dtype = inner_dtype(self.prior_content.dtype)
        mass = self.prior_log_mass.to(dtype).exp()
        total = mass[..., None] * self.prior_content.to(dtype)
        return SplatState(mass.expand(batch, *mass.shape), total.expand(batch, *total.shape))

    def forward(
        self,
        hidden_states: Float[Tensor, "B T C"],
        *,
        attention_mask: Bool[Tensor, "B T"] | None = None,
        state: SplatAttentionState | None = None,
    ) -> tuple[Float[Tensor, "B T C"], SplatAttentionState]:
        """Output and the state after the last token. `attention_mask` is False (or 0) for padding."""
        check_inputs(self.hidden_size, hidden_states, attention_mask)
        if state is not None:
            check_layer_state(state, self._shapes_of_state(hidden_states.shape[0]), hidden_states.dtype)
        hidden_states, real = only_real(hidden_states, attention_mask)
        if state is None:
            state = SplatAttentionState(self.initial_state(hidden_states.shape[0]), None, None)
        send_positions, receive_positions, values, convolution = self.projections(hidden_states, state.convolution)
        leaving = WindowState(
            send_positions, values, real, self._log_decay(hidden_states), self._write_gate(hidden_states)
        )

        near, window = None, None
        if self.window_size:
            earlier = state.window or _empty_window(leaving, self.window_size)
            reach = _each(lambda old, new: torch.cat([old, new], 1), earlier, leaving)  # W + T tokens
            near = self._hear_window(receive_positions, reach)
            length = hidden_states.shape[1]
            leaving = _each(lambda part: part[:, :length], reach)
            window = _each(lambda part: part[:, length:].clone(), reach)  # a view would keep all tokens alive
        far, splats = splat_attention(
            leaving.send_positions,
            receive_positions,
            leaving.values,
            self.splats,
            causal=self.causal,
            routing=self.routing,
            log_decay=leaving.log_decay,
            write_gate=leaving.write_gate,
            padding_mask=None if attention_mask is None and window is None else leaving.real,
            state=state.splats,
        )
        heard = self._combine(near, far, hidden_states)
        if self.value_skip is not None:
            heard = heard + values * self.value_skip[:, None]
        return self.output(heard, hidden_states), SplatAttentionState(splats, window, convolution)

    def _shapes_of_state(self, batch: int) -> SplatAttentionState:
        """A state that holds a shape in the place of each tensor."""
        head_dim = self.prior_content.shape[-1]
        per_head = (batch, self.window_size, self.num_heads)
        per_splat = (*per_head, self.num_splats)
        window = WindowState._make(
            [
                (*per_head, self.centers.shape[-1]),
                (*per_head, head_dim),
                per_head[:2],
                {None: None, "head": per_head, "splat": per_splat}[self.decay],
                per_splat if self.write_gate_proj else None,
            ]
        )
        mass = (batch, self.num_heads, self.num_splats)
        contents = SplatState._make([mass, (*mass, head_dim)])
        convolution = self.projections.shape_of_state(batch)
        return SplatAttentionState._make([contents, window if self.window_size else None, convolution])

    def _log_decay(self, hidden_states: Float[Tensor, "B T C"]) -> Float[Tensor, "B T H *M"] | None:
        if self.decay_proj is None:
            return None
        log_decay = F.logsigmoid(self.decay_proj(hidden_states).to(inner_dtype(hidden_states.dtype)))
        return log_decay.unflatten(-1, (self.num_heads, self.num_splats)) if self.decay == "splat" else log_decay

    def _write_gate(self, hidden_states: Float[Tensor, "B T C"]) -> Float[Tensor, "B T H M"] | None:
        if self.write_gate_proj is None:
            return None
        return (
            self.write_gate_proj(hidden_states)
            .to(inner_dtype(hidden_states.dtype))
            .sigmoid()
            .unflatten(-1, (self.num_heads, self.num_splats))
        )

    def _hear_window(self, receive_positions: Float[Tensor, "B T H P"], reach: WindowState) -> Float[Tensor, "B T H D"]:
        """The positions serve as queries and keys, sharpened by a learned scale a head."""
        assert self.window_log_scale is not None  # for the type checker: there is a window
        queries = receive_positions * self.window_log_scale.exp()[:, None]
        dtype = reach.values.dtype
        return window_attention(queries.to(dtype), reach.send_positions.to(dtype), reach.values, reach.real)

    def _combine(
        self,
        near: Float[Tensor, "B T H D"] | None,
        far: Float[Tensor, "B T H D"],
        hidden_states: Float[Tensor, "B T C"],
    ) -> Float[Tensor, "B T H D"]:
        """Near and far, weighed by gates per token and head."""
        if "splats" in self.silenced:
            far = torch.zeros_like(far)
        if near is None or self.memory_gate_proj is None:
            return far
        if "window" in self.silenced:
            near = torch.zeros_like(near)
        near_gate, far_gate = self.memory_gate_proj(hidden_states).sigmoid()[..., None].chunk(2, -2)
        return near_gate * near + far_gate * far


def _each(function: Callable[..., Tensor], *states: WindowState) -> WindowState:
    """`function` of the corresponding parts of window states, where they exist."""
    parts = (None if parts[0] is None else function(*parts) for parts in zip(*states, strict=True))
    return WindowState._make(parts)


def _empty_window(tokens: WindowState, window_size: int) -> WindowState:
    """A window before the first token: zeros, none of them real."""
    return _each(lambda part: part.new_zeros(part.shape[0], window_size, *part.shape[2:]), tokens)
