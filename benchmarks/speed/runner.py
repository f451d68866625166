"""Goes through the groups of cases, and writes a row as soon as there is one. What is wrong is not timed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from splatflow.diagnostics import machine, peak_memory
from splatflow.ops import BACKENDS

from .cases import Case, Scale, groups, kind_of, label, size_of
from .checks import check, check_case, configurations, sanitize
from .clock import Call, Clock, bounded_memory, outcome, quick_collections, summary
from .contenders import contenders
from .ledger import Row, append, finished, versions
from .subjects import SUBJECTS, power_of, state_of

PIECES = ("check", *SUBJECTS)
SANITIZED = "compute-sanitizer"
LIMIT = "over the limit"
MOST_COPIED = 2**30  # bytes moved; from there on a copy takes as long as it has bytes


@dataclass
class Run:
    """What was asked for, and what is known so far."""

    scale: Scale
    device: str
    pieces: tuple[str, ...]
    path: Path
    rows: list[Row]
    seconds: float
    seed: int
    command: str
    known: dict[Case, Row] = field(init=False)
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.known, self.deadline = finished(self.rows), time.monotonic() + self.seconds

    @cached_property
    def clock(self) -> Clock:
        return Clock.of(self.device, self.scale.flushed)

    @property
    def is_late(self) -> bool:
        return time.monotonic() >= self.deadline

    def record(self, case: Case, measured: dict[str, Any]) -> Row:
        row = append(self.path, case, measured, command=self.command, seed=self.seed)
        self.known[case] = row
        told = measured.get("reason") or ""
        if "seconds" in measured:
            told = f"{1000 * measured['seconds']:.3f} ms {told}"
            if measured.get("floor"):
                told += f"({measured['seconds'] / measured['floor']:.1f} x the floor)"
        if "bytes" in measured:
            told += f", {measured['bytes'] / 2**20:,.1f} MiB"
        print(f"  {case.subject}, {label(case)}, {size_of(case)}: {measured['result']} {told}", flush=True)
        return row


def run(asked: Run) -> int:
    """All pieces that were asked for, until the time is over; the exit status: 1 if splats are wrong or fail."""
    print(", ".join(f"{name} {value}" for name, value in machine().items()), versions(), sep="; ", flush=True)
    wrong = check_all(asked)
    left = 0
    with bounded_memory(asked.device), quick_collections():
        for group in all_groups(asked):
            if waiting := [case for case in group if case not in asked.known]:
                if asked.is_late:
                    left += len(waiting)
                else:
                    measure_group(asked, waiting, wrong)
    print(f"{left} figures left for another call, the time is over" if left else "all figures are in the ledger")
    failed = [case for case, row in asked.known.items() if row["result"] == "failed" and is_ours(case)]
    return int(bool(wrong or failed))


def is_ours(case: Case) -> bool:
    return case.what.startswith("splat")


def check_all(asked: Run) -> set[str]:
    """Checks each backend that no earlier call of the same code has; the names of those that are wrong."""
    if not {"check", "operator", "memory", "decode"} & {*asked.pieces}:
        return set()
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        backend: lambda backend=backend: check(
            backend, asked.device, configurations(asked.scale.num_splats), asked.seed
        )
        for backend in BACKENDS
    }
    jobs[SANITIZED] = lambda: sanitize(asked.device)
    for name, job in jobs.items():
        case = check_case(name, asked.scale, asked.device)
        if case not in asked.known:
            measured, failure = outcome(job, asked.device)
            # a backend that cannot even be called is not timed either
            asked.record(case, measured if failure is None else {**failure, "result": "wrong"})
    checked = {name: asked.known[check_case(name, asked.scale, asked.device)]["result"] for name in jobs}
    wrong = {name for name, result in checked.items() if result == "wrong"}
    return {*wrong, "auto"} if wrong else wrong


def all_groups(asked: Run) -> Iterator[list[Case]]:
    """Groups of the pieces asked for, without who cannot take part, which is said once."""
    told: set[tuple[str, str]] = set()
    for group in groups(asked.scale, asked.device, lambda s, causal: SUBJECTS[s].names(asked.scale.num_splats, causal)):
        if group[0].subject not in asked.pieces:
            continue
        able = []
        for case in group:
            reason = refused(case)
            if reason is None:
                able.append(case)
                continue
            once = kind_of(case)._replace(subject="contender", num_splats=0, passes="")
            if (case.what, reason) not in told and once not in asked.known:
                asked.record(once, {"result": "left out", "reason": reason})
            told.add((case.what, reason))
        yield able


def refused(case: Case) -> str | None:
    return contenders()[case.what].supports(case) if case.subject in ("operator", "memory") else None


def backend_of(case: Case) -> str | None:
    """The backend that a case depends on; whole models and decoding choose for themselves."""
    return contenders()[case.what].backend if case.subject in ("operator", "memory") else "auto"


def measure_group(asked: Run, group: list[Case], wrong: set[str]) -> None:
    """A first call of each, its memory, then all in rounds with a copy of the bytes that have to be moved."""
    subject = SUBJECTS[group[0].subject]
    print(f"{group[0].subject}, {size_of(group[0])}, causal {group[0].causal}, {group[0].passes}:", flush=True)
    shared, failure = outcome(lambda: subject.begin(group[0], asked.scale, asked.seed), asked.device)
    ready: dict[Case, tuple[Call, dict[str, Any]]] = {}
    for case in group:
        if backend_of(case) in wrong and is_ours(case):
            asked.record(case, {"result": "not timed", "reason": "a check found it wrong"})
        elif (expected := expected_seconds(case, asked.known)) > asked.scale.limit:
            told = f"expected to take {expected:.0f} s, more than {asked.scale.limit:g} s"
            asked.record(case, {"result": LIMIT, "reason": told})
        elif failure is not None:
            asked.record(case, failure)
        elif not asked.is_late:
            found, failed = outcome(lambda case=case: begin(asked, shared, case), asked.device)
            if failed is not None or found[0] is None:
                asked.record(case, failed or found[1])
            else:
                ready[case] = found
    if ready:
        time_group(asked, ready)
    del shared, ready
    gc.collect()
    if asked.device == "cuda":
        torch.cuda.empty_cache()


def begin(asked: Run, shared: Any, case: Case) -> tuple[Call | None, dict[str, Any]]:
    """The call of a case and its memory. No call if what has to be known of the case is known already."""
    subject = SUBJECTS[case.subject]
    call = subject.call(shared, case)
    asked.clock.seconds(lambda: call(0))  # warms up: compiles, fills caches
    second: list[float] = []
    memory = peak_memory(lambda: second.append(asked.clock.seconds(lambda: call(0))), device=asked.device, warmup=False)
    known = {"result": "measured", "state": state_of(case), "tokens": subject.tokens(case), "bytes": memory}
    if second[0] > asked.scale.limit:
        told = f"one call, more than {asked.scale.limit:g} s"
        return None, {**known, "result": LIMIT, "reason": told, **summary(second)}
    return (call if subject.timed else None), known


def time_group(asked: Run, ready: dict[Case, tuple[Call, dict[str, Any]]]) -> None:
    least = SUBJECTS[next(iter(ready)).subject].least_bytes
    amounts = {case: least(case) for case in ready} if least is not None else {}
    copied = {case: min(amount, MOST_COPIED) for case, amount in amounts.items()}
    calls: dict[Case | int, Call] = {amount: copy_of(amount, asked.device) for amount in {*copied.values()}}
    for copy in calls.values():
        copy(0)
    calls |= {case: call for case, (call, _) in ready.items()}
    options = {"seconds": asked.scale.seconds, "deadline": asked.deadline}
    samples, failure = outcome(lambda: asked.clock.rounds(calls, **options), asked.device)
    for case, (_, measured) in ready.items():
        if failure is not None:
            asked.record(case, failure)
            continue
        timed = {**measured, **summary(samples[case])}
        if case in amounts:
            floor = summary(samples[copied[case]])["seconds"] * amounts[case] / copied[case]
            timed |= {"floor": floor, "least_bytes": amounts[case]}
        asked.record(case, timed)


def copy_of(amount: int, device: str) -> Call:
    """Copies half of so many bytes, which moves all of them: each is read or written."""
    source = torch.randint(256, (max(1, amount // 2),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda number: target.copy_(source)


def expected_seconds(case: Case, known: dict[Case, Row]) -> float:
    """What the case of the nearest shorter length, if one was measured, lets expect; else 0."""
    work = case.batch * case.seq_len ** power_of(case)
    shorter = [
        (one.seq_len, row["seconds"] * work / (one.batch * one.seq_len ** power_of(case)))
        for one, row in known.items()
        if kind_of(one) == kind_of(case) and one.seq_len < case.seq_len and "seconds" in row
    ]
    return max(shorter)[1] if shorter else 0.0
