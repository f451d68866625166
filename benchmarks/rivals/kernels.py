"""Which form of an operator runs: on a GPU the peers' own kernels, where flash-linear-attention is installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from . import operators
from .operators import taylor_features

if TYPE_CHECKING:
    from torch import Tensor

Operator = Callable[..., "Tensor"]


def _linear_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    from fla.ops.linear_attn import chunk_linear_attn

    return chunk_linear_attn(F.elu(queries) + 1, F.elu(keys) + 1, values, scale=1.0, normalize=True)[0]


def _based(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    from fla.ops.linear_attn import chunk_linear_attn

    return chunk_linear_attn(taylor_features(queries), taylor_features(keys), values, scale=1.0, normalize=True)[0]


def _gated_linear_attention(queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor) -> Tensor:
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    if log_decay.shape[-1] == 1:
        return chunk_simple_gla(queries, keys, values, g=log_decay[..., 0].float(), scale=1.0)[0]
    return chunk_gla(queries, keys, values, g=log_decay.float(), scale=1.0)[0]


def _gated_delta_rule(queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, strength: Tensor) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(queries, keys, values, g=log_decay.float(), beta=strength, scale=1.0)[0]


def _slot_attention(queries: Tensor, keys: Tensor, values: Tensor, write: Tensor, log_decay: Tensor) -> Tensor:
    from fla.ops.gsa import chunk_gsa

    return chunk_gsa(queries, keys, values, s=write, g=log_decay.float(), scale=1.0)[0]


KERNELS: dict[str, Operator] = {
    "linear_attention": _linear_attention,
    "based": _based,
    "gated_linear_attention": _gated_linear_attention,
    "gated_delta_rule": _gated_delta_rule,
    "slot_attention": _slot_attention,
}


def operator(name: str, device: torch.device) -> Operator:
    """The named operator for tensors on this device. Both forms have one signature."""
    if device.type == "cuda" and _has_peers():
        return KERNELS[name]
    return getattr(operators, name)


@lru_cache
def _has_peers() -> bool:
    return find_spec("fla") is not None
