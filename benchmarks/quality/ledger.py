"""All runs, one JSON line each: what was run, what came out, where and when. Runs of several days add up in it."""

from __future__ import annotations

import contextlib
import importlib.metadata
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

MEASURED = ("scores", "size", "state_size", "step_operations", "parameters", "seconds")
CIRCUMSTANCES = ("date", "machine", "versions", "commit", "command")
BEGINNING = b'{"run": {'  # of every line


def read_ledger(path: Path) -> dict[Run, Row]:
    """Finished runs. A last line that was cut off, as by a kill, does not count.

    Raises:
        ValueError: another line is no row, or the path is no file.
    """
    rows: dict[Run, Row] = {}
    if not path.exists():
        return rows
    if not path.is_file():
        raise ValueError(f"the ledger '{path}' is not a file")
    lines, rest = _lines(path.read_bytes())
    if not rest.startswith(BEGINNING[: len(rest)]):
        raise ValueError(f"the last line of '{path}' is not a row of the ledger: it begins with {rest[:20]!r}")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            run = Run(**{**row["run"], "shell": Shell(**row["run"]["shell"])})
            missing = [name for name in (*MEASURED, *CIRCUMSTANCES) if name not in row]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of '{path}' is not a row of the ledger: {error}") from error
        rows[run] = row
    return rows


def _lines(content: bytes) -> tuple[list[bytes], bytes]:
    """Whole lines, and what is left of a last one that was cut off. It may be whole without its end of line."""
    *lines, last = content.split(b"\n")
    try:
        json.loads(last)
    except ValueError:
        return lines, last
    return [*lines, last], b""


def versions() -> str:
    """Of what a figure may depend on; flash-linear-attention is there on some machines only."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "flash-linear-attention"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return ", ".join(f"{name} {version}" for name, version in found.items())


def append(path: Path, run: Run, measured: dict[str, Any], *, command: str, device: str) -> Row:
    """Write one finished run at the end of the ledger."""
    row = {
        "run": {**asdict(run), "shell": run.shell._asdict()},
        **measured,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine() if device == "cpu" else {**machine(), "gpu": torch.cuda.get_device_name(device)},
        "versions": versions(),
        "commit": commit(),
        "command": command,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        lines, rest = _lines(content := file.read())
        if rest:  # a line that was cut off is taken away, or the new one would be lost with it
            file.truncate(len(content) - len(rest))
        elif lines and not content.endswith(b"\n"):
            file.write(b"\n")
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    return row
