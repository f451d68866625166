"""What is made of the contents of splats a while ago: the way of a causal sequence to maps that are not linear.

The tokens of a sequence that exist are numbered from its beginning, and chunk c holds those from c L to (c + 1) L - 1.
A token of chunk c hears, of each splat, something made of the state before token c L:

    y_i = sum_m receive_im make(state before token c L)_m

There are T / L such states, so making costs T / L times M maps instead of T times M, and no token hears a later one.
Padding has no number. So each sequence of a batch may be at another place of its chunk, and its tokens are first put
into slots in which all chunks begin alike.
"""

# B batch, T token, N chunk, L token of a chunk, H head, M splat, P position width, D value width, R a bias

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from .chunked import running
from .decay import log_decay_after
from .splats import Sources, SplatState, Targets, each

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

# `splat_attention` of some splats
Attend = Callable[..., "tuple[Tensor, SplatState]"]


class LaggedState(NamedTuple):
    """What the splats held when the last chunk was full, and how many tokens of the next there have been."""

    splats: SplatState
    num_tokens: Int[Tensor, " B"]

    @classmethod
    def first(cls, state: SplatState) -> LaggedState:
        """Before the first token, of sequences that begin with this state."""
        return cls(state, torch.zeros(len(state.mass), dtype=torch.int64, device=state.mass.device))

    def after(self, exists: Bool[Tensor, "B T"], states: SplatState, lag: int) -> LaggedState:
        """After more tokens, between whose chunks the splats were in these `states`, [B, N + 1, ...]."""
        num_tokens = self.num_tokens + exists.sum(1)
        last = torch.arange(len(exists), device=exists.device), num_tokens // lag
        return LaggedState(SplatState(*(part[last] for part in states)), num_tokens % lag)


class Slots(NamedTuple):
    """Where tokens stand when the chunks of all sequences begin alike: at which of all B N L slots."""

    at: Int[Tensor, "B T"]
    num_chunks: int  # N
    size: int  # L

    def put(self, part: Float[Tensor, "B T X"]) -> Float[Tensor, "BN L X"]:
        """Something of each token, in its slot; 0 in those that stay empty."""
        chunks = self.at.shape[0] * self.num_chunks
        empty = part.new_zeros(chunks * self.size, *part.shape[2:])
        return empty.index_copy(0, self.at.flatten(), part.flatten(0, 1)).unflatten(0, (chunks, self.size))

    def take(self, part: Float[Tensor, "BN L X"]) -> Float[Tensor, "B T X"]:
        """What stands in the slot of each token."""
        return part.flatten(0, 1).index_select(0, self.at.flatten()).unflatten(0, self.at.shape)


def slots_of(exists: Bool[Tensor, "B T"], before: Int[Tensor, " B"], lag: int) -> Slots:
    """Slots for tokens that come after the first `before` of a chunk.

    All padding of a sequence has the last of its slots in common, which no token needs if there is padding.

    Example:
        >>> exists = torch.tensor([[True, True, True], [False, True, True]])
        >>> slots_of(exists, torch.tensor([1, 0]), lag=2).at.tolist()  # chunks of slots 0 to 3, and 4 to 7
        [[1, 2, 3], [7, 4, 5]]
    """
    batch, length = exists.shape
    sequences = torch.arange(batch, device=exists.device)[:, None]
    if length == 1:  # alone in its chunk, whatever its place
        return Slots(sequences, 1, 1)
    num_chunks = max(1, -(-(lag - 1 + length) // lag))
    place = before[:, None] + exists.cumsum(1) - 1
    last = num_chunks * lag - 1
    return Slots(sequences * num_chunks * lag + torch.where(exists, place, last), num_chunks, lag)


def states_after_chunks(attend: Attend, sources: Sources, num_chunks: int, state: SplatState) -> SplatState:
    """What the splats hold at the end of each chunk, [B, N, H, M] and [B, N, H, M, D], if they begin with `state`.

    Each chunk sends by itself, as much as will be left of it at its end.
    """
    gate, log_decay = sources.write_gate, None
    assert gate is not None, "it is 0 in empty slots"
    if sources.log_decay is not None:
        gate = gate * log_decay_after(sources.log_decay.transpose(1, 2)).exp().transpose(1, 2)
        log_decay = sources.log_decay.sum(1).unflatten(0, (-1, num_chunks)).transpose(1, 2)  # [B, H, N, #M]
    _, sent = attend(
        sources.positions,
        sources.positions[:, :0],
        sources.values,
        causal=False,
        send_bias=sources.bias,
        write_gate=gate if gate.shape[-1] > 1 else gate[..., 0],
    )
    mass, total = (part.unflatten(0, (-1, num_chunks)).transpose(1, 2) for part in sent)
    masses = running(mass[..., None], state.mass[..., None], log_decay)[:, :, 1:, :, 0]
    totals = running(total, state.total, log_decay)[:, :, 1:]
    return SplatState(masses.transpose(1, 2), totals.transpose(1, 2))


def hear_chunks(
    attend: Attend, make: Callable[[SplatState], SplatState], slots: Slots, targets: Targets, states: SplatState
) -> Float[Tensor, "B T H D"]:
    """What each token hears of what `make` made of the splats before its chunk.

    Args:
        attend: `splat_attention` with its splats and options given.
        make: of the splats of sequences, splats that hold what has been made of them.
        states: before each chunk of each sequence, and after the last one, [B, N + 1, H, M] and [B, N + 1, H, M, D].
    """
    positions, bias = each(slots.put, targets)
    made = make(SplatState(*(part[:, :-1].flatten(0, 1) for part in states)))
    num_heads, width = made.total.shape[1::2]
    nothing = positions.new_empty(len(positions), 0, num_heads, width)
    nowhere = positions.new_empty(len(positions), 0, num_heads, positions.shape[-1])
    heard, _ = attend(nowhere, positions, nothing, causal=False, receive_bias=bias, state=made)
    return slots.take(heard)
