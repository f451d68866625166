"""The rivals as layers: each with its own activations, norms, gates and initial values, all in the same shell.

    projections -> short convolution -> the rival's own mixing -> head norm, output gate, projection

Departures from flash-linear-attention's layers of the same names: time steps begin evenly spread over their range, and
all at speed 1, where a draw from up to 16 would leave it to luck whether either of two heads remembers anything;
ABC has no rotary positions, and Mamba-2's convolution no bias; the norm of what was heard is one of each head.
"""

# B batch, T token, H head, P key width, D value width, M slot, C hidden size

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from splatflow.nn.blocks import HeadOutput, ShortConvolution
from splatflow.requirements import require_heads, require_integers

from .kernels import operator

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Rival(nn.Module):
    """A mixer whose memory has one knob, `size`: the width of keys a head, or the number of slots a head.

    Args:
        hidden_size: width C of the hidden states.
        num_heads: heads H; values have D = C / H numbers a head.
        size: width P of keys, or slots M.
        conv_size: tokens under a short causal convolution of queries, keys and values; 0 for none.
        head_norm, output_gate: as in `splatflow.SplatAttention`.
    """

    slots = False  # `size` counts slots

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        size: int,
        *,
        conv_size: int = 0,
        head_norm: bool = False,
        output_gate: bool = False,
    ) -> None:
        super().__init__()
        require_heads(hidden_size, num_heads=num_heads)
        require_integers(1, size=size)
        require_integers(0, conv_size=conv_size)
        self.hidden_size, self.num_heads, self.size = hidden_size, num_heads, size
        self.head_dim = hidden_size // num_heads
        self.key_dim = self.head_dim if self.slots else size
        width = num_heads * self.key_dim
        self.widths = (width, width, hidden_size)
        self.query_proj = nn.Linear(hidden_size, width, bias=False)
        self.key_proj = nn.Linear(hidden_size, width, bias=False)
        self.value_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.convolution = ShortConvolution(sum(self.widths), conv_size) if conv_size else None
        self.output = HeadOutput(hidden_size, num_heads, head_norm=head_norm, output_gate=output_gate)
        self.add_parts()
        self.reset_parameters()

    def add_parts(self) -> None:
        """Parameters and modules that only this rival has."""

    def reset_parameters(self) -> None:
        """Initial values of the parameters and biases that only this rival has."""

    def mix(
        self,
        queries: Float[Tensor, "B T H P"],
        keys: Float[Tensor, "B T H P"],
        values: Float[Tensor, "B T H D"],
        hidden_states: Float[Tensor, "B T C"],
    ) -> Float[Tensor, "B T H D"]:
        raise NotImplementedError

    def forward(self, hidden_states: Float[Tensor, "B T C"]) -> tuple[Float[Tensor, "B T C"], None]:
        """The output. No state is returned: rivals are trained and examined on whole sequences."""
        projections = (self.query_proj, self.key_proj, self.value_proj)
        projected = torch.cat([projection(hidden_states) for projection in projections], -1)
        if self.convolution is not None:
            projected, _ = self.convolution(projected)
        heads = (part.unflatten(-1, (self.num_heads, -1)) for part in projected.split(self.widths, -1))
        return self.output(self.mix(*heads, hidden_states), hidden_states), None

    def operator(self, name: str, *tensors: Tensor) -> Float[Tensor, "B T H D"]:
        return operator(name, tensors[0].device)(*tensors)

    def activated(self, *projected: Tensor) -> Iterable[Tensor]:
        """SiLU after the convolution, for the rivals that have one only there."""
        return projected if self.convolution is None else map(F.silu, projected)

    def per_head(self, projected: Float[Tensor, "B T X"]) -> Float[Tensor, "B T H x"]:
        return projected.unflatten(-1, (self.num_heads, -1))

    @property
    def scale(self) -> float:
        return self.key_dim**-0.5

    @property
    def memory(self) -> int:
        """Numbers a head remembers."""
        return 2 * self.size * self.head_dim if self.slots else self.size * self.head_dim

    @property
    def passes(self) -> int:
        """How often a step goes through the memory with a multiply-add for each number: decay, write, read."""
        return 3

    @property
    def state_size(self) -> int:
        """Numbers remembered of one sequence: memory, normalisers, and the last inputs of the convolution."""
        convolution = (self.convolution.size - 1) * sum(self.widths) if self.convolution else 0
        return self.num_heads * self.memory + convolution

    @property
    def step_operations(self) -> int:
        """Multiply-adds of one token in the mixing of all heads, as a recurrent step; projections are left out."""
        return self.num_heads * self.memory * self.passes


