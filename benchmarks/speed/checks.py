"""Is every backend right, before it is timed? Output, state and all gradients beside the definition in fp64.

Inputs are drawn afresh from a seed that is recorded, and memory that nobody has written holds NaN, so that a kernel
that leaves out a corner is found out. A new row of `BACKENDS` is checked and timed without a change here.
"""

# B batch, T token, H head that sends, R head that receives from it, W token of a window, M splat, P position width,
# D value width, K point of half a lattice

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from splatflow.diagnostics.speed import random_splats
from splatflow.ops import Lattice, Splats, SplatState, splat_attention
from splatflow.ops.hybrid import hybrid_attention
from splatflow.ops.splats import Targets
from splatflow.ops.window_state import WindowState

from .cases import Case
from .contenders import DEFINITIONS, backends, reason_of_refusal
from .ledger import ROOT

if TYPE_CHECKING:
    from torch import Tensor

B, H = 2, 2
# relative errors: fp32 may not be tf32, bf16 is that of its products; gradients sum over more
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 2e-2)}
# where a token lies at the very edge of a reach, the definition in the same type is as far off: twice that is right too
MOST_RELIEF = 10
PLAIN = ("reference", "recurrent", "reach", "chunked")  # backends without kernels of their own
STEPS = ("portable", "triton")  # ways to decode a token of the hybrid
PER_TOKEN = ("send_positions", "receive_positions", "values", "log_decay", "write_gate")
# so many tokens are more than 1,024 events of a splat, of which a segment of a scan has no more, and, with a decay of
# each splat, more than 64 tiles of 16, which are two segments of a document
SEVERAL_SEGMENTS = 1063
LONGEST_MATRIX = 512  # tokens for which the definition is a matrix; what is longer it adds up token by token
SANITIZER, FOUND, SANITIZER_SECONDS = "compute-sanitizer", 99, 120


class Configuration(NamedTuple):
    """One call that a backend must get right. `decay` is None, "head" or "splat".

    `receivers` heads receive from each that sends; `documents` are the lengths of those packed end to end; with a
    `window` of so many tokens it is a token of the hybrid.
    """

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
    receivers: int = 1
    documents: tuple[int, ...] = ()
    window: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._asdict().items() if value not in (None, False, ()))


def configurations(num_splats: tuple[int, ...]) -> dict[int, list[Configuration]]:
    """By number of splats what is timed, at lengths beside the edges of chunks; under 0 what is odd or for few."""
    made = {}
    for count in num_splats:
        made[count] = [Configuration(197, count, causal=False), Configuration(2 * max(64, count) + 1, count)]
        made[count] += [Configuration(127, count, decay=decay, state=True) for decay in ("head", "splat")]
        made[count] += [Configuration(131, count, routing="compact"), Configuration(131, count, top_p=4)]
    packed = {"decay": "head", "state": True, "receivers": 2, "documents": (65, 0, 1, 131)}
    for count in num_splats[-2:]:  # the widest in each type: kernels take a second each to compile
        made[count] += [Configuration(197, count, **packed)]
    odd = {"position_dim": 6, "value_dim": 5, "gate": True, "state": True}
    made[0] = [Configuration(67, 7, causal=causal, **odd) for causal in (True, False)]
    made[0] += [Configuration(64, 7, decay=decay, **odd) for decay in (None, "head", "splat")]
    made[0] += [Configuration(131, 7, routing="gaussian", **odd), Configuration(131, 7, routing="compact", **odd)]
    made[0] += [Configuration(67, 37, routing="mixture", top_p=4, **odd)]
    made[0] += [Configuration(67, 49, routing="lattice", top_p=4, decay=decay, **odd) for decay in (None, "head")]
    made[0] += [Configuration(67, 7, causal=False, receivers=3, documents=(1, 0, 66), **odd)]
    made[0] += [Configuration(67, 49, routing="lattice", top_p=4, receivers=2, documents=(1, 0, 66), **odd)]
    # as many as there are, so that every token is sent to each
    every = {"routing": "lattice", "top_p": 4}
    made[0] += [Configuration(SEVERAL_SEGMENTS, 4, decay=decay, **every, **odd) for decay in (None, "head")]
    made[0] += [Configuration(523, 7, decay="splat", receivers=2, **odd)]  # more than 32 tiles of 16
    long = (37, 0, SEVERAL_SEGMENTS, 1)
    made[0] += [Configuration(sum(long), 7, decay="splat", documents=long, **odd)]
    return made


