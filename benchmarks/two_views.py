"""Does sharing splats between two views beat not sharing? `python -m benchmarks.two_views --record <file>.json`

The task and the models are those of `examples/two_views.py`. Each arrangement first learns at every rate from one seed;
the rate that answers best is then used with fresh seeds, and those count.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from examples.two_views import ARRANGEMENTS, NUM_HEADS, WIDTHS, learn, share_right

from splatflow.diagnostics import write_record

EXAM = 1_000_000  # scenes of an exam are drawn from seeds beyond this one


@dataclass(frozen=True)
class Options:
    """`steps` batches of 64 scenes a run; `first_seed` is that of the rates."""

    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    seeds: int = 3
    first_seed: int = 0
    steps: int = 400
    record: str | None = None


def measure(arrangement: str, rate: float, seed: int, steps: int, purpose: str) -> dict[str, str | int | float]:
    """One run as a row."""
    start = time.perf_counter()
    model = learn(arrangement, rate, seed, steps)
    shapes, colours = share_right(model, EXAM + seed)
    head_dim = max(WIDTHS) // NUM_HEADS
    return {
        "arrangement": arrangement,
        "for": purpose,
        "rate": rate,
        "seed": seed,
        "steps": steps,
        "shapes right": shapes,
        "colours right": colours,
        "right": (shapes + colours) / 2,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "state numbers a layer": ARRANGEMENTS[arrangement][1] * NUM_HEADS * (head_dim + 1),
        "seconds": time.perf_counter() - start,
    }


def main(options: Options) -> None:
    torch.set_num_threads(1)
    rows = []
    seeds = range(options.first_seed, options.first_seed + options.seeds + 1)
    for arrangement in ARRANGEMENTS:
        swept = [measure(arrangement, rate, seeds[0], options.steps, "rates") for rate in options.rates]
        best = max(swept, key=lambda row: row["right"])["rate"]
        fresh = [measure(arrangement, best, seed, options.steps, "seeds") for seed in seeds[1:]]
        rows += [*swept, *fresh]
        scores = [row["right"] for row in fresh]
        rates = ", ".join(f"{row['rate']:g}: {row['right']:.3f}" for row in swept)
        print(
            f"{arrangement}: {statistics.mean(scores):.3f} right ({min(scores):.3f} to {max(scores):.3f}); {rates}",
            flush=True,
        )
    if options.record is not None:
        notes = (
            "Chance is 0.125. Each arrangement learns at every rate from the first seed, then at its best rate from "
            "the others. 2,000 fresh scenes an exam. Times are those of a machine that had other work too."
        )
        command = f"python -m benchmarks.two_views  # {options}"
        write_record(options.record, command=command, rows=rows, seeds=list(seeds), notes=notes)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
