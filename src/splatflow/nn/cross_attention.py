"""One set of splats for several streams of tokens: what one stream sends there, all of them receive."""

# B batch, T token of a stream, H head, M splat, P position width, D value width, C hidden size of a stream

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from splatflow.ops import Lattice, Splats, SplatState, splat_attention
from splatflow.requirements import require_heads, require_integers

from .blocks import HeadOutput, HeadProjections, check_inputs, only_real
from .factors import start_nearly_open, write_gate_of
from .splat_set import SplatSet

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


class Projected(NamedTuple):
    """A stream in the space of the splats."""

    send_positions: Float[Tensor, "B T H P"]
    receive_positions: Float[Tensor, "B T H P"]
    values: Float[Tensor, "B T H D"]
    write_gate: Float[Tensor, "B T H M"] | None
    real: Bool[Tensor, "B T"] | None


class StreamProjections(nn.Module):
    """One stream's own way into the space of the splats."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_splats: int,
        position_dim: int,
        head_dim: int,
        *,
        write_gate: bool,
        conv_size: int,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.projections = HeadProjections(
            hidden_size, num_heads, position_dim, head_dim=head_dim, conv_size=conv_size, causal=False
        )
        self.write_gate_proj = nn.Linear(hidden_size, num_heads * num_splats) if write_gate else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.write_gate_proj is not None:
            start_nearly_open(self.write_gate_proj)

    def forward(self, hidden_states: Float[Tensor, "B T C"], real: Bool[Tensor, "B T"] | None) -> Projected:
        send_positions, receive_positions, values, _ = self.projections(hidden_states)
        write_gate = write_gate_of(hidden_states, self.write_gate_proj, self.num_heads, per_splat=True)
        return Projected(send_positions, receive_positions, values, write_gate, real)


class SplatCrossAttention(nn.Module):
    """Streams of different widths meet at one set of splats: each sends to it, and receives what all have sent.

        mass_m = mass0_m + sum_k sum_j send^k_jm,    total_m = total0_m + sum_k sum_j send^k_jm v^k_j
        y^k_i  = sum_m receive^k_im total_m / mass_m

    A stream k is a set or sequence of tokens, of any number. Only its projections into the space of the splats and out
    of it are its own; centers, scales, amplitudes and prior are common. Nothing is causal. Work and memory are linear
    in the number of all tokens: no token of one stream is compared with one of another.

    Args:
        hidden_sizes: width C of each stream.
        num_heads: heads H, each with its own splats.
        num_splats: splats M a head.
        head_dim: width D of what a head sends; the widest stream's C / H if not given.
        position_dim: width P of the space in which tokens and splats lie; D if not given.
        routing: a row of `splatflow.ops.ROUTINGS`.
        top_p: how many splats, the nearest, a token sends to and receives from; None: all.
        write_gate: learn from each token how much it sends to each splat, in [0, 1].
        conv_size: tokens under a short centred convolution, for streams that are sequences; 0 for none.
        head_norm: RMS norm of what each head heard.
        output_gate: multiply what was heard by silu of a projection of the token.

    Source: `docs/mathematics.md`, section 1.

    Example:
        >>> layer = SplatCrossAttention(hidden_sizes=(48, 80), num_heads=4, num_splats=16)
        >>> words, patches = torch.randn(3, 20, 48), torch.randn(3, 196, 80)
        >>> (words_heard, patches_heard), state = layer((words, patches))
        >>> list(words_heard.shape), list(patches_heard.shape)
        ([3, 20, 48], [3, 196, 80])
        >>> (words_heard, _), _ = layer((words, patches), senders=(1,))  # words read patches, and not each other
    """

    def __init__(
        self,
        hidden_sizes: Sequence[int],
        num_heads: int,
        num_splats: int,
        *,
        head_dim: int | None = None,
        position_dim: int | None = None,
        routing: str = "mixture",
        top_p: int | None = None,
        write_gate: bool = False,
        conv_size: int = 0,
        head_norm: bool = False,
        output_gate: bool = False,
    ) -> None:
        super().__init__()
        if not hidden_sizes:
            raise ValueError("hidden_sizes is empty, expected the width of at least one stream")
        require_integers(1, num_heads=num_heads)
        require_integers(1, **{f"hidden_sizes[{index}]": size for index, size in enumerate(hidden_sizes)})
        if head_dim is None:
            require_heads(max(hidden_sizes), num_heads=num_heads)
            head_dim = max(hidden_sizes) // num_heads
        position_dim = head_dim if position_dim is None else position_dim
        require_integers(1, head_dim=head_dim)
        require_integers(0, conv_size=conv_size)
        self.hidden_sizes = tuple(hidden_sizes)
        self.shared = SplatSet(num_heads, num_splats, position_dim, head_dim, routing=routing, top_p=top_p)
        self.shared.reset_splats()
        self.projections = nn.ModuleList(
            StreamProjections(
                hidden_size, num_heads, num_splats, position_dim, head_dim, write_gate=write_gate, conv_size=conv_size
            )
            for hidden_size in hidden_sizes
        )
        self.outputs = nn.ModuleList(
            HeadOutput(hidden_size, num_heads, head_dim=head_dim, head_norm=head_norm, output_gate=output_gate)
            for hidden_size in hidden_sizes
        )

    def forward(
        self,
        streams: Sequence[Float[Tensor, "B _ _"]],
        *,
        attention_masks: Sequence[Bool[Tensor, "B _"] | None] | None = None,
        senders: Sequence[int] | None = None,
        state: SplatState | None = None,
    ) -> tuple[list[Float[Tensor, "B _ _"]], SplatState]:
        """Each stream's output, and what the splats hold of all that was sent.

        Args:
            streams: hidden states [B, T, C], one tensor for each of `hidden_sizes`. T may differ, and may be 0.
            attention_masks: for each stream None or [B, T], False (or 0) for padding, which sends nothing.
            senders: numbers of the streams that send; the others only receive. None: all send.
            state: what the splats hold already, from an earlier call. None: the learned prior.
        """
        masks = [None] * len(streams) if attention_masks is None else attention_masks
        self._check(streams, masks, senders)
        streams = [only_real(stream, mask)[0] for stream, mask in zip(streams, masks, strict=True)]
        projected = [
            project(stream, None if mask is None else mask.bool())
            for project, stream, mask in zip(self.projections, streams, masks, strict=True)
        ]
        splats = self.shared.splats
        state = self.shared.initial_state(streams[0].shape[0]) if state is None else state
        for index in range(len(streams)) if senders is None else senders:
            state = self._send(projected[index], splats, state)
        heard = [self._receive(stream, splats, state) for stream in projected]
        return [out(part, stream) for out, part, stream in zip(self.outputs, heard, streams, strict=True)], state

    def _send(self, stream: Projected, splats: Splats | Lattice, state: SplatState) -> SplatState:
        """The state once this stream has sent to it too."""
        _, state = splat_attention(
            stream.send_positions,
            stream.receive_positions[:, :0],
            stream.values,
            splats,
            causal=False,
            routing=self.shared.routing,
            top_p=self.shared.top_p,
            write_gate=stream.write_gate,
            padding_mask=stream.real,
            state=state,
        )
        return state

    def _receive(self, stream: Projected, splats: Splats | Lattice, state: SplatState) -> Float[Tensor, "B T H D"]:
        """What this stream hears of a state that all have sent to."""
        heard, _ = splat_attention(
            stream.send_positions[:, :0],
            stream.receive_positions,
            stream.values[:, :0],
            splats,
            causal=False,
            routing=self.shared.routing,
            top_p=self.shared.top_p,
            state=state,
        )
        return heard

    def _check(self, streams: Sequence[Tensor], masks: Sequence[Tensor | None], senders: Sequence[int] | None) -> None:
        """Raises ValueError for streams, masks or senders that this layer does not have, or that do not fit."""
        for name, given in (("streams", streams), ("attention_masks", masks)):
            if len(given) != len(self.hidden_sizes):
                raise ValueError(f"{name} has {len(given)} entries, expected {len(self.hidden_sizes)}, one a stream")
        for index, (size, stream, mask) in enumerate(zip(self.hidden_sizes, streams, masks, strict=True)):
            check_inputs(size, stream, mask, (f"streams[{index}]", f"attention_masks[{index}]"))
            if stream.shape[0] != streams[0].shape[0]:
                raise ValueError(
                    f"streams[{index}] has {stream.shape[0]} sequences, expected {streams[0].shape[0]} as in streams[0]"
                )
        known = range(len(self.hidden_sizes))
        if senders is not None and not (set(senders) <= set(known) and len(set(senders)) == len(senders)):
            raise ValueError(f"senders is {list(senders)}, expected different numbers from 0 to {known[-1]}")
