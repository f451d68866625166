"""The ledger as a page: `docs/speed.md` and its pictures. No table holds what the ledger does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .cases import Case, label, size_of
from .ledger import Row, by_machine
from .pictures import PICTURES, draw, prefix_of
from .targets import verdicts

PAGE = Path(__file__).parents[2] / "docs" / "speed.md"

HOW_TO_READ = """
Every figure of this page comes from `benchmarks/results/speed.jsonl`, a line for each with its machine, versions,
commit, command and seed, and is written here by `python -m benchmarks.speed report`. The newest line of a case counts.

**Checked first.** Before anything is timed every backend is compared with the definition in fp64, on fresh inputs, with
memory that nobody has written full of NaN: output, state and every gradient, of packed documents and of heads that
share a sender too; and a decoded token of the hybrid with its two memories worked out one by one. What is wrong is not
timed.

**Timed in turn.** All contenders of a group are called in rounds (A B C A B C ...), each call on another set of inputs
and after other memory has been written, so that nothing is found in a cache. The median and, beside it, the range of
the middle half of the rounds. On a GPU events are timed.

**Times the floor.** In the same rounds so many bytes are copied as any way to do the same has to move: forward reads
queries, keys and values (positions and values) once and writes the output once, four tensors; forward and backward move
eleven. A copy of q, k, v and the output, which an aim speaks of, moves eight, twice the floor. *Times the best peer* is
beside the quickest that is no splats in the same group. Who remembers what is in *state*: numbers a head and sequence;
keys and slots of the others are as wide as it takes to remember as much as 64 splats. Peak memory is what a call needs
above its inputs.

**Not measured** is what would take too long, does not fit or cannot be done; the reason stands in its place.
""".strip()

HEADINGS = {
    "operator": "{causal}, {passes}",
    "memory": "Memory at ten times the length",
    "decode": "Decoding one token, the operator alone",
    "training": "Whole models, a training step",
    "generation": "Whole models, decoding",
}
REMARKS = {
    "memory": "One sequence, forward and backward. Attention that stores its matrix, and the others at ten times the "
    "length.",
    "decode": "The floor copies as many bytes as have to be moved: a cache is read, splats are read and written. The "
    "cache is full already; what it costs to make it longer is left out.",
    "training": "A step of AdamW on texts of random bytes.",
    "generation": "The softmax twin is the one of this package: it copies its cache to make it longer, and turns all "
    "of its keys at every step.",
}


def write(rows: list[Row]) -> None:
    """Draws the pictures and writes the page. Pictures of an earlier ledger are removed."""
    PICTURES.mkdir(exist_ok=True)
    for old in PICTURES.glob("speed-*.svg"):
        old.unlink()
    pictures = draw(rows)
    for name, svg in pictures.items():
        (PICTURES / name).write_text(svg, encoding="utf-8")
    PAGE.write_text(page(rows, pictures), encoding="utf-8")
    print(f"docs/{PAGE.name} and its pictures, from {len(rows)} rows")


def page(rows: list[Row], pictures: Iterable[str]) -> str:
    """The whole page, as Markdown; `pictures` are names of files."""
    parts = ["# Speed", HOW_TO_READ, *([] if rows else ["The ledger is empty."])]
    for machine, here in by_machine(rows).items():
        parts += [f"## {machine}", circumstances(here)]
        if judged := verdicts(here):
            lines = [[one.aim, one.figure, "**met**" if one.met else "**missed**"] for one in judged]
            parts.append(markdown(["aim", "figure", ""], lines))
        parts += [checks(here)]
        mine = [name for name in pictures if name.startswith(prefix_of(machine))]
        parts += [f"![{Path(name).stem.replace('-', ' ')}](pictures/{name})" for name in mine]
        for heading, group in tables(here).items():
            subject = group[0]["case"].subject
            remark = [REMARKS[subject]] if subject in REMARKS else []
            parts += [f"### {heading}", *remark, table(group)]
        parts += left_out(here)
    return "\n\n".join(parts) + "\n"


def circumstances(rows: list[Row]) -> str:
    """What the rows of a machine were measured with."""
    versions = sorted({row["versions"] for row in rows})
    commits = sorted({row["commit"] for row in rows})
    codes = sorted({row["code"] for row in rows})
    dates = sorted(row["date"][:10] for row in rows)
    seeds = sorted({row["seed"] for row in rows})
    loads = sorted(row["load"] for row in rows)
    first = f"{len(rows)} rows from {dates[0]} to {dates[-1]}, with {'; '.join(versions)}."
    first += f" Load of the machine, the measurement included: {loads[0]:g} to {loads[-1]:g}."
    return f"{first} Commits: {', '.join(commits)} (code {', '.join(codes)}). Seeds: {', '.join(map(str, seeds))}."


def checks(rows: list[Row]) -> str:
    """A line for each check of a backend."""
    lines = []
    for row in rows:
        if row["case"].subject == "check":
            of_calls = [str(row.get("calls", ""))]
            errors = [f"{row[name]:.1e}" if name in row else "" for name in ("output", "gradient")]
            lines.append(
                [label(row["case"]), *of_calls, *errors, f"**{row['result']}** {row.get('reason', '')}".strip()]
            )
    return markdown(["checked", "calls", "greatest error, fp32", "of a gradient", ""], lines)


def tables(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by the heading under which they are shown, in the order of `HEADINGS`."""
    found: dict[str, list[Row]] = {}
    for subject, heading in HEADINGS.items():
        kinds = sorted({(row["case"].causal, row["case"].passes) for row in rows if row["case"].subject == subject})
        for causal, passes in reversed(kinds):
            title = heading.format(causal="Causal" if causal else "Bidirectional", passes=passes)
            found[title] = [
                row
                for row in rows
                if (row["case"].subject, row["case"].causal, row["case"].passes) == (subject, causal, passes)
            ]
    return found


