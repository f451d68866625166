"""The ledger as a page: `docs/results.md` and its pictures. No table holds what the ledger does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from .intervals import Interval, interval, paired
from .parts import HEADER, lines_of_parts
from .pictures import PICTURES, SUBJECTS, draw, file_name
from .plan import RATES, Experiment, Rows, chosen_rate, decided, fresh_rows, swept
from .remarks import HOW_TO_READ, REMARKS
from .standings import all_standings, has_overtaken
from .studies import STUDIES
from .tiers import TIERS

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
SOLVED = 0.9  # a seed has solved a study at this accuracy


def write(rows: Rows) -> None:
    """Draws the pictures and writes the page."""
    PICTURES.mkdir(exist_ok=True)
    pictures = draw(rows)
    for name, svg in pictures.items():
        (PICTURES / name).write_text(svg, encoding="utf-8")
    PAGE.write_text(page(rows, pictures), encoding="utf-8")
    print(f"docs/{PAGE.name} and its pictures, from {len(rows)} runs")


def page(rows: Rows, pictures: Iterable[str]) -> str:
    """The whole page, as Markdown; `pictures` are names of files, each shown below the first table of its study."""
    machines = sorted({f"{machine_of(row)} ({row['versions']})" for row in rows.values()})
    commits = sorted({row["commit"] for row in rows.values()})
    seconds = sum(row["seconds"] for row in rows.values())
    counted = f"{len(rows)} runs, {seconds / 3600:.1f} hours of one core or GPU, on {'; '.join(machines)}"
    parts = ["# Results", HOW_TO_READ, f"The ledger holds {counted}. Commits: {', '.join(commits)}."]
    parts += ["## Where splat attention stands", standings_table(rows), REMARKS["standings"]]
    if parts_measured := lines_of_parts(rows):
        parts += ["## What each part of the idea is worth", markdown(HEADER, parts_measured), REMARKS["parts"]]
    waiting = [*pictures]
    for tier, experiments in TIERS.items():
        for experiment in experiments:
            if any(fresh_rows(experiment, mixer, rows) for mixer in experiment.mixers):
                parts += [heading(tier, experiment), table(experiment, rows), *remarks(tier, experiment, rows)]
                mine = [name for name in waiting if name in {file_name(experiment.study, one) for one in SUBJECTS}]
                parts += [f"![{Path(name).stem.replace('-', ' ')}](pictures/{name})" for name in mine]
                waiting = [name for name in waiting if name not in mine]
    return "\n\n".join(parts) + "\n"


def machine_of(row: Mapping[str, Any]) -> str:
    return row["machine"].get("gpu", row["machine"]["cpu"])


def standings_table(rows: Rows) -> str:
    """One line for each aim for which both sides were measured."""
    lines = [
        [
            one.aim,
            f"{one.ours}: {_of(one.our_figure)}",
            f"{one.theirs}: {_of(one.their_figure)}",
            _of(one.difference, signed=True),
            f"**{one.verdict}**",
        ]
        for one in all_standings(rows)
    ]
    return markdown(["figure (more is better)", "ours", "the best other", "paired difference", "verdict"], lines)


def heading(tier: str, experiment: Experiment) -> str:
    size = f"{experiment.state:,} numbers a layer, {experiment.steps:,} steps of {experiment.batch_tokens:,} tokens"
    return f"## {experiment.study.capitalize()}: {size} (`{tier}`)"


def table(experiment: Experiment, rows: Rows) -> str:
    """A line for each contestant, best first, beside the first of the experiment; those not finished last."""
    study, baseline = STUDIES[experiment.study], experiment.mixers[0]
    finished = {mixer: fresh_rows(experiment, mixer, rows) for mixer in experiment.mixers}
    decides = partial(decided, experiment)
    done = {mixer: runs for mixer, runs in finished.items() if runs}
    others = [name for name in next(iter(done.values()))[0]["scores"] if name != study.decides]
    lines = []
    for mixer, runs in sorted(done.items(), key=lambda item: -interval([*map(decides, item[1])]).mean):
        scores = [*map(decides, runs)]
        sign = 1 if study.higher_is_better else -1
        against = (
            ""
            if mixer == baseline or baseline not in done
            else _of(
                paired([sign * score for score in scores], [sign * decides(row) for row in done[baseline]]), signed=True
            )
        )
        shown = interval([abs(score) for score in scores])
        solved = [f"{sum(score >= SOLVED for score in scores)}/{len(scores)}"] if study.higher_is_better else []
        lines.append(
            [
                mixer,
                f"{runs[0]['state_size']:,}",
                f"{runs[0]['parameters']:,}",
                f"{runs[0]['step_operations']:,}",
                rate_of(experiment, mixer, rows),
                f"**{_of(shown)}**",
                against,
                *solved,
                *(mean_of(row["scores"][name] for row in runs) for name in others),
            ]
        )
    lines += [[mixer, *["not finished"], *[""] * (len(lines[0]) - 2)] for mixer, runs in finished.items() if not runs]
    header = ["mixer", "state", "parameters", "operations", "rate", study.decides, f"less {baseline}"]
    return markdown([*header, *(["solved"] if study.higher_is_better else []), *others], lines)


def rate_of(experiment: Experiment, mixer: str, rows: Rows) -> str:
    """The rate that was chosen, marked if it is the first or the last of all: beyond it none was tried."""
    rate = chosen_rate(swept(experiment, mixer, rows))
    return f"{rate:g}" + ("*" if rate in (RATES[0], RATES[-1]) else "")


def mean_of(scores: Iterable[float | None]) -> str:
    """The mean over seeds; of training that diverged there is none."""
    known = [*scores]
    return "diverged" if None in known else f"{fmean(known):.3f}"


def remarks(tier: str, experiment: Experiment, rows: Rows) -> list[str]:
    """What has to be known before the table is believed, and what it is thought to mean."""
    said = []
    if STUDIES[experiment.study].corpus and not STUDIES[experiment.study].higher_is_better:
        overtaken = has_overtaken(experiment, rows)
        if overtaken is not None:
            counts = overtaken.mean > 0 and overtaken.excludes_zero()
            said.append(
                f"Bits of the window alone, less those of softmax attention: {_of(overtaken, signed=True)}. "
                + (
                    "Softmax attention has overtaken the window, so that the table counts."
                    if counts
                    else "Softmax attention has not overtaken the window, so that **the table says nothing about long "
                    "memory**."
                )
            )
    return said + ([REMARKS[tier, experiment.study]] if (tier, experiment.study) in REMARKS else [])


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _of(value: Interval, *, signed: bool = False) -> str:
    return f"{value.mean:{'+' if signed else ''}.3f} ± {value.reach:.3f}"