def steps(num_splats: tuple[int, ...]) -> list[Configuration]:
    """Tokens of the hybrid: of the fewest and of the most splats, and odd ones."""
    ends = sorted({min(num_splats), max(num_splats)})
    made = [Configuration(1, count, decay="head", state=True, window=32) for count in ends]
    odd = {"position_dim": 6, "value_dim": 5, "state": True}
    made += [Configuration(1, 7, receivers=3, window=1, **odd)]
    return [*made, Configuration(1, 7, decay="splat", gate=True, receivers=2, window=67, **odd)]


def drawn(configuration: Configuration, seed: int) -> dict[str, Tensor]:
    """All tensors of a call by name, fp32, on the CPU. Numbers that are given to backends in bf16 are such already."""
    generator = torch.Generator().manual_seed(seed)
    T, M, P, D = configuration[:4]
    R, S, documents = configuration.receivers, T + configuration.window, configuration.documents
    batch, num_states = (1, len(documents)) if documents else (B, B)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {"send_positions": normal(batch, S, H, P), "receive_positions": normal(batch, T, H * R, P)}
    tensors["values"] = normal(batch, S, H, D)
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
        tensors["log_decay"] = F.logsigmoid(3 + normal(batch, S, H, *width[configuration.decay]))
    if configuration.gate:
        tensors["write_gate"] = normal(batch, S, H).sigmoid()
    if configuration.state:
        tensors |= {"state mass": normal(num_states, H, M).exp(), "state total": normal(num_states, H, M, D)}
    if configuration.window:
        tensors |= {"log_scale": 0.3 * normal(H * R), "real": normal(batch, S) < 1}
    return tensors


def results(
    tensors: dict[str, Tensor], configuration: Configuration, backend: str, *, alone: bool = False
) -> dict[str, Tensor]:
    """Output, final state and the gradient of every argument, of a weighted sum of all of them.

    Packed documents are given as such, or each `alone`.
    """
    if configuration.window:
        return step(tensors, backend)
    leaves = {name: part.detach().requires_grad_() for name, part in tensors.items()}
    kind = Lattice if configuration.routing == "lattice" else Splats
    call = partial(
        splat_attention,
        splats=kind(**named(leaves, "splats")),
        causal=configuration.causal,
        routing=configuration.routing,
        top_p=configuration.top_p,
        backend=backend,
    )
    tokens = {name: part for name, part in leaves.items() if name in PER_TOKEN}
    before = SplatState(**named(leaves, "state")) if configuration.state else None
    boundaries = [0, *accumulate(configuration.documents)]
    if not configuration.documents:
        output, state = call(**tokens, state=before)
    elif not alone:
        ends = torch.tensor(boundaries, device=tokens["values"].device)
        output, state = call(**tokens, state=before, cu_seqlens=ends)
    else:
        pieces = []
        for number, (start, stop) in enumerate(pairwise(boundaries)):
            here = {name: part[:, start:stop] for name, part in tokens.items()}
            of_it = None if before is None else SplatState(*(part[number, None] for part in before))
            pieces.append(call(**here, state=of_it))
        outputs, states = zip(*pieces, strict=True)
        output, state = torch.cat(outputs, 1), SplatState(*map(torch.cat, zip(*states, strict=True)))
    found = {"output": output, "mass": state.mass, "total": state.total}
    weights = torch.Generator().manual_seed(0)
    loss = sum(
        (part.double() * torch.randn(part.shape, generator=weights).to(part.device)).mean() for part in found.values()
    )
    gradients = torch.autograd.grad(loss, [*leaves.values()], materialize_grads=True, allow_unused=True)
    return {**found, **{f"d {name}": part for name, part in zip(leaves, gradients, strict=True)}}


