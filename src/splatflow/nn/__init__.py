"""Modules: they hold parameters, shape them, and call one operator."""

from .ablation import silence
from .blocks import ShortConvolution, SwiGLU
from .cross_attention import SplatCrossAttention
from .softmax_attention import SoftmaxAttention
from .splat_attention import SplatAttention

# What a block may mix its tokens with. All are called as mixer(hidden_states, attention_mask=..., state=...).
MIXERS = {"splat": SplatAttention, "softmax": SoftmaxAttention}

__all__ = [
    "MIXERS",
    "ShortConvolution",
    "SoftmaxAttention",
    "SplatAttention",
    "SplatCrossAttention",
    "SwiGLU",
    "silence",
]