class LinearAttention(Rival):
    """Features elu + 1, divided by the running normaliser. Source: Katharopoulos et al. 2020."""

    @property
    def memory(self) -> int:
        return self.size * (self.head_dim + 1)

    @property
    def passes(self) -> int:
        return 2

    def mix(self, queries: Tensor, keys: Tensor, values: Tensor, hidden_states: Tensor) -> Tensor:
        return self.operator("linear_attention", queries, keys, values)


class Based(LinearAttention):
    """Features of the exponential to second order. Source: Arora et al. 2024."""

    @property
    def memory(self) -> int:
        return (1 + self.size + self.size * (self.size + 1) // 2) * (self.head_dim + 1)

    def mix(self, queries: Tensor, keys: Tensor, values: Tensor, hidden_states: Tensor) -> Tensor:
        root = self.scale**0.5  # on both sides, so that both have features of one size
        return self.operator("based", queries * root, keys * root, values)


class GatedLinearAttention(Rival):
    """A decay for each channel of the keys, by a projection of rank 16. Source: Yang et al. 2024 (GLA)."""

    RANK, NORMALISER = 16, 16

    def add_parts(self) -> None:
        self.decay_proj = nn.Sequential(
            nn.Linear(self.hidden_size, self.RANK, bias=False), nn.Linear(self.RANK, self.num_heads * self.key_dim)
        )

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.decay_proj[1].bias)

    def mix(self, queries: Tensor, keys: Tensor, values: Tensor, hidden_states: Tensor) -> Tensor:
        queries, keys, values = self.activated(queries, keys, values)
        log_decay = self.per_head(F.logsigmoid(self.decay_proj(hidden_states)) / self.NORMALISER)
        return self.operator("gated_linear_attention", queries * self.scale, keys, values, log_decay)


class TimeStep(Rival):
    """Rivals that forget by a learned time step a head: log-decay = -exp(A_log) softplus(projection + bias)."""

    FIRST_STEPS = (0.001, 0.1)

    def add_parts(self) -> None:
        self.step_proj = nn.Linear(self.hidden_size, self.num_heads, bias=False)
        self.step_bias = nn.Parameter(torch.empty(self.num_heads))
        self.log_speed = nn.Parameter(torch.empty(self.num_heads))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        first = torch.logspace(*map(math.log10, self.FIRST_STEPS), self.num_heads)
        self.step_bias.copy_(first + torch.log(-torch.expm1(-first)))  # softplus of it is the first step
        self.log_speed.zero_()

    def step(self, hidden_states: Float[Tensor, "B T C"]) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B T H"]]:
        """(time step, log-decay)."""
        step = F.softplus(self.step_proj(hidden_states) + self.step_bias)
        return step, -self.log_speed.exp() * step


class Mamba2(TimeStep):
    """A decay a head; what is written is weighed by the time step; values skip the memory. Source: Dao and Gu 2024."""

    def add_parts(self) -> None:
        super().add_parts()
        self.skip = nn.Parameter(torch.empty(self.num_heads))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.skip.fill_(1.0)

    def mix(self, queries: Tensor, keys: Tensor, values: Tensor, hidden_states: Tensor) -> Tensor:
        queries, keys, values = F.silu(queries), F.silu(keys), F.silu(values)
        step, log_decay = self.step(hidden_states)
        heard = self.operator("gated_linear_attention", queries, keys, values * step[..., None], log_decay[..., None])
        return heard + values * self.skip[:, None]


