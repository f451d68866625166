"""What are splats worth beside the strongest mixers of equal state, equal parameters, equal tokens and equal tuning?

    python -m benchmarks.quality smoke
    python -m benchmarks.quality cpu --wikitext train.txt.xz valid.txt.xz --novels train.txt.xz valid.txt.xz
    python -m benchmarks.quality gpu --minutes 9 ...    # in pieces
    python -m benchmarks.quality report                 # docs/results.md and its pictures, from the ledger

Every finished run is a line of the ledger and is never made twice, so that a tier may be stopped and taken up again.
"""

from __future__ import annotations

import math
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

from . import report
from .ledger import append, read_ledger
from .plan import Experiment, Rows, decided, fresh_rows, runs_to_make
from .probe import Run
from .studies import STUDIES
from .tiers import TIERS
from .worker import Paths, prepare, work

LEDGER = Path(__file__).parents[1] / "results" / "quality.jsonl"


@dataclass(frozen=True)
class Options:
    """A tier to run, or the report of what the ledger holds."""

    what: tyro.conf.Positional[Literal["smoke", "cpu", "more", "features", "gpu", "report"]]
    wikitext: Paths | None = None
    """Text to learn from and held-out text, each a file or a folder; .gz and .xz are unpacked."""
    novels: Paths | None = None
    """The same, of novels."""
    minutes: float = math.inf
    """No run is begun after this time."""
    workers: int = os.cpu_count() or 1
    """Runs at once, of one thread each. On a GPU there is one."""
    ledger: Path = LEDGER


def main(options: Options) -> int:
    paths = {name: given for name in ("wikitext", "novels") if (given := getattr(options, name)) is not None}
    try:
        check(options, paths)
        rows = read_ledger(options.ledger)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.what == "report":
        if not rows:
            print(f"the ledger '{options.ledger}' holds no runs, and the page stays as it is", file=sys.stderr)
            return 2
        report.write(rows)
        return 0
    experiments = []
    for experiment in TIERS[options.what]:
        corpus = STUDIES[experiment.study].corpus
        if corpus is None or corpus in paths:
            experiments.append(experiment)
        else:
            print(f"{experiment.study} is left out: it needs --{corpus} TRAIN HELDOUT")
    rows, failed = run_all(experiments, rows, paths, options)
    for experiment in experiments:
        print(summary(experiment, rows))
    for run, error in failed.items():
        print(f"{run}: {error}", file=sys.stderr)
    return 1 if failed else 0


def check(options: Options, paths: dict[str, Paths]) -> None:
    """
    Raises:
        ValueError: a text is not there, or the options leave nobody to work.
    """
    missing = [path for pair in paths.values() for path in pair if not path.exists()]
    if missing:
        raise ValueError(f"no file or folder {', '.join(map(repr, map(str, missing)))}")
    if not options.minutes >= 0:
        raise ValueError(f"--minutes {options.minutes:g}: expected 0 or more")
    if not options.ledger.exists() and any(folder.is_file() for folder in options.ledger.parents):
        raise ValueError(f"--ledger {options.ledger}: there is no such folder, and none can be made")
    if options.workers < 1:
        raise ValueError(f"--workers {options.workers}: at least 1 is needed")


def run_all(
    experiments: list[Experiment], rows: Rows, paths: dict[str, Paths], options: Options
) -> tuple[Rows, dict[Run, str]]:
    """Makes what is missing, several at once, and writes each run into the ledger as soon as it is done.

    Returns:
        All rows, and the runs that failed with their errors. A failed run is tried again by the next call.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    workers = 1 if device == "cuda" else options.workers
    deadline = time.monotonic() + 60 * options.minutes
    command = f"python -m benchmarks.quality {options.what}"
    rows, failed, running = dict(rows), {}, {}
    with (
        ProcessPoolExecutor(workers, get_context("spawn"), initializer=prepare, initargs=(paths,)) as pool,
        tqdm(unit="run", desc=options.what) as bar,
    ):
        while True:
            busy = {*running.values(), *failed}
            waiting = [run for run in runs_to_make(experiments, rows) if run not in busy]
            # no more than are worked on at once: a run that was not begun must not be waited for at the deadline
            for run in waiting[: workers - len(running)]:
                if time.monotonic() < deadline:
                    running[pool.submit(work, run, device)] = run
            if not running:
                return rows, failed
            bar.total = bar.n + len(waiting) + len(running)
            bar.refresh()
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                run = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise SystemExit(f"a worker was killed, perhaps for memory, during {run}: try --workers 1")
                if error is None:
                    rows[run] = append(options.ledger, run, future.result(), command=command, device=device)
                    result = rows[run]["scores"][STUDIES[run.study].decides]
                else:
                    result = failed[run] = f"failed, {type(error).__name__}: {error}"
                bar.write(f"{run.study}, {run.mixer}, rate {run.rate:g}, seed {run.seed}: {result}")
                bar.update()


def summary(experiment: Experiment, rows: Rows) -> str:
    """A line for each contestant: the score that decides, over the fresh seeds."""
    study = STUDIES[experiment.study]
    lines = [f"\n{experiment.study}, {experiment.state} numbers a layer: {study.decides}"]
    for mixer in experiment.mixers:
        scores = [abs(decided(experiment, row)) for row in fresh_rows(experiment, mixer, rows)]
        result = f"{min(scores):.3f} to {max(scores):.3f} on {len(scores)} fresh seeds" if scores else "not finished"
        lines.append(f"  {mixer:<24} {result}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
