"""What a GPU is asked for, in under nine minutes: are the kernels right, how quick are they, how well do models learn?

    make gpu                                    # python -m benchmarks.gpu: check, speed, quality, in this order
    make gpu-check; make gpu-speed; make gpu-quality
    make gpu GPU="speed quality --minutes 5 --results FOLDER --wikitext TRAIN HELDOUT"

Each piece goes on where it stopped, so that it may be called as often as there is time. Where there is no GPU the
pieces are run on the CPU, once and as small as they go, and their figures are thrown away. Nothing is built, installed
or fetched.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"
TIMED = ("operator", "memory", "decode", "training", "generation")
CORPORA = ("wikitext", "novels")
GRACE = 30.0  # seconds beyond its time, after which a piece is stopped


class Piece(NamedTuple):
    """`share` of the minutes; `flags(results, minutes)` of `python -m`, on a GPU, and `dry(results)` of a dry run."""

    share: float
    flags: Callable[[Path, float], list[str]]
    dry: Callable[[Path], list[str]]
    needs: tuple[str, ...] = ()


def _speed(*pieces: str) -> tuple[Callable[[Path, float], list[str]], Callable[[Path], list[str]]]:
    def flags(results: Path, minutes: float) -> list[str]:
        record = ["--record", str(results / "speed.jsonl")]
        return ["benchmarks.speed", "--only", *pieces, "--minutes", f"{minutes:.2f}", *record]

    def dry(results: Path) -> list[str]:
        return [*flags(results, 0.8), "--tiny", "--device", "cpu"]

    return flags, dry


def _quality(results: Path, minutes: float, tier: str = "gpu") -> list[str]:
    ledger = ["--ledger", str(results / "quality.jsonl")]
    return ["benchmarks.quality", tier, "--minutes", f"{minutes:.2f}", *ledger]


def _dry_quality(results: Path) -> list[str]:
    return [*_quality(results, 0.02, tier="smoke"), "--workers", "1"]


PIECES = {
    "check": Piece(0.2, *_speed("check")),
    "speed": Piece(0.5, *_speed(*TIMED)),
    "quality": Piece(0.3, _quality, _dry_quality, needs=("tyro", "tqdm")),
}


def main(arguments: list[str] | None = None) -> int:
    """The greatest exit status of the pieces."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("pieces", nargs="*", help=f"of {', '.join(PIECES)}; all of them if none is named")
    parser.add_argument("--minutes", type=float, default=8.5, help="for all pieces together (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the ledgers (%(default)s)")
    for corpus in CORPORA:
        parser.add_argument(f"--{corpus}", nargs=2, metavar=("TRAIN", "HELDOUT"), help="for quality")
    options = parser.parse_args(arguments)
    of_quality = []
    for corpus in CORPORA:
        if getattr(options, corpus) is not None:
            of_quality += [f"--{corpus}", *getattr(options, corpus)]
    if unknown := [name for name in options.pieces if name not in PIECES]:
        parser.error(f"no piece {', '.join(map(repr, unknown))}, expected some of {', '.join(PIECES)}")
    chosen = options.pieces or [*PIECES]
    if torch.cuda.is_available():
        return run_pieces(chosen, options.minutes, options.results, of_quality)
    print("there is no GPU: a dry run on the CPU with tiny sizes, whose figures are thrown away", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        return max(run_piece(name, PIECES[name].dry(Path(folder)), seconds=60.0) for name in chosen)


def run_pieces(chosen: list[str], minutes: float, results: Path, of_quality: list[str]) -> int:
    """Each in its share of the minutes, or in what those before it have left of theirs and its own."""
    ends = time.monotonic()
    statuses = []
    for name in chosen:
        ends += 60 * minutes * PIECES[name].share / sum(PIECES[other].share for other in chosen)
        left = max(0.0, ends - time.monotonic())
        flags = PIECES[name].flags(results, left / 60) + (of_quality if name == "quality" else [])
        statuses.append(run_piece(name, flags, left + GRACE))
    return max(statuses)


def run_piece(name: str, flags: list[str], seconds: float) -> int:
    """In a process of its own, which is stopped with its children after so many seconds: what it finished is kept."""
    if missing := [package for package in PIECES[name].needs if find_spec(package) is None]:
        print(f"== {name} is left out: it needs {', '.join(missing)}, which is not installed", flush=True)
        return 0
    print(f"== {name}: python -m {' '.join(flags)}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", *flags], start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"== {name} was stopped after {seconds:.0f} s; call it again to go on", flush=True)
        return 0


if __name__ == "__main__":
    sys.exit(main())
