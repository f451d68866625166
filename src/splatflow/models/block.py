"""One block of the model: a mixer and a SwiGLU, each behind an RMS norm and beside a residual path.

    hidden = hidden + mixer(norm(hidden));  hidden = hidden + mlp(norm(hidden))

The mixer, a row of `splatflow.nn.MIXERS`, is the only place where tokens meet.
"""

# B batch, T new token, C hidden channel, H head, R bias of a head

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from splatflow.nn import MIXERS, SplatAttention, SwiGLU

from .configuration_splatflow import SplatFlowConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class PositionBias(nn.Embedding):
    """Which splats a token prefers by its place in the text, whatever it is: a learned row of biases for each place.

    Behind the last row the first comes again, so that a text may be of any length. At first there are no preferences.

    >>> import torch
    >>> PositionBias(num_embeddings=3, embedding_dim=5)(torch.tensor([[0, 1, 2, 3]])).abs().max().item()
    0.0
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, places: Int[Tensor, "B T"]) -> Float[Tensor, "B T HR"]:
        return super().forward(places % self.num_embeddings)


class SplatFlowBlock(GradientCheckpointingLayer):
    """A mixer and a SwiGLU, each behind an RMS norm and beside a residual path."""

    def __init__(self, config: SplatFlowConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None, "the configuration fills it in"
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = build_mixer(config)
        self.num_senders = config.num_key_value_heads or config.num_attention_heads
        # which splats each token of the vocabulary prefers, and each place, whatever the hidden state
        self.token_bias = self.position_bias = None
        if config.token_bias:
            self.token_bias = nn.Embedding(config.vocab_size, self.num_senders * num_biases_of(self.mixer))
        if config.position_bias:
            self.position_bias = PositionBias(config.position_bias, self.num_senders * num_biases_of(self.mixer))
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden_states: Float[Tensor, "B T C"],
        attention_mask: Bool[Tensor, "B T"] | None,
        state: Any,
        input_ids: Int[Tensor, "B T"] | None = None,
        places: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T C"], Any]:
        """`input_ids` and `places`, what number in its text each token has, are for tables of biases alone."""
        bias = self._bias(input_ids, places)
        options = {} if bias is None else {"token_bias": bias}
        mixed, state = self.mixer(self.mixer_norm(hidden_states), attention_mask=attention_mask, state=state, **options)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.mlp_norm(hidden_states)), state

    def _bias(
        self, input_ids: Int[Tensor, "B T"] | None, places: Int[Tensor, "B T"] | None
    ) -> Float[Tensor, "B T H R"] | None:
        """What the tables, if there are any, add to the log-affinities of these tokens."""
        bias = None
        if self.token_bias is not None:
            if input_ids is None:
                raise ValueError("inputs_embeds given, expected input_ids, by which token_bias looks up its table")
            bias = self.token_bias(input_ids)
        if self.position_bias is not None:
            by_place = self.position_bias(places)
            bias = by_place if bias is None else bias + by_place
        return None if bias is None else bias.unflatten(-1, (self.num_senders, -1))


def build_mixer(config: SplatFlowConfig) -> nn.Module:
    """The mixer that `config.mixer` names, given those options of the configuration that its constructor names."""
    mixer_class = MIXERS[config.mixer]
    names = {"top_p": "splat_top_p"}  # the library has a top_p of its own
    options = {
        name: getattr(config, names.get(name, name))
        for name in inspect.signature(mixer_class).parameters
        if hasattr(config, names.get(name, name)) and name != "hidden_size"
    }
    return mixer_class(config.hidden_size, config.num_attention_heads, **options)


def num_biases_of(mixer: nn.Module) -> int:
    assert isinstance(mixer, SplatAttention), "the configuration has checked it"
    return mixer.num_biases
