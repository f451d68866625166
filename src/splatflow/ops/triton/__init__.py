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
from ..window_state import WindowState

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# how many splats, and how wide positions and values may be: what is wider does not fit into a processor's fast memory
WIDEST = {torch.bfloat16: 128, torch.float16: 64, torch.float32: 64}
WIDEST_OF_STEPS = dict.fromkeys(WIDEST, 128)  # one token is multiplied number by number, in fp32 whatever it is


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


def window_step(
    router: Router,
    targets: Targets,
    tokens: WindowState,
    log_scale: Float[Tensor, " H"],
    window: WindowState,
    state: SplatState,
) -> tuple[Float[Tensor, "B 1 H D"], Float[Tensor, "B 1 H D"], WindowState, SplatState]:
    """Near and far output of one token, and both memories after it, by one kernel."""
    from .fused import window_step as by_kernel

    return by_kernel(router, targets, tokens, log_scale, window, state)


def supports_step(
    router: Router,
    targets: Targets,
    tokens: WindowState,
    log_scale: Float[Tensor, " H"],
    window: WindowState,
    state: SplatState,
) -> str | None:
    """None, or why `window_step` cannot do this."""
    sources = Sources(tokens.send_positions, tokens.values, tokens.send_bias, tokens.log_decay, tokens.write_gate)
    return (
        _not_built(router, sources, targets)
        or _no_step(targets, tokens, window, state)
        or _no_gradient(*targets, *tokens, log_scale, *window, *state, *router.splats)
        or _too_large(router, sources, targets, WIDEST_OF_STEPS)
        or _nowhere_to_run(sources)
    )


def _no_step(targets: Targets, tokens: WindowState, window: WindowState, state: SplatState) -> str | None:
    batch, num_tokens = tokens.real.shape
    if not window.real.shape[1]:
        return "it takes a window of at least one token, and this has none"
    if not batch or num_tokens != 1:
        return f"it takes one token of each sequence, and there are {batch} sequences of {num_tokens}"
    for name, new, old in zip(window._fields, tokens, window, strict=True):
        if new is not None and old is not None and new.dtype != old.dtype:
            return f"{name} is {old.dtype} in the window and {new.dtype} of the token"
    if any(part.dtype != torch.float32 for part in state):
        return f"state is {[str(part.dtype) for part in state]}, expected torch.float32"
    return None


def _no_gradient(*parts: Tensor | None) -> str | None:
    return "it has no gradient, and one is wanted" if wants_gradient(*parts) else None


def wants_gradient(*parts: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts)


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


def _too_large(router: Router, sources: Sources, targets: Targets, most: dict[torch.dtype, int] = WIDEST) -> str | None:
    tokens = {
        "send_positions": sources.positions,
        "receive_positions": targets.positions,
        "values": sources.values,
    }
    for name, part in tokens.items():
        if part.dtype not in most:
            return f"{name} is {part.dtype}, expected one of {[str(dtype) for dtype in most]}"
    widest = min([most[part.dtype] for part in tokens.values()])
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
