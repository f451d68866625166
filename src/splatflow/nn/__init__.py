"""Modules: they hold parameters, shape them, and call one operator."""

from .ablation import silence
from .blocks import ShortConvolution, SwiGLU
from .cross_attention import SplatCrossAttention
from .fewer_splats import fewest_splats, keep_splats
from .geometry import keep_apart, overlap_loss, repulsion
from .softmax_attention import SoftmaxAttention
from .splat_attention import SplatAttention
from .starts import initialise_from_attention, initialise_from_batch, kmeans
from .strategy import STRATEGIES, Strategy
from .usage import dead_fraction, effective_num_splats, usage

# What a block may mix its tokens with. All are called as mixer(hidden_states, attention_mask=..., state=...).
MIXERS = {"splat": SplatAttention, "softmax": SoftmaxAttention}

__all__ = [
    "MIXERS",
    "STRATEGIES",
    "ShortConvolution",
    "SoftmaxAttention",
    "SplatAttention",
    "SplatCrossAttention",
    "Strategy",
    "SwiGLU",
    "dead_fraction",
    "effective_num_splats",
    "fewest_splats",
    "initialise_from_attention",
    "initialise_from_batch",
    "keep_apart",
    "keep_splats",
    "kmeans",
    "overlap_loss",
    "repulsion",
    "silence",
    "usage",
]
