"""How sure a mean over a few seeds is: Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

# 97.5 % quantiles of Student's t by degrees of freedom
QUANTILES = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Interval(NamedTuple):
    """A mean, and how far its 95 % interval reaches on each side."""

    mean: float
    reach: float

    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.reach


def interval(values: Sequence[float]) -> Interval:
    """The 95 % interval of the mean of 2 to 11 values, taken as normal.

    Raises:
        ValueError: another number of values.

    Example:
        >>> interval([1.0, 2.0, 3.0])
        Interval(mean=2.0, reach=2.48433820832296)
    """
    if not 2 <= len(values) <= len(QUANTILES):
        raise ValueError(f"values has {len(values)} numbers, expected 2 to {len(QUANTILES)}")
    return Interval(fmean(values), QUANTILES[len(values) - 1] * stdev(values) / math.sqrt(len(values)))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The 95 % interval of the mean difference, seed by seed: lessons and examinations of a seed are the same for all.

    Example:
        >>> paired([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
        Interval(mean=1.0, reach=0.0)
    """
    return interval([mine - other for mine, other in zip(ours, theirs, strict=True)])
