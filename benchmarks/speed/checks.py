"""Is every backend right, before it is timed? Output, state and all gradients beside the definition in fp64.

Inputs are drawn afresh from a seed that is recorded, and memory that nobody has written holds NaN, so that a kernel
that leaves out a corner is found out. A new row of `BACKENDS` is checked and timed without a change here.
"""

# B batch, T token, H head, M splat, P position width, D value width, K point of half a lattice

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from splatflow.diagnostics.speed import random_splats
from splatflow.ops import Lattice, Splats, SplatState, splat_attention

from .cases import Case
from .contenders import backends, reason_of_refusal
from .ledger import ROOT

if TYPE_CHECKING:
    from torch import Tensor

B, H = 2, 2
# relative errors: fp32 may not be tf32, bf16 is that of its products; gradients sum over more
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 2e-2)}
# where a token lies at the very edge of a reach, the definition in the same type is as far off: twice that is right too
MOST_RELIEF = 10
PLAIN = ("reference", "recurrent", "sparse", "reach", "chunked")  # backends without kernels of their own
SANITIZER, FOUND, SANITIZER_SECONDS = "compute-sanitizer", 99, 120


class Configuration(NamedTuple):
    """One call that a backend must get right. `decay` is None, "head" or "splat"."""

    seq_len: int
    num_splats: int
    position_dim: int = 64
    value_dim: int = 64
    causal: bool = True
    decay: str | None = None
    gate: bool = False
    state: bool = False
    routing: str = "mixture"
    top_p: int | None = None

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._asdict().items() if value not in (None, False))


def configurations(num_splats: tuple[int, ...]) -> dict[int, list[Configuration]]:
    """By number of splats what is timed, at lengths beside the edges of chunks; under 0 what is odd or for few."""
    made = {}
    for count in num_splats:
        made[count] = [Configuration(197, count, causal=False), Configuration(2 * max(64, count) + 1, count)]
        made[count] += [Configuration(127, count, decay=decay, state=True) for decay in ("head", "splat")]
        made[count] += [Configuration(131, count, routing="compact"), Configuration(131, count, top_p=4)]
    odd = {"position_dim": 6, "value_dim": 5, "gate": True, "state": True}
    made[0] = [Configuration(67, 7, causal=causal, **odd) for causal in (True, False)]
    made[0] += [Configuration(64, 7, decay=decay, **odd) for decay in (None, "head", "splat")]
    made[0] += [Configuration(131, 7, routing="gaussian", **odd), Configuration(131, 7, routing="compact", **odd)]
    made[0] += [Configuration(67, 37, routing="mixture", top_p=4, **odd)]
    made[0] += [Configuration(67, 49, routing="lattice", top_p=4, decay=decay, **odd) for decay in (None, "head")]
    return made


