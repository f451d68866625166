"""Numbers -> pictures -> one HTML page that needs no network and no script.

Pictures are SVG text drawn by matplotlib (the extra `viz`), the same to the byte for the same numbers.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers as well, without the two that are pale on white
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GREY = "#666666"
MEBIBYTE = 2**20

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --faint: #5f6670; --line: #d9dde2; --ground: #fafaf8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6ea; --faint: #a0a7b1; --line: #3a3f46; --ground: #16181b; }
}
body { max-width: 44rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; background: var(--ground); color: var(--text);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 2rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 0.75rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.95rem; font-variant-numeric: tabular-nums; }
th { color: var(--faint); font-weight: 600; }
th, td { padding: 0.35rem 0 0.35rem 1rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
.figure { display: flex; flex-wrap: wrap; justify-content: center; gap: 1rem; padding: 0.75rem; background: #fff;
  border: 1px solid var(--line); border-radius: 0.5rem; }
.figure svg { flex: 1 1 17rem; min-width: 0; max-width: min(100%, 30rem); height: auto; }
.figure text { font-family: system-ui, sans-serif !important; }
pre { padding: 1rem; border: 1px solid var(--line); border-radius: 0.5rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: 0.9rem; }
""".strip()


@dataclass(frozen=True)
class Section:
    """A heading, which is escaped, and the HTML under it, which is not: escape what did not come from this file."""

    heading: str
    body_html: str


