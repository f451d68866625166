"""Pictures of the ledger: recall against state, recall against operations, loss by position."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean

from splatflow.diagnostics import COLORS, drawing, name_at_right_edge, svg_text

from .plan import Experiment, Rows, fresh_rows
from .standings import OURS, PAIRS, pairs_at
from .studies import STUDIES
from .tiers import TIERS

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
SUBJECTS = ("state", "operations", "position")  # what a picture may be drawn against
BYTES = 4  # of a number of the state, in fp32


def draw(rows: Rows) -> dict[str, str]:
    """SVG of every picture for which there are figures, by file name."""
    everything = [one for tier, experiments in TIERS.items() for one in experiments if tier != "features"]
    pictures = {}
    for study in PAIRS:
        asked = [one for one in everything if one.study == study]
        alike = [one for one in asked if one.steps == asked[0].steps]  # one line is of one length of training
        pictures[file_name(study, "state")] = recall_against(alike, rows, "state_size", BYTES, "bytes of state a layer")
        pictures[file_name(study, "operations")] = recall_against(
            alike, rows, "step_operations", 1, "multiply-adds a token, mixing"
        )
    for experiment in everything:
        if not STUDIES[experiment.study].higher_is_better:
            pictures[file_name(experiment.study, "position")] = loss_by_position(experiment, rows)
    return {name: _on_white(svg) for name, svg in pictures.items() if svg}


def file_name(study: str, subject: str) -> str:
    """
    >>> file_name("wide recall", "state")
    'wide-recall-state.svg'
    """
    return f"{study} {subject}".replace(" ", "-") + ".svg"


def recall_against(experiments: list[Experiment], rows: Rows, field: str, unit: int, label: str) -> str:
    """Pairs recalled at 90 %, a line or a point for each contestant."""
    points: dict[str, list[tuple[float, float]]] = {}
    for experiment in experiments:
        for mixer in experiment.mixers:
            runs = fresh_rows(experiment, mixer, rows)
            # what a state that grows with the context costs has no place on this axis
            if runs and mixer != "softmax":
                points.setdefault(mixer, []).append((unit * runs[0][field], fmean(map(pairs_at, runs))))
    if not points:
        return ""
    with drawing(6.2, 4.2) as (figure, axes):
        names = []
        for index, (mixer, line) in enumerate(points.items()):
            color = COLORS[index % len(COLORS)]
            width = 2.4 if mixer in OURS else 1.2
            axes.plot(*zip(*sorted(line), strict=True), color=color, marker="o", linewidth=width)
            names.append((mixer, max(line)[1], color))
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.set_title("pairs recalled at 90 %")
        name_at_right_edge(axes, names)
        return svg_text(figure, f"pairs recalled at 90 % against {label}")


def loss_by_position(experiment: Experiment, rows: Rows) -> str:
    """Bits per byte less those of the window alone, by the place of the byte in its sequence."""
    finished = {
        mixer: runs
        for mixer in experiment.mixers
        if (runs := fresh_rows(experiment, mixer, rows)) and not any(None in row["scores"].values() for row in runs)
    }
    if "window only" not in finished or len(finished) < 2:
        return ""
    places = [name for name in finished["window only"][0]["scores"] if name.startswith("bytes ")]

    def means(mixer: str) -> list[float]:
        return [fmean(row["scores"][place] for row in finished[mixer]) for place in places]

    with drawing(6.2, 4.2) as (figure, axes):
        names = []
        for index, mixer in enumerate(finished):
            color = COLORS[index % len(COLORS)]
            line = [mine - other for mine, other in zip(means(mixer), means("window only"), strict=True)]
            axes.plot(range(len(places)), line, color=color, marker=".", linewidth=2.4 if mixer in OURS else 1.2)
            names.append((mixer, line[-1], color))
        axes.set_xticks(range(len(places)), labels=[place.removeprefix("bytes ") for place in places])
        axes.set_xlabel("place in the sequence, bytes")
        axes.set_title("bits per byte, less those of the window alone")
        name_at_right_edge(axes, names)
        return svg_text(figure, f"bits per byte by position, {experiment.study}")


def _on_white(svg: str) -> str:
    """A white ground, so that a dark page does not swallow the axes."""
    return re.sub(r"(<svg[^>]*>)", r'\1<rect width="100%" height="100%" fill="white"/>', svg, count=1)
