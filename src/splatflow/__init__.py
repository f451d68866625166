"""splatflow: splat attention for PyTorch.

The operator is `splat_attention`, the layer `SplatAttention`, and `SplatCrossAttention` that of several streams; the
Hugging Face models live in `splatflow.models`.
"""

from .nn import SplatAttention, SplatCrossAttention
from .ops import Lattice, Splats, SplatState, splat_attention

__all__ = ["Lattice", "SplatAttention", "SplatCrossAttention", "SplatState", "Splats", "splat_attention"]
__version__ = "0.1.0"
