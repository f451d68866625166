"""Splat attention as a layer: tokens meet only at the splats, and, if asked, in a window of near ones."""

# B batch, T token, W window_size, H head, G head that sends, M splat, P position width, D value width, C hidden size

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from splatflow.ops import ROUTINGS, SplatState, Transform, splat_attention
from splatflow.ops.hybrid import hear_splats, hybrid_attention
from splatflow.ops.lagged import LaggedState
from splatflow.ops.splats import Targets
from splatflow.ops.window_state import WindowState, empty_window
from splatflow.requirements import (
    require_even_positions,
    require_heads,
    require_integers,
    require_no_order,
    require_one_of,
    share_of_heads,
)

from .blocks import HeadOutput, HeadProjections, check_inputs, check_layer_state, only_real
from .factors import (
    biases_of,
    check_token_bias,
    log_decay_of,
    start_nearly_open,
    start_with_half_lives,
    start_without_preferences,
    write_gate_of,
)
from .splat_set import SplatSet
from .super_splats import SuperSplats, mixing_of, require_hops
from .transforms import ContentMLP, ContentTransform, hear_lagged, in_two_phases, require_transform

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

# What learns to forget, if anything does: each head, or each splat of each head
Grain = Literal["head", "splat"]
GRAINS = (None, *get_args(Grain))


class SplatAttentionState(NamedTuple):
    """All that a layer remembers; its size does not depend on how many tokens there were."""

    splats: SplatState
    window: WindowState | None
    convolution: Float[Tensor, "B size-1 C"] | None
    lagged: LaggedState | None


