"""One honest speed table: every kernel checked, then timed beside a copy of its minimum bytes and beside its peers.

    python -m benchmarks.speed                      # checks, then times, the most important first; 9 minutes
    python -m benchmarks.speed --only check         # a piece of it
    python -m benchmarks.speed report               # docs/speed.md and its pictures, from the ledger

Each figure is a line of the ledger as soon as it is there, and is not measured again on the same machine while the code
that it depends on is the same. Stop it when you like, and call it again to go on.
"""

from __future__ import annotations

import argparse
import math
import secrets
import sys
from pathlib import Path

import torch

from .cases import SCALES
from .ledger import LEDGER, read_ledger
from .runner import PIECES, Run, run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--record", type=Path, default=LEDGER, help="the ledger (%(default)s)")
    parser.add_argument("--minutes", type=float, default=9.0, help="no group is begun after this time (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=PIECES, default=PIECES, help="pieces; else all of them, in turn")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument(
        "--tiny", action="store_true", help="a dry run of a minute: smallest sizes, no figures of worth"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again, in this call, what the ledger holds")
    parser.add_argument("--seed", type=int, help="of all inputs; drawn if not given, and recorded")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 if a backend is wrong, 2 for a wrong call."""
    options = parse(arguments)
    try:
        if not options.minutes >= 0 or math.isinf(options.minutes):
            raise ValueError(f"--minutes is {options.minutes:g}, expected a number from 0 on")
        if options.tiny and options.record == LEDGER:
            raise ValueError("--tiny gives no figures of worth, expected --record with a file of its own")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device is cuda, and torch sees no GPU")
        rows = read_ledger(options.record)
        if options.what == "report":
            from . import report

            if not rows:
                raise ValueError(f"the ledger '{options.record}' holds no rows, and the page stays as it is")
            report.write(rows)
            return 0
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    flags = "".join(f" --{name}" for name in ("tiny", "fresh") if getattr(options, name))
    only = "" if options.only == PIECES else f" --only {' '.join(options.only)}"
    return run(
        Run(
            scale=SCALES["tiny" if options.tiny else device],
            device=device,
            pieces=tuple(options.only),
            path=options.record,
            rows=[] if options.fresh else rows,
            seconds=60 * options.minutes,
            seed=seed,
            command=f"python -m benchmarks.speed --device {device} --seed {seed}{only}{flags}",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
