"""Where splat attention stands on what it aims at: ahead, behind, or no difference shown, from the ledger's figures.

Ahead means against the best rival, tuned as hard, over the same fresh seeds, with a paired interval that excludes 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from benchmarks.rivals import RIVALS

from .intervals import Interval, interval, paired
from .plan import Experiment, Rows, decided, fresh_rows, swept
from .studies import STUDIES
from .tiers import MANY, TIERS

OURS = ("splats", "splats, decay", "splats, decay, skip", "window + splats")
# those that the project measures itself by first of all: the mixers of the largest trained models of fixed state
NAMED = ("gated delta net", "Mamba-2", "Gated Slot Attention", "Raven")
THEIRS = tuple(RIVALS)

PAIRS = ("recall", "wide recall", "long recall")  # studies of how many pairs are recalled

Figure = Callable[[Mapping[str, Any]], float]  # of a row of the ledger; more is better


class Standing(NamedTuple):
    """One aim, and what was measured for it; `difference` is ours less theirs, in the unit of the figure."""

    aim: str
    ours: str
    theirs: str
    our_figure: Interval
    their_figure: Interval
    difference: Interval

    @property
    def verdict(self) -> str:
        if not self.difference.excludes_zero():
            return "no difference shown"
        return "ahead" if self.difference.mean > 0 else "behind"


def pairs_at(row: Mapping[str, Any], share: float = 0.9) -> float:
    """How many pairs are recalled at this accuracy: between two examinations, by a straight line in log2 of the pairs.

    0 if the fewest pairs are already recalled worse, the most if all are recalled better.

    Example:
        >>> pairs_at({"scores": {"4 pairs": 1.0, "8 pairs": 0.95, "16 pairs": 0.85, "mean accuracy": 0.9}})
        11.313708498984756
    """
    scores = {name: value or 0.0 for name, value in row["scores"].items()}  # training that diverged recalls nothing
    points = sorted((int(name.split()[0]), value) for name, value in scores.items() if name.endswith(" pairs"))
    if points[0][1] < share:
        return 0.0
    for (few, above), (many, below) in pairwise(points):
        if below < share:
            return few * (many / few) ** ((above - share) / (above - below))
    return float(points[-1][0])


def best(experiment: Experiment, names: tuple[str, ...], rows: Rows, figure: Figure) -> str | None:
    """The contestant of the best mean figure on fresh seeds, of those that are finished."""
    means = {
        name: interval([figure(row) for row in finished]).mean
        for name in names
        if name in experiment.mixers and (finished := fresh_rows(experiment, name, rows))
    }
    return max(means, key=means.__getitem__) if means else None


def standing(
    aim: str, experiment: Experiment, ours: tuple[str, ...], theirs: tuple[str, ...], rows: Rows, figure: Figure
) -> Standing | None:
    """The best of ours beside the best of theirs. None while either side is not finished.

    Ours is the best on the seed of the sweep, which the comparison does not use; theirs is the best on the fresh seeds.
    """
    finished = [name for name in ours if name in experiment.mixers and fresh_rows(experiment, name, rows)]
    rival = best(experiment, theirs, rows, figure)
    if not finished or rival is None:
        return None
    mine = max(finished, key=lambda name: max(swept(experiment, name, rows).values()))
    my_figures, their_figures = ([figure(row) for row in fresh_rows(experiment, name, rows)] for name in (mine, rival))
    return Standing(aim, mine, rival, interval(my_figures), interval(their_figures), paired(my_figures, their_figures))


def pairs_per_operation(row: Mapping[str, Any]) -> float:
    """Pairs recalled at 90 % for 1,000 multiply-adds of a token in the mixing."""
    return 1000 * pairs_at(row) / row["step_operations"]


def farthest_needle(row: Mapping[str, Any]) -> float:
    """Share of the digits found at eight times the length that was learnt from."""
    return row["scores"]["1024 tokens"] or 0.0


Aim = tuple[str, tuple[str, ...], tuple[str, ...], Figure]  # what is compared, ours, theirs, by which figure


def aims_of(tier: str, experiment: Experiment) -> list[Aim]:
    """What an experiment of a tier can say of what the project aims at."""
    study, score = experiment.study, partial(decided, experiment)
    aims: list[Aim] = []
    if tier == "features":
        many = ("pairs at 90 % per 1,000 multiply-adds, many splats", (MANY,), THEIRS, pairs_per_operation)
        return [many] if study in PAIRS else []
    if study in PAIRS:
        aims.append(("pairs at 90 %", OURS, THEIRS, pairs_at))
        aims.append((f"pairs at 90 %, beside the best of {', '.join(NAMED)}", OURS, NAMED, pairs_at))
        aims.append(("pairs at 90 % per 1,000 multiply-adds", OURS, THEIRS, pairs_per_operation))
    elif study == "needle":
        aims.append(("digits at 8 times the length", OURS, THEIRS, farthest_needle))
        aims.append(("digits at 8 times the length, beside Raven", OURS, ("Raven",), farthest_needle))
    else:
        aims.append((STUDIES[study].decides, OURS, THEIRS, score))
    if not STUDIES[study].higher_is_better:
        aims.append(("hybrid beside its window", ("window + splats",), ("window only",), score))
    for gaussian, router in (("splats", "linear router"), ("splats, decay, skip", "linear router, decay, skip")):
        aims.append((f"{gaussian} beside a {router}", (gaussian,), (router,), score))
    return aims


def all_standings(rows: Rows) -> list[Standing]:
    """Every aim, in every experiment that asks for it and has been finished on both sides."""
    found = []
    for tier, experiment in ((tier, one) for tier, ones in TIERS.items() if tier != "smoke" for one in ones):
        name = f"{experiment.study}, state {experiment.state:,}, {experiment.steps:,} steps"
        for aim, ours, theirs, figure in aims_of(tier, experiment):
            found.append(standing(f"{aim}, {name}", experiment, ours, theirs, rows, figure))
    return [one for one in found if one is not None]


def has_overtaken(experiment: Experiment, rows: Rows) -> Interval | None:
    """By how much softmax attention is better than its own window alone: only then does memory beyond it count."""
    pair = [fresh_rows(experiment, name, rows) for name in ("softmax", "window only")]
    if not all(pair):
        return None
    return paired(*([decided(experiment, row) for row in finished] for finished in pair))