class SplatAttention(SplatSet):
    """Each token sends its value to the splats near it and receives what the splats near it hold.

    With a window, near tokens are heard exactly and far ones through the splats: a token is sent to the splats when it
    leaves the window, so that nothing is counted twice, and a gate per head and token weighs the two.

    Args:
        hidden_size: width C of the hidden states.
        num_heads: heads H, each with its own splats; D = C / H.
        num_splats: splats M a head.
        num_key_value_heads: heads G that send and have splats, each of which H / G heads in turn receive from, as in
            grouped-query attention; H if not given. `token_bias` and all that tokens send then have G heads.
        causal: a token hears itself and what came before; otherwise all tokens.
        window_size: tokens W heard exactly, the token itself included; 0 for none.
        routing: a row of `splatflow.ops.ROUTINGS`: "mixture", "gaussian", "compact", "lattice" or "grouped".
        top_p: how many splats, the nearest, a token sends to and receives from; None: all.
        routing_bias: learn from each token which splats it prefers: two biases of its log-affinities.
        hops: how often what a splat holds goes on to others before it is received, by way of super-splats.
        num_super_splats: for each hop, a head; the root of `num_splats` if not given.
        transform: what a splat makes of its content: "linear", a learned map of rank one beside the identity for each
            splat; "mlp", one MLP for all, if not causal; "lagged", that MLP of what splats held before each chunk of
            tokens, heard beside what they hold, if causal; None, nothing.
        lag: tokens of such a chunk.
        position_dim: width P of the space in which tokens and splats lie; D if not given.
        tied_positions: a token sends and receives from one place, by one projection.
        decay: None, "head" or "splat": learn from each token how much of what came before is forgotten.
        write_gate: learn from each token how much it sends to each splat, in [0, 1]; with `top_p` to all of a head.
        value_dim: width D of what a head sends; C / H if not given.
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
        num_key_value_heads: int | None = None,
        causal: bool = True,
        window_size: int = 0,
        routing: str = "mixture",
        top_p: int | None = None,
        routing_bias: bool = False,
        hops: int = 0,
        num_super_splats: int | None = None,
        transform: ContentTransform | None = None,
        lag: int = 64,
        position_dim: int | None = None,
        value_dim: int | None = None,
        tied_positions: bool = False,
        decay: Grain | None = None,
        write_gate: bool = False,
        conv_size: int = 0,
        head_norm: bool = False,
        output_gate: bool = False,
        value_skip: bool = False,
    ) -> None:
        require_heads(hidden_size, num_heads=num_heads)
        value_dim = hidden_size // num_heads if value_dim is None else value_dim
        position_dim = hidden_size // num_heads if position_dim is None else position_dim
        require_integers(1, value_dim=value_dim, lag=lag)
        require_integers(0, window_size=window_size, conv_size=conv_size)
        require_one_of(GRAINS, decay=decay)
        require_transform(transform, causal)
        senders = share_of_heads(num_heads, num_key_value_heads)
        super().__init__(senders, num_splats, position_dim, value_dim, routing=routing, top_p=top_p)
        if window_size:
            require_even_positions(position_dim)
        if not causal:
            require_no_order(window_size=window_size, decay=decay)
        self.hidden_size, self.causal, self.window_size, self.decay = hidden_size, causal, window_size, decay
        self.num_heads, self.num_key_value_heads, self.num_receivers = num_heads, senders, num_heads // senders
        self.silenced: frozenset[str] = frozenset()  # memories switched off, see `silence`

        self.projections = HeadProjections(
            hidden_size,
            num_heads,
            position_dim,
            num_key_value_heads=senders,
            tied_positions=tied_positions,
            head_dim=value_dim,
            conv_size=conv_size,
            causal=causal,
        )
        decays = {None: 0, "head": senders, "splat": senders * num_splats}[decay]
        self.decay_proj = nn.Linear(hidden_size, decays) if decays else None
        gates = senders * (num_splats if top_p is None else 1)
        self.write_gate_proj = nn.Linear(hidden_size, gates) if write_gate else None
        biases = (senders + num_heads) * self.num_biases
        self.routing_bias_proj = nn.Linear(hidden_size, biases) if routing_bias else None
        per_hop = require_hops(hops, num_super_splats, routing, num_splats)
        self.num_super_splats = per_hop if hops else None
        self.hops = nn.ModuleList(SuperSplats(senders, per_hop, position_dim) for _ in range(hops))
        per_splat = (senders, num_splats, value_dim)
        self.listen = nn.Parameter(torch.empty(per_splat)) if transform == "linear" else None
        self.say = nn.Parameter(torch.empty(per_splat)) if transform == "linear" else None
        has_mlp = transform in ("mlp", "lagged")
        self.content_mlp = ContentMLP(value_dim, ROUTINGS[routing].running_mean) if has_mlp else None
        self.lag = lag if transform == "lagged" else None
        self.memory_gate_proj = nn.Linear(hidden_size, 2 * num_heads) if window_size else None
        self.window_log_scale = nn.Parameter(torch.empty(num_heads)) if window_size else None
        self.value_skip = nn.Parameter(torch.empty(num_heads)) if value_skip else None
        self.output = HeadOutput(
            hidden_size, num_heads, head_dim=value_dim, head_norm=head_norm, output_gate=output_gate
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values of this layer's own parameters (its submodules know theirs)."""
        self.reset_splats()
        if self.routing_bias_proj is not None:
            start_without_preferences(self.routing_bias_proj)
        if self.decay_proj is not None:
            start_with_half_lives(self.decay_proj, self.num_sets)
        if self.write_gate_proj is not None:
            start_nearly_open(self.write_gate_proj)
        if self.listen is not None and self.say is not None:  # nothing is said yet
            nn.init.normal_(self.listen, std=self.value_dim**-0.5)
            nn.init.zeros_(self.say)
        if self.memory_gate_proj is not None:
            nn.init.normal_(self.memory_gate_proj.weight, std=0.02)
            nn.init.zeros_(self.memory_gate_proj.bias)
        if self.window_log_scale is not None:
            self.window_log_scale.zero_()
        if self.value_skip is not None:
            self.value_skip.fill_(1.0)

    def forward(
        self,
        hidden_states: Float[Tensor, "B T C"],
        *,
        attention_mask: Bool[Tensor, "B T"] | None = None,
        token_bias: Float[Tensor, "B T G R"] | None = None,
        state: SplatAttentionState | None = None,
    ) -> tuple[Float[Tensor, "B T C"], SplatAttentionState]:
        """Output and the state after the last token.

        Args:
            attention_mask: False (or 0) for padding.
            token_bias: added to the log-affinities with which tokens send and receive, R = `num_biases` numbers a head:
                preferences that do not follow from the hidden states, such as a table's.
        """
        check_inputs(self.hidden_size, hidden_states, attention_mask)
        check_token_bias(token_bias, (*hidden_states.shape[:2], self.num_sets, self.num_biases))
        if state is not None:
            shapes = self._shapes_of_state(hidden_states.shape[0], token_bias is not None)
            check_layer_state(state, shapes, hidden_states.dtype)
        hidden_states, real = only_real(hidden_states, attention_mask)
        if state is None:
            state = SplatAttentionState(self.initial_state(hidden_states.shape[0]), None, None, None)
        send_positions, receive_positions, values, convolution = self.projections(hidden_states, state.convolution)
        heads = self.num_sets
        bias_proj, receivers = self.routing_bias_proj, self.num_receivers
        send_bias, receive_bias = biases_of(hidden_states, bias_proj, heads, receivers, token_bias)
        log_decay = log_decay_of(hidden_states, self.decay_proj, heads, per_splat=self.decay == "splat")
        write_gate = write_gate_of(hidden_states, self.write_gate_proj, heads, per_splat=self.top_p is None)
        tokens = WindowState(send_positions, values, real, log_decay, write_gate, send_bias)
        targets = Targets(receive_positions, receive_bias)

        how: dict[str, Any] = {
            "routing": self.routing,
            "top_p": self.top_p,
            "receive_mixing": mixing_of(self.hops, self.free_splats()) if self.hops else None,
            "transform": None if self.listen is None or self.say is None else Transform(self.listen, self.say),
        }
        attend = partial(splat_attention, splats=self.splats, **how)
        near, window, leaving = None, None, tokens
        if self.window_log_scale is not None:
            earlier = state.window or empty_window(tokens, self.window_size)
            memories = self.splats, earlier, state.splats
            near, far, window, splats, leaving = hybrid_attention(
                targets, tokens, self.window_log_scale, *memories, **how
            )
        else:
            whole_text = self.content_mlp if self.lag is None else None
            mix = attend if whole_text is None else in_two_phases(attend, whole_text)
            padded = attention_mask is not None
            far, splats = hear_splats(mix, targets, tokens, state.splats, causal=self.causal, padded=padded)
        lagged = None
        if self.content_mlp is not None and self.lag is not None:
            states = state.splats, splats, state.lagged
            exists = real | leaving.real
            added, lagged = hear_lagged(attend, self.content_mlp, self.lag, leaving, targets, exists, *states)
            far = far + added.to(far.dtype)
        heard = self._combine(near, far, hidden_states)
        if self.value_skip is not None:
            own = values if self.num_receivers == 1 else values.repeat_interleave(self.num_receivers, 2)
            heard = heard + own * self.value_skip[:, None]
        return self.output(heard, hidden_states), SplatAttentionState(splats, window, convolution, lagged)

    def _shapes_of_state(self, batch: int, token_bias: bool) -> SplatAttentionState:
        """A state that holds a shape in the place of each tensor."""
        has_bias = token_bias or self.routing_bias_proj is not None
        head_dim = self.prior_content.shape[-1]
        per_head = (batch, self.window_size, self.num_sets)
        per_splat = (*per_head, self.num_splats)
        window = WindowState._make(
            [
                (*per_head, self.position_dim),
                (*per_head, head_dim),
                per_head[:2],
                {None: None, "head": per_head, "splat": per_splat}[self.decay],
                None if self.write_gate_proj is None else per_splat if self.top_p is None else per_head,
                (*per_head, self.num_biases) if has_bias else None,
            ]
        )
        mass = (batch, self.num_sets, self.num_splats)
        contents = SplatState._make([mass, (*mass, head_dim)])
        convolution = self.projections.shape_of_state(batch)
        lagged = None if self.lag is None else LaggedState._make([contents, (batch,)])
        return SplatAttentionState._make([contents, window if self.window_size else None, convolution, lagged])

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
