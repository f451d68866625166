"""Heads beside the causal one: tokens that are masked, and classes of whole texts."""

# B batch, T token, C hidden channel, V vocabulary, L label

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from splatflow.ops.splats import inner_dtype

from .configuration_splatflow import SplatFlowConfig
from .modeling_splatflow import SplatFlowModel, SplatFlowPreTrainedModel, mask_of_new_tokens, require_unset

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class SplatFlowForMaskedLM(SplatFlowPreTrainedModel):
    """Token ids, some of them masked, to logits of the token that belongs in each place.

    Splats without a causal mask know the order of tokens by the short convolution, and by a table if there is one
    (`position_bias`); with `conv_size=0` and no table a text is a bag of tokens. A tokenizer without a mask token, such
    as that of bytes, is given one by `tokenizer.add_special_tokens({"mask_token": "<|mask|>"})`, and the model
    `vocab_size=len(tokenizer)`.

    Raises ValueError for a causal configuration.

    >>> config = SplatFlowConfig(vocab_size=258, hidden_size=64, num_attention_heads=2, causal=False, decay=None)
    >>> model = SplatFlowForMaskedLM(config)
    >>> list(model(torch.tensor([[72, 257, 108, 108, 111]])).logits.shape)
    [1, 5, 258]
    """

    # Used where config.tie_word_embeddings says so.
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SplatFlowConfig) -> None:
        if config.causal:
            raise ValueError(
                "causal is True, expected False (and decay None): a masked token hears what follows it too"
            )
        super().__init__(config)
        self.model = SplatFlowModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "B T C"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **others: Any,
    ) -> MaskedLMOutput:
        """Logits [B, T, V], and the mean cross entropy in nats if `labels` are given.

        Args:
            attention_mask: [B, T], not 0 for real tokens.
            labels: the tokens that belong there; -100 marks those that do not count, as a rule all that can be seen.
            num_items_in_batch: the number of tokens to divide the loss by, where one step has several batches.
            others: arguments of other models, which wrappers pass to every model. None or False, or `TypeError`.

        The rest is as in `SplatFlowModel.forward`.
        """
        require_unset(others)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class SplatFlowForSequenceClassification(SplatFlowPreTrainedModel):
    """Token ids to one row of logits a text: of `config.num_labels` classes, or numbers to regress on.

    A causal model answers from its last real token, which has heard all others, a bidirectional one from the mean of
    all real tokens. Which tokens are real only `attention_mask` says: the token that pads may also end a text.

    >>> config = SplatFlowConfig(hidden_size=64, num_attention_heads=2, causal=False, decay=None, num_labels=3)
    >>> model = SplatFlowForSequenceClassification(config)
    >>> list(model(torch.tensor([[72, 101, 108, 108, 111]])).logits.shape)
    [1, 3]
    """

    # Its losses are means over texts; the Trainer is to average those of several batches itself.
    accepts_loss_kwargs = False

    def __init__(self, config: SplatFlowConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SplatFlowModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "B T C"] | None = None,
        labels: Int[Tensor, " B"] | Float[Tensor, " B"] | Float[Tensor, "B L"] | None = None,
        output_hidden_states: bool | None = None,
        **others: Any,
    ) -> SequenceClassifierOutput:
        """Logits [B, L], and a loss if `labels` are given.

        Args:
            attention_mask: [B, T], not 0 for real tokens. None: all are real.
            labels: class numbers, numbers of 0 and 1 for every label, or targets. `config.problem_type` says which
                ("single_label_classification", "multi_label_classification" or "regression"); if it is None, the
                library concludes it from the first labels given.
            others: arguments of other models, which wrappers pass to every model. None or False, or `TypeError`.

        The rest is as in `SplatFlowModel.forward`. Of texts that are padding from end to end the logits say nothing;
        to find them would hold up a GPU, so they are not refused as texts of no tokens are (`ValueError`).
        """
        require_unset(others)
        require_tokens(input_ids=input_ids, inputs_embeds=inputs_embeds)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_hidden_states=output_hidden_states,
        )
        hidden_states = outputs.last_hidden_state
        real = mask_of_new_tokens(attention_mask, *hidden_states.shape[:2])
        if real is None:
            real = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        pool = last_real if self.config.causal else mean_of_real
        logits = self.score(pool(hidden_states, real))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


def require_tokens(**inputs: Tensor | None) -> None:
    """Raises ValueError for texts that have no tokens, of which there is nothing to say."""
    for name, given in inputs.items():
        if given is not None and given.shape[1] == 0:
            raise ValueError(f"{name} has shape {list(given.shape)}, expected at least one token in a text")


def last_real(hidden_states: Float[Tensor, "B T C"], real: Bool[Tensor, "B T"]) -> Float[Tensor, "B C"]:
    """The last real token of each text; the first token where none is real."""
    places = torch.arange(real.shape[1], device=real.device)
    last = (places * real).argmax(1)
    return hidden_states[torch.arange(real.shape[0], device=real.device), last]


def mean_of_real(hidden_states: Float[Tensor, "B T C"], real: Bool[Tensor, "B T"]) -> Float[Tensor, "B C"]:
    """The mean of the real tokens of each text; 0 where none is real.

    >>> mean_of_real(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]]))
    tensor([[2.]])
    """
    # not narrower than fp32: in fp16 the sum over a long text overflows
    total = hidden_states.masked_fill(~real[..., None], 0.0).sum(1, dtype=inner_dtype(hidden_states.dtype))
    count = real.sum(1, keepdim=True).clamp_min(1)
    return (total / count).to(hidden_states.dtype)