def table(rows: list[Row]) -> str:
    """A line for each case: by length, and within a length in the order in which they were measured."""
    case = rows[0]["case"]
    tokens = case.subject in ("training", "generation")
    header = ["batch x tokens", "who", "ms", "middle half", "tokens/s" if tokens else "times the floor"]
    lines = []
    copies: set[tuple[str, int]] = set()
    for row in sorted(rows, key=lambda row: (row["case"].seq_len, row["case"].batch)):
        size, best = size_of(row["case"]), best_peer(row["case"], rows)
        if "floor" in row and (size, row["least_bytes"]) not in copies:
            copies.add((size, row["least_bytes"]))
            lines.append([size, *copy_cells(row)])
        lines.append([size, label(row["case"]), *figures(row, best, tokens)])
    sizes = f"{case.num_heads} heads of width {case.head_dim}, {case.dtype}."
    return sizes + "\n\n" + markdown([*header, "times the best peer", "peak MiB", "state"], lines)


def copy_cells(row: Row) -> list[str]:
    """The floor itself: how long the copy took, and how many bytes it read and wrote a second."""
    rate = f"{row['least_bytes'] / row['floor'] / 1e9:,.1f} GB/s"
    moved = f"a copy that moves {row['least_bytes'] / 2**20:,.3g} MiB"
    return [moved, f"{1000 * row['floor']:.4g}", rate, "1", "", "", ""]


def figures(row: Row, best: Row | None, tokens: bool) -> list[str]:
    """Cells of a row; the reason in place of the time where there is none."""
    memory = f"{row['bytes'] / 2**20:,.1f}" if "bytes" in row else ""
    state = f"{row['state']:,}" if row.get("state") is not None else ""
    if "seconds" not in row:
        reason = "" if row["result"] == "measured" else f"{row['result']}: {row.get('reason', '')}"
        return [reason, "", "", "", memory, state]
    spread = f"{1000 * row['low']:.3g} to {1000 * row['high']:.3g}"
    if row["rounds"] == 1:
        spread = row.get("reason", "one call")
    if tokens:
        ratio = f"{row['tokens'] / row['seconds']:,.0f}"
    else:
        ratio = f"{row['seconds'] / row['floor']:.2f}" if "floor" in row else ""
    beside = f"{row['seconds'] / best['seconds']:.3g}" if best is not None else ""
    return [f"{1000 * row['seconds']:.4g}", spread, ratio, beside, memory, state]


def best_peer(case: Case, rows: list[Row]) -> Row | None:
    """The quickest that is no splats among those of the same size."""
    size = (case.batch, case.seq_len)
    peers = [
        row
        for row in rows
        if (row["case"].batch, row["case"].seq_len) == size
        and "seconds" in row
        and not row["case"].what.startswith("splat")
    ]
    return min(peers, key=lambda row: row["seconds"], default=None)


def left_out(rows: list[Row]) -> list[str]:
    """Who could not take part, and why."""
    reasons: dict[tuple[str, str], None] = {}
    for row in rows:
        if row["case"].subject == "contender":
            reasons[row["case"].what, row["reason"]] = None
    if not reasons:
        return []
    return ["### Left out", markdown(["who", "why"], [[*reason] for reason in reasons])]


def markdown(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
