"""What a trained model owes to one of its memories is what it loses without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from splatflow.requirements import require_one_of

from .splat_attention import SplatAttention

MEMORIES = ("splats", "window")


@contextmanager
def silence(module: nn.Module, *memories: str) -> Iterator[None]:
    """Within the block, every splat attention below `module` does without the named memories ("splats", "window").

    Raises:
        ValueError: an unknown memory, or one that no layer has.

    Example:
        >>> import torch
        >>> layer = SplatAttention(hidden_size=8, num_heads=2, num_splats=3)
        >>> with silence(layer, "splats"):
        ...     layer(torch.randn(1, 5, 8))[0].abs().max().item()
        0.0
    """
    for memory in memories:
        require_one_of(MEMORIES, memory=memory)
    layers = [layer for layer in module.modules() if isinstance(layer, SplatAttention)]
    present = {"splats": bool(layers), "window": any(layer.window_size for layer in layers)}
    for memory in memories:
        if not present[memory]:
            raise ValueError(f"memory {memory!r} cannot be silenced: {type(module).__name__} has none")
    before = [layer.silenced for layer in layers]
    try:
        for layer in layers:
            layer.silenced = frozenset(memories)
        yield
    finally:
        for layer, silenced in zip(layers, before, strict=True):
            layer.silenced = silenced
