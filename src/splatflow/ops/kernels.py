"""Where kernels stand in for plain torch on the sparse path: decided here alone, and imported at first use.

What there is no kernel for is None, and done in torch: on a CPU, in fp64, and beyond the sizes below.
"""

# B batch, T token, H head, N sequence and head, M row of the table, E event, X row width, P position width

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .splats import Lattice, Splats

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

MOST_POINTS, WIDEST_POSITION, MOST_CHOSEN = 256, 128, 8  # of a search
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def run_on(device: torch.device) -> bool:
    """Whether kernels run there. On a CPU they are interpreted, which is slow, so only tests of kernels have it so."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def search_for(
    positions: Float[Tensor, "B T H P"], splats: Splats | Lattice, top_p: int
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The search among the splats of a lattice: (positions, lattice, bias, top_p) -> places in both halves."""
    fits = (
        isinstance(splats, Lattice)
        and splats.centers.shape[2] <= MOST_POINTS
        and positions.shape[-1] <= WIDEST_POSITION
        and top_p <= MOST_CHOSEN
        and positions.numel() > 0
        and positions.dtype in NARROW
    )
    if not fits or not run_on(positions.device):
        return None
    from .triton.sparse import best_pairs

    return best_pairs


def scan_for(table: Float[Tensor, "N M X"]) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """`run` of `scan.py`, of all events at once."""
    if table.dtype != torch.float32 or not run_on(table.device):
        return None
    from .triton.sparse import run

    return run
