"""Draws the pictures of README and docs from the rows in `benchmarks/results/`: `python -m benchmarks.pictures`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from splatflow.diagnostics import figure_scaling, read_records

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    speed = newest("splatflow bench")
    rows = [{**row, "mixer": row["mixer"].replace("_", " ")} for row in speed["rows"] if row["causal"]]
    for name, svg in zip(("time", "memory"), panels(rows), strict=True):
        save(name, svg, speed)
    training = newest("OMP_NUM_THREADS=1 python -m benchmarks.training_memory")
    rows = [{**row, "mixer": row["case"]} for row in training["rows"] if "no decay" not in row["case"]]
    save("training-memory", panels(rows)[1], training)


def newest(command: str) -> dict[str, Any]:
    """The last record of a run of `command`."""
    return [record for record in read_records(RESULTS) if record["command"].startswith(command)][-1]


def panels(rows: list[dict[str, Any]]) -> list[str]:
    """Pictures of time and of memory against the length."""
    return re.findall(r"<svg.*?</svg>", figure_scaling(rows), flags=re.DOTALL)


def save(name: str, svg: str, record: dict[str, Any]) -> None:
    # a white ground, so that a dark page does not swallow the axes
    white = re.sub(r"(<svg[^>]*>)", r'\1<rect width="100%" height="100%" fill="white"/>', svg, count=1)
    (PICTURES / f"{name}.svg").write_text(white, encoding="utf-8")
    print(f"docs/pictures/{name}.svg, from the run of {record['date']} at {record['commit']}")


if __name__ == "__main__":
    main()
