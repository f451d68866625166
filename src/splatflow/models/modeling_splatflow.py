"""The language model: embeddings, blocks, a final norm, and a head tied to the embeddings."""

# B batch, T new token, S any token so far, C hidden channel, V vocabulary

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .block import PositionBias, SplatFlowBlock
from .cache import SplatFlowCache, StatefulGenerationMixin
from .configuration_splatflow import SplatFlowConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class SplatFlowPreTrainedModel(PreTrainedModel):
    """What the models of this package share: configuration, initial values, saving and loading."""

    config_class = SplatFlowConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["SplatFlowBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding) and not isinstance(module, PositionBias):
            super()._init_weights(module)
        elif hasattr(module, "reset_parameters"):
            reset_missing_parameters(module)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # The library would skip a mixer whose own parameters were loaded, and leave zeros in a bias below it that the
        # checkpoint lacks and that only the mixer knows the initial values of.
        super()._initialize_weights(module, is_custom_code=False)


class SplatFlowModel(SplatFlowPreTrainedModel):
    """Token ids to hidden states, without a head."""

    def __init__(self, config: SplatFlowConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SplatFlowBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SplatFlowCache | None = None,
        inputs_embeds: Float[Tensor, "B T C"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Run T new tokens, after those that `past_key_values` has seen.

        Args:
            attention_mask: [B, S], not 0 for real tokens. Its last T columns are about the new tokens; the columns
                before them, if any, are about tokens that the cache has already taken in or left out.
            past_key_values: updated in place and returned. None is the start of a text.
            use_cache: whether to make a cache where none is given. None: as `config.use_cache`, but not in training,
                and not without a causal mask.
            output_hidden_states: also return the embeddings and what each block returned, the last one normalised.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`, a mask that does not fit the tokens, a cache
                made for another number of layers or sequences, or any cache with `causal=False`.
            TypeError: another kind of cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"{given} of input_ids and inputs_embeds given, expected exactly one")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch_size, seq_len, _ = hidden_states.shape
        if not self.config.causal:
            require_no_cache(past_key_values, use_cache)
        if use_cache is None:
            use_cache = self.config.use_cache and self.config.causal and not self.training
        if past_key_values is None:
            past_key_values = SplatFlowCache(len(self.layers)) if use_cache else None
        else:
            check_cache(past_key_values, len(self.layers), batch_size, counted=self.config.position_bias > 0)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        token_mask = mask_of_new_tokens(attention_mask, batch_size, seq_len)
        places = num_real_tokens = None
        if self.config.position_bias:
            before = None if past_key_values is None else past_key_values.num_real_tokens
            real = token_mask if token_mask is not None else torch.ones_like(hidden_states[..., 0], dtype=torch.bool)
            places, num_real_tokens = count_real(real, before)
        states = [None] * len(self.layers) if past_key_values is None else past_key_values.states
        new_states, all_hidden_states = [], []
        for layer, state in zip(self.layers, states, strict=True):
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            hidden_states, new_state = layer(hidden_states, token_mask, state, input_ids, places)
            new_states.append(new_state)
        hidden_states = self.norm(hidden_states)

        # All layers at once, after the last: an error on the way leaves the cache as it was.
        if past_key_values is not None:
            past_key_values.advance(new_states, seq_len, num_real_tokens)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
        )


class SplatFlowForCausalLM(StatefulGenerationMixin, SplatFlowPreTrainedModel):
    """Token ids to logits of the next token, with `generate()`."""

    # Used where config.tie_word_embeddings says so.
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SplatFlowConfig) -> None:
        if not config.causal:
            raise ValueError("causal is False, expected True: without a causal mask a token hears the one it predicts")
        super().__init__(config)
        self.model = SplatFlowModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SplatFlowCache | None = None,
        inputs_embeds: Float[Tensor, "B T C"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
        num_items_in_batch: int | Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V], and the mean cross entropy in nats if `labels` are given.

        Args:
            labels: the tokens themselves, not shifted; -100 marks those that do not count.
            logits_to_keep: compute the logits of the last so many tokens only, or of these tokens; 0 is all.
            num_items_in_batch: the number of tokens to divide the loss by, where one step has several batches.
            others: arguments of other models, which wrappers pass to every model. None or False, or `TypeError`.

        The rest is as in `SplatFlowModel.forward`.
        """
        require_unset(others)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


def mask_of_new_tokens(attention_mask: Tensor | None, batch_size: int, seq_len: int) -> Bool[Tensor, "B T"] | None:
    """The last `seq_len` columns of a mask [B, S] as booleans.

    >>> mask_of_new_tokens(torch.tensor([[0, 1, 1]]), batch_size=1, seq_len=2)
    tensor([[True, True]])
    """
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch_size or shape[1] < seq_len:
        raise ValueError(f"attention_mask has shape {shape}, expected ({batch_size}, {seq_len} or more)")
    return attention_mask[:, shape[1] - seq_len :].bool()


def count_real(
    real: Bool[Tensor, "B T"], before: Int[Tensor, " B"] | None = None
) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
    """How many real tokens of its own text come before each token, and how many there are after the last.

    `before` were counted in earlier calls; None is the start of the texts.

    >>> count_real(torch.tensor([[False, True, True], [True, True, True]]), before=torch.tensor([0, 7]))
    (tensor([[0, 0, 1],
            [7, 8, 9]]), tensor([ 2, 10]))
    """
    real = real.long()
    before = real.new_zeros(real.shape[0]) if before is None else before.to(real.device)
    return before[:, None] + real.cumsum(1) - real, before + real.sum(1)


def check_cache(cache: SplatFlowCache, num_layers: int, batch_size: int, *, counted: bool) -> None:
    if not isinstance(cache, SplatFlowCache):
        raise TypeError(f"past_key_values is a {type(cache).__name__}, expected a SplatFlowCache")
    if len(cache) != num_layers:
        raise ValueError(f"past_key_values has {len(cache)} layers, the model has {num_layers}")
    if cache.batch_size not in (-1, batch_size):
        raise ValueError(f"past_key_values holds {cache.batch_size} sequences, the inputs have {batch_size}")
    if counted and cache.num_tokens and cache.num_real_tokens is None:
        raise ValueError(
            f"past_key_values holds {cache.num_tokens} tokens that a model without position_bias has read, "
            "expected a cache that counts them"
        )


def require_no_cache(cache: SplatFlowCache | None, use_cache: bool | None) -> None:
    if cache is not None or use_cache:
        given = "use_cache=True" if cache is None else "past_key_values"
        raise ValueError(f"{given} given, expected no cache with causal=False: what was heard changes with each token")


def require_unset(arguments: dict[str, Any]) -> None:
    asked = [name for name, value in arguments.items() if value is not None and value is not False]
    if asked:
        raise TypeError(f"{', '.join(asked)} given, which a splatflow model does not take")


def reset_missing_parameters(module: nn.Module) -> None:
    """Call `module.reset_parameters()`, sparing the parameters that came from a checkpoint.

    A checkpoint may lack some, for instance those of a gate that is switched on before fine-tuning. The library marks
    the others.
    """
    parameters = list(module.parameters())
    loaded = [parameter for parameter in parameters if getattr(parameter, "_is_hf_initialized", False)]
    if len(loaded) == len(parameters):
        return
    values = [parameter.clone() for parameter in loaded]
    module.reset_parameters()  # type: ignore[operator]  # typed as Tensor | Module, like any attribute of a module
    for parameter, value in zip(loaded, values, strict=True):
        parameter.copy_(value)