def step(tensors: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """What a token of the hybrid hears near and far, and both memories after it. One launch has no gradient."""

    def tokens(there: slice) -> WindowState:
        parts = {name: tensors[name][:, there] for name in WindowState._fields if name in tensors}
        return WindowState(**{**dict.fromkeys(WindowState._fields), **parts, "real": parts["real"].bool()})

    heard = hybrid_attention(
        Targets(tensors["receive_positions"], None),
        tokens(slice(-1, None)),
        tensors["log_scale"],
        Splats(**named(tensors, "splats")),
        tokens(slice(-1)),
        SplatState(**named(tensors, "state")),
        backend=backend,
    )
    window = {f"window {name}": part for name, part in heard.window._asdict().items() if part is not None}
    window["window real"] = heard.window.real.float()
    return {"near": heard.near, "far": heard.far, **heard.splats._asdict(), **window}


def named(tensors: dict[str, Tensor], of: str) -> dict[str, Tensor]:
    """The parts of "splats" or of the "state", by their own names."""
    return {name.removeprefix(f"{of} "): part for name, part in tensors.items() if name.startswith(f"{of} ")}


@cache
def expectation(configuration: Configuration, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs, and what the definition makes of them in fp64: computed once for all backends."""
    tensors = drawn(configuration, seed)
    doubles = {name: part.double() for name, part in tensors.items()}
    return tensors, results(doubles, configuration, definition_of(configuration), alone=True)


def definition_of(configuration: Configuration) -> str:
    """What others are compared with. A token of the hybrid has the portable form, each memory by itself."""
    if configuration.window:
        return "portable"
    return "reference" if configuration.seq_len <= LONGEST_MATRIX else "recurrent"


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
    # the greatest gradient is the unit of one that is 0 but for rounding; of no gradients the greatest result
    norms = {name: part.norm().item() for name, part in expected.items()}
    unit = 1e-3 * max([norm for name, norm in norms.items() if name.startswith("d ")] or norms.values())
    return {
        name: (found[name].double().cpu() - part).norm().item() / max(unit, norms[name])
        for name, part in expected.items()
    }


def check(backend: str, device: str, asked: list[Configuration], seed: int) -> dict[str, Any]:
    """The row of a backend: "right", "wrong" with the first that was, or "left out" if it does nothing of this."""
    greatest: dict[str, float] = {}
    num_checked = 0
    for number, configuration in enumerate(asked):
        for dtype, tolerances in TOLERANCES.items():
            if backend in DEFINITIONS and configuration.seq_len > LONGEST_MATRIX:
                continue
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
                        plain = errors(configuration, definition_of(configuration), device, dtype, seed + number)
                    tolerance = max(tolerance, min(2 * plain[name], MOST_RELIEF * tolerance))
                if not error <= tolerance:
                    told = f"{configuration}: {name} is off by {error:.1e} in {dtype}, expected at most {tolerance:g}"
                    return {"result": "wrong", "reason": told, "calls": num_checked}
                if dtype == torch.float32:
                    greatest[kind] = max(greatest.get(kind, 0.0), error)
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
    for way in ways_to_step():
        yield check_case(f"hybrid step ({way})", 0, device), partial(check, way, device, steps(num_splats), seed)
    yield check_case(SANITIZER, 0, device), partial(sanitize, device)


def ways_to_step() -> list[str]:
    """Without kernels under Triton's interpreter, as `backends`."""
    return [way for way in STEPS if way in ("portable", *backends())]


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


def few() -> Iterator[Configuration]:
    """The smallest that meet search, scan, packed documents and heads that share a sender."""
    yield Configuration(67, 16)
    yield Configuration(67, 16, causal=False)
    yield Configuration(67, 16, decay="head", state=True)
    yield Configuration(67, 16, receivers=2, documents=(37, 0, 30))
    yield Configuration(67, 49, position_dim=6, routing="lattice", top_p=4)
    yield Configuration(SEVERAL_SEGMENTS, 4, 6, 5, decay="head", routing="lattice", top_p=4)


if __name__ == "__main__":  # under compute-sanitizer
    found = [check(backend, "cuda", [*few()], seed=0)["result"] for backend in sys.argv[1:]]
    found.append(check("triton", "cuda", [Configuration(1, 16, state=True, window=32)], seed=0)["result"])
    sys.exit(int("wrong" in found))
