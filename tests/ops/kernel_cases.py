"""What tests of the kernels share: small tiles and segments, so that short sequences meet all borders, and poison."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from cases import Arguments, make_arguments
from torch import Tensor

from splatflow.ops import kernels
from splatflow.ops.triton import cutting, launch_sparse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE, SEGMENT = 16, 32
TOLERANCE = 1e-5  # of fp32
WIDTHS = ((7, 4, 5), (1, 1, 1), (17, 3, 2), (16, 16, 16), (5, 19, 3), (3, 2, 18))  # M, P, D
OF_STATES = ("mass", "total")
EVENTS_OF_TILE, EVENTS_OF_SEGMENT = 4, 8  # of one row, in a scan


@contextmanager
def small_and_poisoned() -> Iterator[None]:
    """Segments of two tiles; and what is not written is NaN."""
    rules = {"TILES": dict.fromkeys(cutting.TILES, TILE), "FEWEST_TILES": SEGMENT // TILE}
    with patch.multiple(cutting, **rules, PROGRAMS=1000, KEPT_TILES=2), poisoned():
        yield


@contextmanager
def few_events_and_poisoned() -> Iterator[None]:
    """Segments of two tiles in a scan, whose rows come in slices of few columns, and 16 tokens a tile in a search."""
    rules = {"TILE": EVENTS_OF_TILE, "SEGMENT": EVENTS_OF_SEGMENT, "LOOKED_UP": 8, "COLUMNS": 4, "SCORES": 1}
    with patch.multiple(launch_sparse, **rules), poisoned():
        yield


@contextmanager
def sparse_by_kernels() -> Iterator[None]:
    """The sparse path takes kernels, on a CPU too."""
    with patch.object(kernels, "run_on", lambda device: True):
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    def filled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poison(*arguments: Any, **options: Any) -> Tensor:
            empty = function(*arguments, **options)
            return empty.fill_(torch.nan) if empty.is_floating_point() else empty

        return poison

    with (
        patch.object(torch, "empty_like", filled(torch.empty_like)),
        patch.object(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty)),
    ):
        yield


def make(**sizes: Any) -> Arguments:
    arguments = make_arguments(**{"B": 1, "H": 2, "dtype": torch.float32, **sizes})
    return {name: part.to(DEVICE) for name, part in arguments.items()}


def boundaries_of(*lengths: int) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def make_packed(boundaries: list[int], **sizes: Any) -> Arguments:
    """Arguments of a batch of one, with a state for each document if any is wanted."""
    arguments = make(**{**sizes, "T": boundaries[-1]})
    if "mass" in arguments:
        states = make(**{**sizes, "T": 1, "B": len(boundaries) - 1})
        arguments |= {name: states[name] for name in OF_STATES}
    return arguments


def packed_at(boundaries: list[int]) -> dict[str, Any]:
    return {"backend": "triton", "cu_seqlens": torch.tensor(boundaries, dtype=torch.int32, device=DEVICE)}
