"""splatflow: splat attention for PyTorch.

The operator is `splat_attention`, the layer `SplatAttention`; the Hugging Face model lives in `splatflow.models`.
"""

from .nn import SplatAttention
from .ops import Lattice, Splats, SplatState, splat_attention

__all__ = ["Lattice", "SplatAttention", "SplatState", "Splats", "splat_attention"]
__version__ = "0.1.0"
