"""What tests of the kernels share: small tiles and segments, so that short sequences meet all borders, and poison."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from cases import Arguments, make_arguments
from torch import Tensor

from splatflow.ops.triton import cutting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE, SEGMENT = 16, 32
TOLERANCE = 1e-5  # of fp32
WIDTHS = ((7, 4, 5), (1, 1, 1), (17, 3, 2), (16, 16, 16), (5, 19, 3), (3, 2, 18))  # M, P, D


@contextmanager
def small_and_poisoned() -> Iterator[None]:
    """Segments of two tiles; and what is not written is NaN."""
    rules = {"TILES": dict.fromkeys(cutting.TILES, TILE), "FEWEST_TILES": SEGMENT // TILE}
    with patch.multiple(cutting, **rules, PROGRAMS=1000, KEPT_TILES=2), poisoned():
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
