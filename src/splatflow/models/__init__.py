"""Splat attention as a language model of `transformers`: importing this package registers it with the Auto classes.

>>> from splatflow.models import SplatFlowConfig, SplatFlowForCausalLM
>>> model = SplatFlowForCausalLM(SplatFlowConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2))
>>> model.save_pretrained("my-model")  # doctest: +SKIP
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache import SplatFlowCache
from .configuration_splatflow import SplatFlowConfig
from .modeling_splatflow import SplatFlowForCausalLM, SplatFlowModel, SplatFlowPreTrainedModel

AutoConfig.register(SplatFlowConfig.model_type, SplatFlowConfig)
AutoModel.register(SplatFlowConfig, SplatFlowModel)
AutoModelForCausalLM.register(SplatFlowConfig, SplatFlowForCausalLM)

__all__ = [
    "SplatFlowCache",
    "SplatFlowConfig",
    "SplatFlowForCausalLM",
    "SplatFlowModel",
    "SplatFlowPreTrainedModel",
]
