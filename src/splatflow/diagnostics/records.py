"""One JSON file a run: the rows that were measured, and what somebody else needs to measure them again."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from splatflow.diagnostics.measure import commit, machine

FIELDS = ("date", "machine", "commit", "command", "seeds", "rows", "notes")

Row = dict[str, str | int | float]


def write_record(
    path: Path | str, *, command: str, rows: Sequence[Row], seeds: Sequence[int] = (), notes: str = ""
) -> None:
    """Write the rows of one run to the file `path`, with the date (UTC), machine and commit of this moment.

    Args:
        path: the file, conventionally `benchmarks/results/<date>-<subject>.json`; its folder is made if needed.
        command: what to type to get the rows again.
        rows: at least one; each maps names to strings or finite numbers.
        seeds: those that were used; none for a run without chance.
        notes: what a reader should know before trusting the rows.

    Raises TypeError for a row, value or seed of another type; ValueError for no rows, no command, or a number that is
    not finite (JSON has no NaN: say "diverged").

    >>> write_record("results/speed.json", command="splatflow bench", rows=[{"seq_len": 256, "seconds": 0.0021}])
    """
    _check_rows(rows)
    if not command.strip():
        raise ValueError("command is empty, expected what to type to repeat the run")
    for seed in seeds:
        if not isinstance(seed, int):
            raise TypeError(f"seeds holds {seed!r} of type {type(seed).__name__}, expected whole numbers")
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "commit": commit(),
        "command": command,
        "seeds": list(seeds),
        "rows": list(rows),
        "notes": notes,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_records(folder: Path | str) -> list[dict[str, Any]]:
    """Every record (`*.json`) of a folder, oldest first.

    Raises NotADirectoryError if there is no such folder, ValueError for a file that `write_record` did not write.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"folder is '{folder}', expected an existing folder of records")
    return sorted((_read_record(path) for path in sorted(folder.glob("*.json"))), key=lambda record: record["date"])


def _check_rows(rows: Sequence[Row]) -> None:
    if len(rows) == 0:
        raise ValueError("rows is empty, expected at least one row")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise TypeError(f"rows[{index}] is of type {type(row).__name__}, expected a dict")
        for name, value in row.items():
            if not isinstance(name, str):
                raise TypeError(f"rows[{index}] has the key {name!r}, expected a string")
            if not isinstance(value, str | int | float):
                raise TypeError(
                    f"rows[{index}][{name!r}] is of type {type(value).__name__}, expected a string or a number"
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"rows[{index}][{name!r}] is {value}, expected a finite number")


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not a record: {error}") from error
    missing = [field for field in FIELDS if not isinstance(record, dict) or field not in record]
    if missing:
        raise ValueError(f"'{path}' is not a record: it lacks {', '.join(missing)}")
    return record
