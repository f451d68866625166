"""Which runs are still to be made: rates on one seed first, then fresh seeds at the rate that was chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .contestants import SHELL, Shell
from .probe import Run
from .studies import STUDIES, SWEEP_SEED

RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2)
FIRST_RATES = (5e-3, 1e-2, 2e-2, 4e-2)  # tried for everyone; the rest if the best lies at an edge
NO_DIFFERENCE = 0.01  # in the score that decides; of rates this close on one seed the lowest is taken

Rows = Mapping[Run, Mapping[str, Any]]


class Experiment(NamedTuple):
    """Contestants that are compared on a study, at one size of their state."""

    study: str
    mixers: tuple[str, ...]
    state: int
    steps: int
    seeds: tuple[int, ...] = (1, 2, 3)
    shell: Shell = SHELL
    num_layers: int = 2
    batch_tokens: int = 2048

    def run(self, mixer: str, rate: float, seed: int) -> Run:
        return Run(
            self.study, mixer, self.state, rate, seed, self.steps, self.shell, self.num_layers, self.batch_tokens
        )


def decided(experiment: Experiment, row: Mapping[str, Any]) -> float:
    """The score that decides, turned so that more is better. Training that diverged knows nothing: 0, or 8 bits."""
    study = STUDIES[experiment.study]
    value = row["scores"][study.decides]
    if study.higher_is_better:
        return 0.0 if value is None else value
    return -8.0 if value is None else -value


def swept(experiment: Experiment, mixer: str, rows: Rows) -> dict[float, float]:
    """Scores of the rates that were tried on the first seed."""
    runs = {rate: experiment.run(mixer, rate, SWEEP_SEED) for rate in RATES}
    return {rate: decided(experiment, rows[run]) for rate, run in runs.items() if run in rows}


def rate_to_try(scores: Mapping[float, float]) -> float | None:
    """A rate that was not tried, next to the best one, if that one stands at an edge and is better than its neighbour.

    >>> rate_to_try({5e-3: 0.1, 1e-2: 0.2, 2e-2: 0.3, 4e-2: 0.9})
    0.08
    """
    tried = sorted(scores)
    edges = ((tried[0], tried[1], -1), (tried[-1], tried[-2], 1))
    for edge, neighbour, direction in edges:
        beyond = RATES.index(edge) + direction
        if scores[edge] == max(scores.values()) and scores[edge] > scores[neighbour] + NO_DIFFERENCE:
            return RATES[beyond] if 0 <= beyond < len(RATES) else None
    return None


def chosen_rate(scores: Mapping[float, float]) -> float:
    """The lowest rate that is as good as the best.

    >>> chosen_rate({2e-3: 0.1, 5e-3: 0.895, 1e-2: 0.9, 2e-2: 0.2})
    0.005
    """
    best = max(scores.values())
    return min(rate for rate, value in scores.items() if value >= best - NO_DIFFERENCE)


def runs_of(experiment: Experiment, mixer: str, rows: Rows) -> list[Run]:
    """The runs that can be made now, or none when this contestant is finished."""
    first = [experiment.run(mixer, rate, SWEEP_SEED) for rate in FIRST_RATES]
    missing = [run for run in first if run not in rows]
    if missing:
        return missing
    scores = swept(experiment, mixer, rows)
    another = rate_to_try(scores)
    if another is not None:
        return [experiment.run(mixer, another, SWEEP_SEED)]
    fresh = [experiment.run(mixer, chosen_rate(scores), seed) for seed in experiment.seeds]
    return [run for run in fresh if run not in rows]


def fresh_rows(experiment: Experiment, mixer: str, rows: Rows) -> list[Mapping[str, Any]]:
    """What a finished contestant's fresh seeds gave, in their order; empty if it is not finished."""
    if runs_of(experiment, mixer, rows):
        return []
    rate = chosen_rate(swept(experiment, mixer, rows))
    return [rows[experiment.run(mixer, rate, seed)] for seed in experiment.seeds]


def runs_to_make(experiments: Iterable[Experiment], rows: Rows) -> list[Run]:
    """All runs that can be made now, those of one contestant after another."""
    runs = [run for one in experiments for mixer in one.mixers for run in runs_of(one, mixer, rows)]
    return list(dict.fromkeys(runs))
