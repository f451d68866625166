"""Fused kernels, in Triton: the room is light until `fused` is first called, which imports the kernels.

They run on CUDA, and with TRITON_INTERPRET=1, set before Triton is imported, slowly on a CPU, for tests.
"""

# B batch, T target token, S source token, H head, M splat, D value width

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..routing import ROUTINGS, Router
from ..splats import Sources, SplatState, Targets

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# how many splats, and how wide positions and values may be: what is wider does not fit into a processor's fast memory
WIDEST = {torch.bfloat16: 128, torch.float16: 64, torch.float32: 64}


def fused(
    sources: Sources, targets: Targets, router: Router, state: SplatState, *, causal: bool
) -> tuple[Float[Tensor, "B T H D"], SplatState]:
    """Output and final state, by kernels."""
    from .fused import fused as by_kernels

    return by_kernels(sources, targets, router, state, causal=causal)


def fused_over_documents(
    boundaries: Sequence[int],
    sources: Sources,
    targets: Targets,
    router: Router,
    state: SplatState,
    *,
    causal: bool,
) -> tuple[Float[Tensor, "1 T H D"], SplatState]:
    """The same of documents packed in a batch of one, each with its state."""
    from .fused import fused_over_documents as by_kernels

    return by_kernels(boundaries, sources, targets, router, state, causal=causal)


def supports(router: Router, sources: Sources, targets: Targets) -> str | None:
    """None, or why not."""
    return _not_built(router, sources, targets) or _too_large(router, sources, targets) or _nowhere_to_run(sources)


def _not_built(router: Router, sources: Sources, targets: Targets) -> str | None:
    if router.routing is not ROUTINGS["mixture"]:
        return "it is built for the routing 'mixture' alone"
    if router.top_p is not None:
        return f"it reads all splats, and top_p is {router.top_p}"
    given = {
        "receive_mixing": router.mixing,
        "transform": router.transform,
        "send_bias": sources.bias,
        "receive_bias": targets.bias,
    }
    for name, part in given.items():
        if part is not None:
            return f"it is not built for a {name}"
    return None


def _too_large(router: Router, sources: Sources, targets: Targets) -> str | None:
    tokens = {
        "send_positions": sources.positions,
        "receive_positions": targets.positions,
        "values": sources.values,
    }
    for name, part in tokens.items():
        if part.dtype not in WIDEST:
            return f"{name} is {part.dtype}, expected one of {[str(dtype) for dtype in WIDEST]}"
    widest = min([WIDEST[part.dtype] for part in tokens.values()])
    sizes = {
        "the number of splats": router.splats.num_splats,
        "the width of positions": sources.positions.shape[-1],
        "the width of values": sources.values.shape[-1],
    }
    for name, size in sizes.items():
        if not 1 <= size <= widest:
            return f"{name} is {size}, expected 1 to {widest} for tokens of {sources.positions.dtype}"
    return None


def _nowhere_to_run(sources: Sources) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    device = sources.values.device.type
    if device in ("cuda", "meta") or (device == "cpu" and is_interpreted()):
        return None
    return f"values is on {device}, expected cuda (or cpu with TRITON_INTERPRET=1)"


def is_interpreted() -> bool:
    """Whether kernels run on a CPU; Triton decides on it when it is imported."""
    from .tiles import IS_INTERPRETED

    return IS_INTERPRETED
