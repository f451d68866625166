"""Pure functions on tensors: no parameters, no state, no input or output."""

from .affinity import log_affinity
from .dispatch import BACKENDS, splat_attention
from .hops import mixing_of_hop
from .reach import skipped_share
from .routing import ROUTINGS, missed_share
from .splats import Lattice, Splats, SplatState
from .transform import Transform

__all__ = [
    "BACKENDS",
    "ROUTINGS",
    "Lattice",
    "SplatState",
    "Splats",
    "Transform",
    "log_affinity",
    "missed_share",
    "mixing_of_hop",
    "skipped_share",
    "splat_attention",
]
