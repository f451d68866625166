"""What each part of the idea is worth, in one table: its scores on every study of the tier, less those without it."""

from __future__ import annotations

from typing import NamedTuple

from .intervals import interval, paired
from .plan import Experiment, Rows, fresh_rows
from .standings import MANY
from .studies import BITS, MEAN
from .tiers import FEATURES, NOT_CAUSAL, TIERS

WITHOUT = "splats"
# in the order in which the idea names them
ORDER = (
    *(MANY, "splats, top 4", "splats, compact"),
    *("splats, write gate", "splats, routing bias", "splats, token table", "splats, place table"),
    *("splats, window", "splats, linear transform", "splats, lagged MLP"),
    *("splats, one hop", "splats, two hops", "splats, wide values", "splats, half kept"),
    *("splats, overlap loss", "splats, repulsion", "splats, minimum distance", "splats, split and prune"),
    *("splats, k-means start", "splats, curriculum", "splats, attention start", "splats, twice as long", NOT_CAUSAL),
)


class Column(NamedTuple):
    """One score of a study of the tier `features`."""

    title: str
    study: str
    score: str


COLUMNS = (
    Column("recall, 8 pairs", "recall", "8 pairs"),
    Column("recall, 32 pairs", "recall", "32 pairs"),
    Column("re-bound recall", "rebound recall", MEAN),
    Column("selective copying", "selective copying", MEAN),
    Column("bits per byte", "wikitext bytes", BITS),
)


def lines_of_parts(rows: Rows) -> list[list[str]]:
    """A line for the model without any, then one for each part of which something is measured."""
    experiments = {experiment.study: experiment for experiment in TIERS["features"]}
    assert set(ORDER) == {*FEATURES, NOT_CAUSAL}
    lines = []
    for name in (WITHOUT, *ORDER):
        sizes = _sizes(experiments, name, rows)
        if sizes:
            lines.append([name, *sizes, *(_cell(experiments[one.study], one.score, name, rows) for one in COLUMNS)])
    return lines


HEADER = ["model", "state", "parameters", "operations", *(column.title for column in COLUMNS)]


def _sizes(experiments: dict[str, Experiment], name: str, rows: Rows) -> list[str]:
    """In the first study that was run, if any was: parameters differ by what has a row for each word."""
    for column in COLUMNS:
        finished = fresh_rows(experiments[column.study], name, rows)
        if finished:
            return [f"{finished[0][key]:,}" for key in ("state_size", "parameters", "step_operations")]
    return []


def _cell(experiment: Experiment, score: str, name: str, rows: Rows) -> str:
    """The mean over fresh seeds and, for a part, the paired difference; bold if its interval excludes 0."""
    if name not in experiment.mixers:
        return "not causal"
    finished, without = (fresh_rows(experiment, one, rows) for one in (name, WITHOUT))
    if not finished:
        return "not run"
    scores = [row["scores"][score] for row in finished]
    if None in scores:
        return "diverged"
    mean = f"{interval(scores).mean:.3f}"
    others = [row["scores"][score] for row in without]
    if name == WITHOUT or not others or None in others:
        return mean
    difference = paired(scores, others)
    shown = f"{difference.mean:+.3f} ± {difference.reach:.3f}"
    return f"{mean} (**{shown}**)" if difference.excludes_zero() else f"{mean} ({shown})"
