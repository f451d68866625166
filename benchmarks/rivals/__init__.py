"""Mixers of others with a memory of fixed size, small and in plain torch, to be compared with at equal state."""

from .layers import RIVALS, Rival

__all__ = ["RIVALS", "Rival"]
