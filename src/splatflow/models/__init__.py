"""Splat attention as a model of `transformers`: importing this package registers it with the Auto classes.

>>> from splatflow.models import SplatFlowConfig, SplatFlowForCausalLM
>>> model = SplatFlowForCausalLM(SplatFlowConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2))
>>> model.save_pretrained("my-model")  # doctest: +SKIP
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from .cache import SplatFlowCache
from .configuration_splatflow import SplatFlowConfig
from .heads import SplatFlowForMaskedLM, SplatFlowForSequenceClassification
from .modeling_splatflow import SplatFlowForCausalLM, SplatFlowModel, SplatFlowPreTrainedModel

AutoConfig.register(SplatFlowConfig.model_type, SplatFlowConfig)
AutoModel.register(SplatFlowConfig, SplatFlowModel)
AutoModelForCausalLM.register(SplatFlowConfig, SplatFlowForCausalLM)
AutoModelForMaskedLM.register(SplatFlowConfig, SplatFlowForMaskedLM)
AutoModelForSequenceClassification.register(SplatFlowConfig, SplatFlowForSequenceClassification)

__all__ = [
    "SplatFlowCache",
    "SplatFlowConfig",
    "SplatFlowForCausalLM",
    "SplatFlowForMaskedLM",
    "SplatFlowForSequenceClassification",
    "SplatFlowModel",
    "SplatFlowPreTrainedModel",
]
