"""All runs, one JSON line each: what was run, what came out, where and when. Runs of several days add up in it."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from splatflow.diagnostics import commit, machine

from .contestants import Shell
from .probe import Run

Row = dict[str, Any]


def read_ledger(path: Path) -> dict[Run, Row]:
    """Finished runs. A last line that was cut off, as by a kill, does not count.

    Raises:
        ValueError: another line is no row.
    """
    rows: dict[Run, Row] = {}
    if not path.exists():
        return rows
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            run = Run(**{**row["run"], "shell": Shell(**row["run"]["shell"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of '{path}' is not a row of the ledger: {error}") from error
        rows[run] = row
    return rows


def append(path: Path, run: Run, measured: dict[str, Any], *, command: str, device: str) -> Row:
    """Write one finished run at the end of the ledger."""
    row = {
        "run": {**asdict(run), "shell": run.shell._asdict()},
        **measured,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine() if device == "cpu" else torch.cuda.get_device_name(device),
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
        "commit": commit(),
        "command": command,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():  # a line that was cut off is taken away, or the new one would be lost with it
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    return row
