"""Pure functions on tensors: no parameters, no state, no input or output."""

from .chunked import checkpointed_blocks
from .dispatch import BACKENDS, splat_attention
from .hops import mixing_of_hop
from .routing import ROUTINGS, log_affinity
from .splats import Lattice, Splats, SplatState
from .transform import Transform

__all__ = [
    "BACKENDS",
    "ROUTINGS",
    "Lattice",
    "SplatState",
    "Splats",
    "Transform",
    "checkpointed_blocks",
    "log_affinity",
    "mixing_of_hop",
    "splat_attention",
]
