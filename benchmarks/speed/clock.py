"""Times and memory of calls, in rounds and from cold caches. What a machine cannot do is a result, not an end."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Call = Callable[[int], object]  # given the number of the round, by which it picks one of several inputs

LEAST_ROUNDS, MOST_ROUNDS = 3, 25


class Clock(NamedTuple):
    """`flushed` bytes are written before each call, so that it finds nothing of its inputs in a cache."""

    device: torch.device
    flushed: torch.Tensor

    @classmethod
    def of(cls, device: str, flushed: int) -> Clock:
        return cls(torch.device(device), torch.empty(flushed, dtype=torch.uint8, device=device))

    def seconds(self, function: Callable[[], object]) -> float:
        """One call. On a GPU events are timed, between which the processor has had the flushing to run ahead."""
        self.flushed.zero_()
        if self.device.type != "cuda":
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        function()
        last.record()
        torch.cuda.synchronize(self.device)
        return first.elapsed_time(last) / 1000

    def rounds(self, calls: Mapping[Key, Call], *, seconds: float, deadline: float) -> dict[Key, list[float]]:
        """All in turn (A B C A B C ...), so that a drifting machine meets all alike.

        No round begins after `seconds` or after the deadline, unless fewer than three are done.
        """
        samples: dict[Key, list[float]] = {key: [] for key in calls}
        end = min(time.monotonic() + seconds, deadline)
        for number in range(MOST_ROUNDS):
            if number >= LEAST_ROUNDS and time.monotonic() > end:
                break
            for key, call in calls.items():
                samples[key].append(self.seconds(lambda call=call, number=number: call(number)))
        return samples


def summary(samples: list[float]) -> dict[str, Any]:
    """Median, and between what the middle half lies."""
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return {"seconds": statistics.median(samples), "low": low, "high": high, "rounds": len(samples)}


def outcome(function: Callable[[], Any], device: str) -> tuple[Any, dict[str, Any] | None]:
    """What a call returns, or the row that says why it returned nothing.

    Raises SystemExit if a GPU answers nothing any more: whatever came after would be reported as failed.
    """
    try:
        return function(), None
    except Exception as error:  # a peer may raise what it likes, and the table has to go on
        lost = is_out_of_memory(error)
        message = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise SystemExit(f"the GPU is lost after {message}: {error}") from error
        torch.cuda.empty_cache()
    return None, {"result": "out of memory" if lost else "failed", "reason": message}


def is_out_of_memory(error: Exception) -> bool:
    told = ("out of memory", "allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in told)


@contextmanager
def bounded_memory(device: str, share: float = 0.5) -> Iterator[None]:
    """On the CPU an allocation beyond this share of what is free fails, where the system would kill the process."""
    sizes = Path("/proc/self/statm"), Path("/proc/meminfo")
    if device != "cpu" or not all(path.exists() for path in sizes):
        yield
        return
    used = int(sizes[0].read_text().split()[0]) * resource.getpagesize()
    free = next(line for line in sizes[1].read_text().splitlines() if line.startswith("MemAvailable"))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + int(share * 1024 * int(free.split()[1])), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def quick_collections() -> Iterator[None]:
    """Within it, what there was before is not searched for garbage: of torch alone that takes a quarter of a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
