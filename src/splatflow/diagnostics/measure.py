"""Time and memory of a call, and what they were measured on, as plain numbers and strings."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

MINIMUM_ROUNDS = 3  # the fewest from which a median can leave out an outlier


def peak_memory(function: Callable[[], object], *, device: torch.device | str = "cpu", warmup: bool = True) -> int:
    """The greatest number of tensor bytes alive at once during `function()`, above what was alive before it.

    The function runs twice: the first run fills caches (rotary tables, compiled code, `.grad`), the second is measured.
    Without `warmup` the caller has done the first run. The result counts for as long as the function holds it.

    On the CPU every allocation of torch's allocator is followed, scratch inside fused operators included, with autograd
    or without. Not seen: what oneDNN and MKL allocate for themselves, the work of other Python threads, and that memory
    which was alive before the call is freed during it.

    Raises ValueError for a device that is neither `cpu` nor `cuda`, and whatever `function` raises.

    >>> peak_memory(lambda: torch.ones(1000).exp())  # the ones and their exponentials, 4 bytes each
    8000
    """
    device = _measurable(device)
    if warmup:
        function()
    gc.collect()  # a cycle freed halfway through the measured run would hide as many bytes
    return _peak_on_cuda(function, device) if device.type == "cuda" else _peak_on_cpu(function)


def time_calls(
    functions: dict[str, Callable[[], object]],
    *,
    repeats: int = 15,
    warmup: int = 1,
    seconds: float = 60.0,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Median seconds of each function, called in turn (A B C A B C ...), so that a drifting machine meets all alike.

    Args:
        functions: what to call, by name.
        repeats: rounds to measure, at least 3.
        warmup: rounds before them that are not measured.
        seconds: no round starts later than this after the call began, unless fewer than 3 are done.
        device: a `cuda` device is waited for before and after each call.

    Raises ValueError if there is nothing to call or a number is out of range.
    """
    device = _measurable(device)
    if not functions:
        raise ValueError("functions is empty, expected at least one function to time")
    if repeats < MINIMUM_ROUNDS:
        raise ValueError(f"repeats is {repeats}, expected at least {MINIMUM_ROUNDS}")
    if warmup < 0:
        raise ValueError(f"warmup is {warmup}, expected 0 or more")
    if seconds <= 0:
        raise ValueError(f"seconds is {seconds}, expected more than 0")

    deadline = time.perf_counter() + seconds
    for _ in range(warmup):
        for function in functions.values():
            function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for finished_rounds in range(repeats):
        if finished_rounds >= MINIMUM_ROUNDS and time.perf_counter() > deadline:
            break
        for name, function in functions.items():
            samples[name].append(_duration(function, device))
    return {name: statistics.median(durations) for name, durations in samples.items()}


def machine() -> dict[str, str | int]:
    """What the numbers were measured on, without anything that names its owner.

    Keys: `cpu`, `threads` (those torch uses), `platform`, `python`, `torch`, and `device` where there is a GPU.
    """
    facts: dict[str, str | int] = {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        # not platform.platform(): a kernel's release can carry the name of who built it
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    return facts


def commit(folder: Path | str = Path(__file__).parent) -> str:
    """The short git hash of the checkout that holds `folder`, "+dirty" behind it if tracked files were changed.

    "unknown" where `folder` is not part of a checkout (an installed wheel) or there is no git.
    """
    # a wheel in an environment inside somebody else's checkout: their commit says nothing of our code
    if _git(folder, "ls-files", "--error-unmatch", ".") is None:
        return "unknown"
    return _git(folder, "describe", "--always", "--exclude=*", "--dirty=+dirty") or "unknown"


def _measurable(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is '{device}', expected a cpu or a cuda device")
    return device


def _peak_on_cuda(function: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(function: Callable[[], object]) -> int:
    # torch keeps no counter for the CPU, but its profiler sees every allocation (> 0) and free (< 0), in order of time
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler of torch 2.13 prints two lines for every use
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorder:
        function()
    changes = [
        event.nbytes()
        for event in recorder.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    return max(accumulate(changes, initial=0))


def _duration(function: Callable[[], object], device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    function()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(folder: Path | str, *arguments: str) -> str | None:
    try:
        finished = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return finished.stdout.strip()