class GatedDeltaNet(TimeStep):
    """Writes the difference from what its key already says. Source: Yang et al. 2024 (gated delta networks)."""

    @property
    def passes(self) -> int:
        return 4  # decay, what the key says, write, read

    def add_parts(self) -> None:
        super().add_parts()
        self.strength_proj = nn.Linear(self.hidden_size, self.num_heads, bias=False)

    def mix(self, queries: Tensor, keys: Tensor, values: Tensor, hidden_states: Tensor) -> Tensor:
        queries, keys, values = F.silu(queries), F.silu(keys), F.silu(values)
        queries, keys = (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + 1e-6) for part in (queries, keys))
        _, log_decay = self.step(hidden_states)
        strength = self.strength_proj(hidden_states).sigmoid()
        return self.operator("gated_delta_rule", queries * self.scale, keys, values, log_decay, strength)


class ABC(Rival):
    """Slots hold means of keys and values, weighed by exponentials of slot logits. Source: Peng et al. 2022."""

    slots = True
    LARGEST = 32.0

    @property
    def memory(self) -> int:
        return super().memory + self.size  # the running normaliser

    def add_parts(self) -> None:
        self.slot_proj = nn.Linear(self.hidden_size, self.num_heads * self.size, bias=False)

    def mix(self, queries: Tensor, keys: Tensor, values: Tensor, hidden_states: Tensor) -> Tensor:
        queries, keys, values = self.activated(queries, keys, values)
        logits = self.per_head(self.slot_proj(hidden_states)).clamp(-self.LARGEST, self.LARGEST)
        running = logits.logcumsumexp(1)
        log_decay = torch.cat([running[:, :1], running[:, :-1]], 1) - running
        write = (logits - running).exp()
        return self.operator("slot_attention", queries * self.scale, keys, values, write, log_decay)


class GatedSlotAttention(Rival):
    """A slot forgets as much as it takes in. Source: Zhang et al. 2024."""

    slots = True
    NORMALISER = 8

    def add_parts(self) -> None:
        self.slot_proj = nn.Linear(self.hidden_size, self.num_heads * self.size, bias=False)

    def mix(self, queries: Tensor, keys: Tensor, values: Tensor, hidden_states: Tensor) -> Tensor:
        log_decay = F.logsigmoid(self.per_head(self.slot_proj(hidden_states))) / self.NORMALISER
        write = -torch.expm1(log_decay)
        queries, keys, values = map(F.silu, (queries, keys, values))
        return F.silu(self.operator("slot_attention", queries, keys, values, write, log_decay))


class Raven(TimeStep):
    """Only the slots that a sigmoid router chooses forget and take in. Source: Afzal and Bick 2025 (Raven)."""

    slots = True

    def add_parts(self) -> None:
        super().add_parts()
        self.slot_proj = nn.Linear(self.hidden_size, self.num_heads * self.size, bias=False)
        self.query_norm = nn.RMSNorm(self.key_dim, eps=1e-5)
        self.key_norm = nn.RMSNorm(self.key_dim, eps=1e-5)

    @property
    def num_chosen(self) -> int:
        return max(1, self.size // 2)

    def route(self, hidden_states: Float[Tensor, "B T C"]) -> Float[Tensor, "B T H M"]:
        """Shares of the chosen slots, 0 elsewhere. While training, Gumbel noise lets other slots be tried."""
        logits = self.per_head(self.slot_proj(hidden_states))
        if self.training:
            logits = logits - torch.empty_like(logits).exponential_().log()
        chosen, index = logits.sigmoid().topk(self.num_chosen, -1)
        shares = chosen / (chosen.sum(-1, keepdim=True) + 1e-9)
        return torch.zeros_like(logits).scatter(-1, index, shares)

    def mix(self, queries: Tensor, keys: Tensor, values: Tensor, hidden_states: Tensor) -> Tensor:
        queries, keys = self.query_norm(F.silu(queries)), self.key_norm(F.silu(keys))
        _, log_decay = self.step(hidden_states)
        log_decay = log_decay[..., None] * self.route(hidden_states)
        write = -torch.expm1(log_decay)
        return F.silu(self.operator("slot_attention", queries, keys, F.silu(values), write, log_decay))


RIVALS: dict[str, type[Rival]] = {
    "linear attention": LinearAttention,
    "Based": Based,
    "Mamba-2": Mamba2,
    "GLA": GatedLinearAttention,
    "gated delta net": GatedDeltaNet,
    "ABC": ABC,
    "Gated Slot Attention": GatedSlotAttention,
    "Raven": Raven,
}