def drawn(configuration: Configuration, seed: int) -> dict[str, Tensor]:
    """All tensors of a call by name, fp32, on the CPU. Numbers that are given to backends in bf16 are such already."""
    generator = torch.Generator().manual_seed(seed)
    T, M, P, D = configuration[:4]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {name: normal(B, T, H, P) for name in ("send_positions", "receive_positions")}
    tensors["values"] = normal(B, T, H, D)
    tensors = {name: part.bfloat16().float() for name, part in tensors.items()}
    if configuration.routing == "lattice":
        K = math.isqrt(M)
        splats: Splats | Lattice = Lattice(normal(H, 2, K, P // 2), normal(H, 2, K) * 0.1, normal(H, 2, K) * 0.1)
    else:
        splats = random_splats(H, M, P, generator)._replace(log_amplitudes=0.1 * normal(H, M))
        if configuration.routing == "compact":
            splats = splats._replace(log_reaches=splats.log_scales + 1.0)
    tensors |= {f"splats {name}": part for name, part in splats._asdict().items() if part is not None}
    width = {"head": (), "splat": (M,)}
    if configuration.decay is not None:
        tensors["log_decay"] = F.logsigmoid(3 + normal(B, T, H, *width[configuration.decay]))
    if configuration.gate:
        tensors["write_gate"] = normal(B, T, H).sigmoid()
    if configuration.state:
        tensors |= {"state mass": normal(B, H, M).exp(), "state total": normal(B, H, M, D)}
    return tensors


def results(tensors: dict[str, Tensor], configuration: Configuration, backend: str) -> dict[str, Tensor]:
    """Output, final state and the gradient of every argument, of a weighted sum of all of them."""
    leaves = {name: part.detach().requires_grad_() for name, part in tensors.items()}
    kind = Lattice if configuration.routing == "lattice" else Splats
    parts = {name.removeprefix("splats "): part for name, part in leaves.items() if name.startswith("splats ")}
    options = {name: part for name, part in leaves.items() if " " not in name}
    if configuration.state:
        options["state"] = SplatState(leaves["state mass"], leaves["state total"])
    output, state = splat_attention(
        splats=kind(**parts),
        causal=configuration.causal,
        routing=configuration.routing,
        top_p=configuration.top_p,
        backend=backend,
        **options,
    )
    found = {"output": output, "mass": state.mass, "total": state.total}
    weights = torch.Generator().manual_seed(0)
    loss = sum(
        (part.double() * torch.randn(part.shape, generator=weights).to(part.device)).mean() for part in found.values()
    )
    gradients = torch.autograd.grad(loss, [*leaves.values()], materialize_grads=True, allow_unused=True)
    return {**found, **{f"d {name}": part for name, part in zip(leaves, gradients, strict=True)}}


@cache
def expectation(configuration: Configuration, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs, and what the definition makes of them in fp64: computed once for all backends."""
    tensors = drawn(configuration, seed)
    return tensors, results({name: part.double() for name, part in tensors.items()}, configuration, "reference")


@contextmanager
def one_thread() -> Iterator[None]:
    """For many small calls, between which threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within it, what `torch.empty` and its like give holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")  # it is the filling that is wanted
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filling


def errors(
    configuration: Configuration, backend: str, device: str, dtype: torch.dtype, seed: int
) -> dict[str, float] | None:
    """|found - expected| / |expected| of each result; None if the backend does not do this."""
    tensors, expected = expectation(configuration, seed)
    narrow = ("send_positions", "receive_positions", "values")
    given = {name: part.to(device, dtype if name in narrow else None) for name, part in tensors.items()}
    found: dict[str, Tensor] = {}
    with poisoned_memory():
        if reason_of_refusal(lambda: found.update(results(given, configuration, backend)), backend) is not None:
            return None
    # the greatest gradient is the unit of one that is 0 but for rounding
    unit = 1e-3 * max(part.norm().item() for name, part in expected.items() if name.startswith("d "))
    return {
        name: ((found[name].double().cpu() - part).norm() / part.norm().clamp_min(unit)).item()
        for name, part in expected.items()
    }


def check(backend: str, device: str, asked: list[Configuration], seed: int) -> dict[str, Any]:
    """The row of a backend: "right", "wrong" with the first that was, or "left out" if it does nothing of this."""
    greatest = {"output": 0.0, "gradient": 0.0}
    num_checked = 0
    for number, configuration in enumerate(asked):
        for dtype, tolerances in TOLERANCES.items():
            with one_thread():
                here = errors(configuration, backend, device, dtype, seed + number)
            if here is None:
                continue
            num_checked += 1
            for name, error in here.items():
                kind = "gradient" if name.startswith("d ") else "output"
                tolerance = tolerances[kind == "gradient"]
                if not error <= tolerance:  # NaN is wrong too
                    with one_thread():
                        plain = errors(configuration, "reference", device, dtype, seed + number)
                    tolerance = max(tolerance, min(2 * plain[name], MOST_RELIEF * tolerance))
                if not error <= tolerance:
                    told = f"{configuration}: {name} is off by {error:.1e} in {dtype}, expected at most {tolerance:g}"
                    return {"result": "wrong", "reason": told, "calls": num_checked}
                if dtype == torch.float32:
                    greatest[kind] = max(greatest[kind], error)
    if num_checked == 0:
        return {"result": "left out", "reason": "it supports no configuration that is checked"}
    return {"result": "right", "calls": num_checked, **greatest}


def check_case(name: str, num_splats: int, device: str) -> Case:
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in TOLERANCES)
    return Case("check", name, num_splats, True, "all", B, 0, H, 64, device, dtypes)


def jobs(num_splats: tuple[int, ...], device: str, seed: int) -> Iterator[tuple[Case, Callable[[], dict[str, Any]]]]:
    """All checks, each a row of its own, so that a call that is stopped does not begin again."""
    asked = configurations(num_splats)
    for backend in backends():
        for count, some in asked.items():
            yield check_case(backend, count, device), partial(check, backend, device, some, seed)
    yield check_case(SANITIZER, 0, device), partial(sanitize, device)


def sanitize(device: str) -> dict[str, Any]:
    """The smallest configurations of backends with kernels of their own, under compute-sanitizer."""
    ours = [backend for backend in backends() if backend not in PLAIN]
    if device != "cuda" or not ours:
        return {"result": "left out", "reason": "no backend here has kernels of its own for a GPU"}
    if shutil.which(SANITIZER) is None:
        return {"result": "left out", "reason": f"{SANITIZER} is not installed"}
    flags = ["--tool", "memcheck", "--error-exitcode", str(FOUND)]
    command = [SANITIZER, *flags, sys.executable, "-m", "benchmarks.speed.checks", *ours]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=SANITIZER_SECONDS, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"result": "left out", "reason": f"{SANITIZER} had not finished after {SANITIZER_SECONDS} s"}
    if finished.returncode == 0:
        return {"result": "right", "reason": f"{SANITIZER} found nothing in {', '.join(ours)}"}
    last = (finished.stdout + finished.stderr).strip().splitlines()[-1:]
    if finished.returncode == FOUND:
        return {"result": "wrong", "reason": f"{SANITIZER}: {' '.join(last)}"}
    return {"result": "left out", "reason": f"{SANITIZER} ended with {finished.returncode}: {' '.join(last)}"[:200]}


if __name__ == "__main__":  # under compute-sanitizer
    few = [Configuration(67, 16), Configuration(67, 16, causal=False), Configuration(67, 16, decay="head", state=True)]
    found = [check(backend, "cuda", few, seed=0)["result"] for backend in sys.argv[1:]]
    sys.exit(int("wrong" in found))
