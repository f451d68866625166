"""All figures, one JSON line each: what was measured, what came out, where and when. Runs of several days add up in it.

A figure is not measured again while the code that it depends on is the same, to the byte, and so is the machine. Git is
not asked for that: a copy of the tree without history will do, and the ledger itself may be a changed file.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from splatflow.diagnostics import commit, machine

from .cases import Case

Row = dict[str, Any]

ROOT = Path(__file__).parents[2]
LEDGER = ROOT / "benchmarks" / "results" / "speed.jsonl"
MEASURED_CODE = (
    *("src/splatflow/ops", "src/splatflow/nn", "src/splatflow/models", "benchmarks/speed"),
    *("src/splatflow/diagnostics/measure.py", "src/splatflow/diagnostics/speed.py"),
)
PRESENTATION = ("report.py", "pictures.py", "targets.py", "__main__.py")  # of benchmarks/speed
FIELDS = ("result", "date", "machine", "versions", "commit", "code", "load", "command", "seed")
PACKAGES = ("torch", "triton", "transformers", "flash-linear-attention")


def read_ledger(path: Path) -> list[Row]:
    """Rows in the order in which they were measured. A last line that was cut off, as by a kill, does not count.

    Raises:
        ValueError: another line is no row, or the path is no file.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise ValueError(f"the ledger '{path}' is not a file")
    *lines, last = path.read_text(encoding="utf-8").split("\n")
    if last and not last.startswith(BEGINNING[: len(last)]):
        raise ValueError(f"the last line of '{path}' is not a row of the ledger: it begins with {last[:20]!r}")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["case"] = Case(**row["case"])
            if missing := [name for name in FIELDS if name not in row]:
                raise ValueError(f"it lacks {', '.join(missing)}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of '{path}' is not a row of the ledger: {error}") from error
        rows.append(row)
    return rows


BEGINNING = '{"case": {'  # of every line


def finished(rows: list[Row]) -> dict[Case, Row]:
    """Those that need not be measured again here, the newest of each case."""
    here = circumstances()
    return {row["case"]: row for row in rows if all(row[name] == here[name] for name in ("machine", "code"))}


def by_machine(rows: list[Row]) -> dict[str, list[Row]]:
    """The newest row of each case, for each machine."""
    found: dict[str, dict[Case, Row]] = {}
    for row in rows:
        found.setdefault(machine_name(row), {})[row["case"]] = row
    return {name: list(of_machine.values()) for name, of_machine in found.items()}


def machine_name(row: Row) -> str:
    """The GPU, if the row is of one, or the processor and how many of its threads were used."""
    machine = row["machine"]
    if row["case"].device == "cuda":
        return machine["device"]
    return f"{machine['cpu']}, {machine['threads']} threads"


def append(path: Path, case: Case, measured: dict[str, Any], *, command: str, seed: int) -> Row:
    """Write one row at the end of the ledger; a line that was cut off before it is taken away."""
    row = {
        "case": case._asdict(),
        **measured,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **circumstances(),
        "load": round(os.getloadavg()[0], 1),  # what else ran, over the last minute
        "command": command,
        "seed": seed,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    return {**row, "case": case}


@cache
def circumstances() -> dict[str, Any]:
    """As they were when this process first asked: its code is that of then."""
    return {"machine": machine(), "versions": versions(), "commit": commit(ROOT), "code": code_digest()}


def versions() -> str:
    """Of what a figure may depend on; some are there on some machines only."""
    found = []
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def code_digest() -> str:
    """Of all files that a figure depends on: the first 12 digits of a hash of their names and contents."""
    digest = hashlib.sha256()
    for name in MEASURED_CODE:
        for path in sorted((ROOT / name).rglob("*.py")) or [ROOT / name]:
            if path.parent.name != "speed" or path.name not in PRESENTATION:
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]
