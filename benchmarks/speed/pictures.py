"""Pictures of the ledger: how far from the floor, how much memory, how long a token takes to decode."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from splatflow.diagnostics import COLORS, drawing, svg_text
from splatflow.diagnostics.page import short_count

from .cases import BOTH, FORWARD, Case, label
from .ledger import Row, by_machine

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
SHOWN_SPLATS = (16, 64)  # of four, that eight lines at most share a picture


def draw(rows: list[Row]) -> dict[str, str]:
    """SVG of every picture for which there are figures, by file name."""
    pictures = {}
    for machine, here in by_machine(rows).items():
        pictures |= {f"{prefix_of(machine)}{name}.svg": svg for name, svg in draw_machine(here).items()}
    return pictures


def prefix_of(machine: str) -> str:
    """
    >>> prefix_of("AMD EPYC, 2 threads")
    'speed-amd-epyc-2-threads-'
    """
    return "speed-" + re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-") + "-"


def draw_machine(rows: list[Row]) -> dict[str, str]:

    def picks(subject: str, causal: bool, passes: str) -> Callable[[Case], bool]:
        return lambda case: (case.subject, case.causal, case.passes) == (subject, causal, passes)

    asked = {
        "forward": (
            picks("operator", True, FORWARD),
            times_floor,
            "causal, forward: times the copy",
        ),
        "training": (picks("operator", True, BOTH), times_floor, "causal, forward and backward: times the copy"),
        "bidirectional": (picks("operator", False, FORWARD), times_floor, "bidirectional, forward: times the copy"),
        "memory": (picks("operator", True, BOTH), bytes_a_token, "causal, forward and backward: peak bytes a token"),
        "decode": (picks("decode", True, FORWARD), microseconds, "one token after a context, microseconds"),
        "model": (picks("training", True, BOTH), tokens_a_second, "whole models, training: tokens a second"),
    }
    pictures = {}
    for name, (wanted, height, title) in asked.items():
        lines = lines_of([row for row in rows if wanted(row["case"])], height)
        if any(len(line) > 1 for line in lines.values()):
            pictures[name] = _on_white(picture(lines, title))
    return pictures


def times_floor(row: Row) -> float | None:
    return row["seconds"] / row["floor"] if "floor" in row else None


def bytes_a_token(row: Row) -> float | None:
    return row["bytes"] / row["tokens"] if row.get("bytes") else None


def microseconds(row: Row) -> float | None:
    return 1e6 * row["seconds"] if "seconds" in row else None


def tokens_a_second(row: Row) -> float | None:
    return row["tokens"] / row["seconds"] if "seconds" in row else None


def lines_of(rows: list[Row], height: Callable[[Row], float | None]) -> dict[str, list[tuple[int, float]]]:
    """(length, height) of each contender that is shown."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        case = row["case"]
        value = height(row)
        if value is not None and (case.num_splats in SHOWN_SPLATS or not case.num_splats or "decay" in case.what):
            lines.setdefault(label(case), []).append((case.seq_len, value))
    return {name: sorted(line) for name, line in lines.items()}


def picture(lines: dict[str, list[tuple[int, float]]], title: str) -> str:
    with drawing(7.2, 4.2) as (figure, axes):
        axes.set_xscale("log")
        axes.set_yscale("log")
        for index, (name, line) in enumerate(lines.items()):
            color = COLORS[index % len(COLORS)]
            width = 2.4 if name.startswith("splat") else 1.2
            axes.plot(*zip(*line, strict=True), color=color, marker="o", linewidth=width, label=name)
        lengths = sorted({length for line in lines.values() for length, _ in line})
        axes.set_xticks(lengths, labels=[short_count(length) for length in lengths])
        axes.minorticks_off()
        axes.set_xlabel("tokens of a sequence")
        axes.set_title(title)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return svg_text(figure, title)


def _on_white(svg: str) -> str:
    """A white ground, so that a dark page does not swallow the axes."""
    return re.sub(r"(<svg[^>]*>)", r'\1<rect width="100%" height="100%" fill="white"/>', svg, count=1)
