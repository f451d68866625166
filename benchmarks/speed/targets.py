"""What splat attention is meant to reach on a CPU, and whether the ledger says that it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from .cases import BOTH, FORWARD, LONGER, STORES, Case
from .ledger import Row

CHUNKED, SOFTMAX = "splats (chunked)", "softmax (torch)"
COPIED_AND_LEAST = 2  # copying q, k, v and the output moves 8 tensors, and the floor is a copy that moves 4
TEN_TIMES = 10


class Verdict(NamedTuple):
    """A figure beside what was aimed at, with the machine that it is of."""

    aim: str
    figure: str
    met: bool


Rows = list[Row]


def verdicts(rows: Rows) -> list[Verdict]:
    """Of all figures for which both sides were measured, from the rows of one machine."""
    found = [verdict for judge in TARGETS for verdict in judge(rows)]
    return sorted(found, key=lambda verdict: verdict.aim)


def beside_a_copy(rows: Rows) -> Iterable[Verdict]:
    for row in measured(rows, what=CHUNKED, subject="operator", num_splats=16, causal=False, passes=FORWARD):
        length = row["case"].seq_len
        if length >= 16_384:
            times = row["seconds"] / (COPIED_AND_LEAST * row["floor"])
            aim = f"bidirectional forward at most 2 times a copy of q, k, v and the output, M = 16, T = {length:,}"
            yield Verdict(aim, f"{times:.1f} times", times <= 2)


def beside_softmax(rows: Rows) -> Iterable[Verdict]:
    for row in measured(rows, what=CHUNKED, subject="operator", num_splats=32, causal=True, passes=BOTH, seq_len=8192):
        for other in alike(rows, row["case"], SOFTMAX):
            if "seconds" in other:
                times = other["seconds"] / row["seconds"]
                aim = "forward and backward at least 10 times as quick as causal softmax, M = 32, T = 8,192"
                yield Verdict(aim, f"{times:.1f} times", times >= TEN_TIMES)


def memory_beside_softmax(rows: Rows) -> Iterable[Verdict]:
    for row in measured(rows, what=CHUNKED, subject="operator", causal=True, passes=BOTH, seq_len=16_384):
        for other in alike(rows, row["case"], SOFTMAX):
            if "bytes" in other:
                times = row["bytes"] / other["bytes"]
                aim = (
                    "peak memory of forward and backward not above that of causal softmax, "
                    f"M = {row['case'].num_splats}, T = 16,384"
                )
                yield Verdict(aim, f"{times:.3f} times", times <= 1)


def longer_in_the_same_memory(rows: Rows) -> Iterable[Verdict]:
    for other in measured(rows, what=STORES, subject="memory"):
        length = other["case"].seq_len
        for row in measured(rows, what=CHUNKED, subject="memory", seq_len=LONGER * length):
            times = row["bytes"] / other["bytes"]
            aim = (
                f"{LONGER * length:,} tokens of splats in the memory of {length:,} of softmax that stores its matrix, "
                f"forward and backward, M = {row['case'].num_splats}"
            )
            yield Verdict(aim, f"{times:.3f} times that memory", times <= 1)


TARGETS: tuple[Callable[[Rows], Iterable[Verdict]], ...] = (
    beside_a_copy,
    beside_softmax,
    memory_beside_softmax,
    longer_in_the_same_memory,
)


def measured(rows: Rows, **fields: object) -> Rows:
    """Rows that hold a figure, of cases with these fields."""
    return [
        row
        for row in rows
        if row["result"] == "measured" and all(getattr(row["case"], name) == value for name, value in fields.items())
    ]


def alike(rows: Rows, case: Case, what: str) -> Rows:
    """Rows of another contender in the same group."""
    wanted = case._replace(what=what, num_splats=0)
    return [row for row in rows if row["case"] == wanted]