def page(title: str, sections: Sequence[Section]) -> str:
    """A whole HTML document: readable on a phone, light or dark as the reader's system asks.

    >>> page("Demo", [Section("Held-out text", table(["model", "bits per byte"], [["splats", 1.78]]))])
    """
    body = "\n".join(f"<h2>{escape(section.heading)}</h2>\n{section.body_html}" for section in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table: the first column to the left, the others to the right, every cell escaped.

    Raises ValueError for a row with another number of cells than there are headers.
    """
    for index, row in enumerate(rows):
        if len(row) != len(headers):
            raise ValueError(f"rows[{index}] has {len(row)} cells, headers has {len(headers)}")
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in headers)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def figure_learning_curves(
    curves: Mapping[str, Sequence[tuple[int, float]]], levels: Mapping[str, float] | None = None
) -> str:
    """Held-out bits per byte against the tokens seen, a line for each curve; a dashed line for each level.

    Args:
        curves: name -> [(tokens, bits per byte), ...], at least one curve, none of them empty, tokens ascending.
        levels: name -> bits per byte of what does not learn in steps, such as xz or a 5-gram model.

    Raises ImportError without matplotlib, ValueError for no curve or an empty one.
    """
    levels = levels or {}
    if not curves:
        raise ValueError("curves is empty, expected at least one")
    for name, points in curves.items():
        if len(points) == 0:
            raise ValueError(f"curves[{name!r}] is empty, expected at least one (tokens, bits per byte)")

    with drawing(4.2, 3.1) as (figure, axes):
        from matplotlib.ticker import EngFormatter

        names: list[tuple[str, float, str]] = [(name, level, GREY) for name, level in levels.items()]
        for (name, points), color in zip(curves.items(), _colors(len(curves)), strict=True):
            axes.plot(*zip(*points, strict=True), color=color, marker=".")
            names.append((name, points[-1][1], color))
        for level in levels.values():
            axes.axhline(level, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
        axes.set_ylim(*_range_of_interest(curves, levels))
        # lines end at the edge, where their names are
        axes.set_xlim(0, max(points[-1][0] for points in curves.values()))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("training tokens")
        axes.set_title("bits per byte, held out")
        name_at_right_edge(axes, names)
        return _card(svg_text(figure, "bits per byte on held-out text against training tokens"))


def figure_scaling(rows: Sequence[Mapping[str, Any]]) -> str:
    """Two log-log panels: milliseconds and peak MiB against the sequence length, a line for each mixer.

    Args:
        rows: each with the keys `mixer` (a name), `seq_len` (tokens), `seconds` and `bytes`, in any order.

    Raises ImportError without matplotlib, ValueError for no rows, a missing key or a number that is not above 0.

    >>> figure_scaling([{"mixer": "splats", "seq_len": 256, "seconds": 0.002, "bytes": 2_000_000}])
    """
    _check_scaling_rows(rows)
    return _card(
        _scaling_panel("milliseconds", [(row["mixer"], row["seq_len"], row["seconds"] * 1000) for row in rows]),
        _scaling_panel("peak memory, MiB", [(row["mixer"], row["seq_len"], row["bytes"] / MEBIBYTE) for row in rows]),
    )


def short_count(number: float) -> str:
    """A count in powers of 1,024, as sequence lengths are spoken: 256, 1k, 1.5k, 16k, 1M."""
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.4g}"


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move positions apart, in their order, until all are `gap` apart or more: a crowd stays centred where it was.

    >>> spread([1.0, 0.0, 0.0], 0.5)
    [1.0, -0.25, 0.25]
    """
    crowds: list[list[int]] = []  # indices of positions, from low to high, that touch one another

    def bottom(crowd: list[int]) -> float:
        return fmean(positions[index] for index in crowd) - gap * (len(crowd) - 1) / 2

    for index in sorted(range(len(positions)), key=positions.__getitem__):
        crowds.append([index])
        while len(crowds) > 1 and bottom(crowds[-1]) < bottom(crowds[-2]) + gap * len(crowds[-2]):
            above = crowds.pop()
            crowds[-1] += above
    moved = {index: bottom(crowd) + gap * place for crowd in crowds for place, index in enumerate(crowd)}
    return [moved[index] for index in range(len(positions))]


def _check_scaling_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    if len(rows) == 0:
        raise ValueError("rows is empty, expected at least one measurement")
    for index, row in enumerate(rows):
        missing = {"mixer", "seq_len", "seconds", "bytes"} - row.keys()
        if missing:
            raise ValueError(f"rows[{index}] lacks {', '.join(sorted(missing))}")
        for key in ("seq_len", "seconds", "bytes"):
            if not row[key] > 0:
                raise ValueError(f"rows[{index}][{key!r}] is {row[key]}, a logarithmic axis needs more than 0")


def _scaling_panel(title: str, points: Sequence[tuple[str, int, float]]) -> str:
    """One panel from (mixer, seq_len, height) triples."""
    mixers = list(dict.fromkeys(mixer for mixer, _, _ in points))
    with drawing(3.6, 3.2) as (figure, axes):
        for mixer, color in zip(mixers, _colors(len(mixers)), strict=True):
            line = sorted((seq_len, height) for name, seq_len, height in points if name == mixer)
            axes.loglog(*zip(*line, strict=True), color=color, marker=".", label=mixer)
        # a tick for every length that was measured, or every second, third ... so that five at most share the panel
        lengths = sorted({seq_len for _, seq_len, _ in points})
        ticks = lengths[:: math.ceil(len(lengths) / 5)]
        axes.set_xticks(ticks, labels=[short_count(tick) for tick in ticks])
        # whole powers of ten: however flat the lines, two labelled ticks or more
        powers = [math.floor(math.log10(height)) for _, _, height in points]
        heights = [10.0**power for power in range(min(powers), max(powers) + 2)]
        axes.set_yticks(heights, labels=[f"{height:,.6g}" for height in heights])
        axes.set_ylim(heights[0], heights[-1])
        axes.minorticks_off()
        axes.set_xlabel("sequence length n")
        axes.set_title(title)
        axes.legend(frameon=False)
        return svg_text(figure, f"{title} against sequence length, for {', '.join(mixers)}")


def _range_of_interest(
    curves: Mapping[str, Sequence[tuple[int, float]]], levels: Mapping[str, float]
) -> tuple[float, float]:
    """The heights to show: all but the first tenth of training, whose fall would flatten the rest."""
    last_token = max(tokens for points in curves.values() for tokens, _ in points)
    heights = [height for points in curves.values() for tokens, height in points if tokens >= last_token / 10]
    heights += levels.values()
    margin = 0.05 * (max(heights) - min(heights)) or 0.05
    return min(heights) - margin, max(heights) + margin


def name_at_right_edge(axes: Axes, names: Sequence[tuple[str, float, str]]) -> None:
    """Write (name, height, color) beside the right edge, at its height unless another name is there."""
    bottom, top = axes.get_ylim()
    shares = [(height - bottom) / (top - bottom) for _, height, _ in names]
    for (name, _, color), share, place in zip(names, shares, spread(shares, 0.08), strict=True):
        axes.annotate(
            name,
            xy=(1.0, share),
            xytext=(1.06, place),
            xycoords="axes fraction",
            color=color,
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7, "relpos": (0, 0.5), "shrinkB": 0},
        )


def _colors(count: int) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(count)]


@contextmanager
def drawing(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """An empty sober figure, in inches, and the settings under which it must be drawn and saved."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'splatflow[viz]'") from error
    settings = {
        "svg.fonttype": "none",  # letters stay letters: they can be searched, and the page chooses the font
        "svg.hashsalt": "splatflow",  # names inside the file are otherwise random
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6e6e6",
        "lines.linewidth": 1.8,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")  # not pyplot: no window, no global state
        yield figure, figure.subplots()


def svg_text(figure: Figure, description: str) -> str:
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=no_metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # two pictures in one page would share them, and nothing refers to them
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)


def _card(*pictures: str) -> str:
    return '<div class="figure">\n' + "\n".join(pictures) + "\n</div>"
