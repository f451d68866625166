"""Draws the pictures of README and docs from the rows in `benchmarks/results/`: `python -m benchmarks.pictures`."""

from __future__ import annotations

import re
from pathlib import Path

from splatflow.diagnostics import figure_scaling, read_records

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    newest = [record for record in read_records(RESULTS) if record["command"].startswith("splatflow bench")][-1]
    rows = [{**row, "mixer": row["mixer"].replace("_", " ")} for row in newest["rows"] if row["causal"]]
    panels = re.findall(r"<svg.*?</svg>", figure_scaling(rows), flags=re.DOTALL)
    for name, svg in zip(("time", "memory"), panels, strict=True):
        # a white ground, so that a dark page does not swallow the axes
        white = re.sub(r"(<svg[^>]*>)", r'\1<rect width="100%" height="100%" fill="white"/>', svg, count=1)
        (PICTURES / f"{name}.svg").write_text(white, encoding="utf-8")
        print(f"docs/pictures/{name}.svg, from the run of {newest['date']} at {newest['commit']}")


if __name__ == "__main__":
    main()
