"""Goes through the groups of cases, and writes a row as soon as there is one. What is wrong is not timed."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from splatflow.diagnostics import machine, peak_memory
from splatflow.ops import BACKENDS

from .cases import Case, Scale, groups, kind_of, label, size_of
from .checks import PLAIN, SANITIZER, jobs
from .clock import Call, Clock, bounded_memory, outcome, quick_collections, summary
from .contenders import contenders
from .ledger import Row, append, finished, versions
from .subjects import SUBJECTS, power_of, state_of

PIECES = ("check", *SUBJECTS)
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
    found = check_all(asked)
    left = len(found.unchecked - {"auto"})
    with bounded_memory(asked.device), quick_collections():
        for group in all_groups(asked, found):
            waiting = [case for case in group if case not in asked.known]
            ready = [case for case in waiting if found.forbid(case) != "unchecked"]
            if ready and not asked.is_late:
                measure_group(asked, ready, found)
            left += sum(case not in asked.known for case in waiting)
    print(f"{left} figures left for another call, the time is over" if left else "all figures are in the ledger")
    failed = [case for case, row in asked.known.items() if row["result"] == "failed" and is_ours(case)]
    return int(bool(found.wrong or failed))


def is_ours(case: Case) -> bool:
    return case.what.startswith("splat")


class Found(NamedTuple):
    """What the checks say: backends that are wrong, and those of which something is still to be checked."""

    wrong: set[str]
    unchecked: set[str]

    def forbid(self, case: Case) -> str | None:
        """ "wrong" or "unchecked" if splats of this case must not be timed."""
        backend = backend_of(case)
        return next((kind for kind, names in self._asdict().items() if is_ours(case) and backend in names), None)


def check_all(asked: Run) -> Found:
    """Makes the checks that no earlier call has made of the same code."""
    found = Found(set(), set())
    for case, job in jobs(asked.scale.num_splats, asked.device, asked.seed):
        if case not in asked.known and not asked.is_late:
            measured, failure = outcome(job, asked.device)
            # what cannot even be called is wrong
            asked.record(case, measured if failure is None else {**failure, "result": "wrong"})
        if case not in asked.known:
            found.unchecked.add(case.what)
        elif asked.known[case]["result"] == "wrong":
            found.wrong.add(case.what)
    if SANITIZER in found.wrong:
        found.wrong.update(name for name in BACKENDS if name not in PLAIN)
    for names in found:
        if names:
            names.add("auto")  # may be any of them
    return found


def all_groups(asked: Run, found: Found) -> Iterator[list[Case]]:
    """Groups of the pieces asked for, without who cannot take part, which is said once."""
    told: set[tuple[str, str]] = set()
    for group in groups(asked.scale, asked.device, lambda s, causal: SUBJECTS[s].names(asked.scale.num_splats, causal)):
        if group[0].subject not in asked.pieces:
            continue
        able = []
        for case in group:
            reason = None if found.forbid(case) else refused(case, asked.device)
            if reason is None:
                able.append(case)
                continue
            once = kind_of(case)._replace(subject="contender", num_splats=0, passes="")
            if (case.what, reason) not in told and once not in asked.known:
                asked.record(once, {"result": "left out", "reason": reason})
            told.add((case.what, reason))
        yield able


def refused(case: Case, device: str) -> str | None:
    """Why who does this cannot; None too if the question fails, for then the measurement will say how."""
    if case.subject not in ("operator", "memory"):
        return None
    reason, _ = outcome(lambda: contenders()[case.what].supports(case), device)
    return reason


def backend_of(case: Case) -> str | None:
    """The backend that a case depends on; whole models and decoding choose for themselves."""
    return contenders()[case.what].backend if case.subject in ("operator", "memory") else "auto"


def measure_group(asked: Run, group: list[Case], found: Found) -> None:
    """A first call of each, its memory, then all in rounds with a copy of the bytes that have to be moved."""
    subject = SUBJECTS[group[0].subject]
    print(f"{group[0].subject}, {size_of(group[0])}, causal {group[0].causal}, {group[0].passes}:", flush=True)
    shared, failure = outcome(lambda: subject.begin(group[0], asked.scale, asked.seed), asked.device)
    ready: dict[Case, tuple[Call, dict[str, Any]]] = {}
    for case in group:
        if found.forbid(case) == "wrong":
            asked.record(case, {"result": "not timed", "reason": "a check found it wrong"})
        elif (expected := expected_seconds(case, asked.known)) > asked.scale.limit:
            told = f"expected to take {expected:.0f} s, more than {asked.scale.limit:g} s"
            asked.record(case, {"result": LIMIT, "reason": told})
        elif failure is not None:
            asked.record(case, failure)
        elif not asked.is_late:
            begun, failed = outcome(lambda case=case: begin(asked, shared, case), asked.device)
            if failed is not None or begun[0] is None:
                asked.record(case, failed or begun[1])
            else:
                ready[case] = begun
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
