"""What skipping the splats that are out of reach saves: the backend "reach" beside "chunked", in one run.

    python -m benchmarks.reach --record benchmarks/results/reach.json

Tokens drift through the space, so that neighbours in time are neighbours in space, or are drawn one by one. One thread,
timed by the processor's clock, which other work on the machine disturbs least; the smallest of a few calls in turn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
import tyro

import splatflow.ops.reach as reach_module
from splatflow.diagnostics import write_record
from splatflow.ops import Splats, skipped_share, splat_attention

TOKENS = ("drifting", "independent")
WIDTHS, NUMS_SPLATS = (4, 32), (64, 256)
REACHES = (0.25, 0.5, 1.0, 2.0)  # in units of the length of a position; from 2 on everything is within reach


@dataclass(frozen=True)
class Options:
    """Sizes of the call, and where its rows go."""

    seq_len: int = 8192
    num_heads: int = 2
    value_width: int = 64
    drift: float = 0.002
    """How much of a drifting position is forgotten at each token."""
    calls: int = 3
    record: Path | None = None


def main(options: Options) -> None:
    torch.set_num_threads(1)
    rows = []
    for causal, width, num_splats, kind, reach in product((True, False), WIDTHS, NUMS_SPLATS, TOKENS, REACHES):
        leaves = inputs(options, width, num_splats, kind, reach)
        send, receive, _, splats = leaves
        row: dict[str, str | int | float] = {
            "causal": causal,
            "width": width,
            "num_splats": num_splats,
            "tokens": kind,
            "reach": reach,
            "skipped": round(skipped_share(send, receive, splats, causal=causal).item(), 3),
        }
        for name, gradients in (("forward", False), ("forward and backward", True)):
            seconds = least_seconds(
                {backend: a_call(leaves, causal, backend, gradients) for backend in ("chunked", "reach")}, options.calls
            )
            row |= {f"{name}, {backend}, seconds": round(least, 4) for backend, least in seconds.items()}
        rows.append(row)
        print(row, flush=True)
    if options.record is not None:
        command = f"python -m benchmarks.reach --seq-len {options.seq_len} --num-heads {options.num_heads}"
        notes = (
            f"D = {options.value_width}, positions of length sqrt(P), sigma^2 = sqrt(P) / 2, reaches in units of "
            f"sqrt(P); drift {options.drift:g}; one thread, seconds of the processor, the least of {options.calls} "
            f'calls. "auto" takes "reach", which hands over to "chunked" below {reach_module.FEWEST_SPLATS} splats: '
            "here it does not, whatever their number."
        )
        write_record(options.record, command=command, rows=rows, seeds=[0], notes=notes)


def inputs(
    options: Options, width: int, num_splats: int, kind: str, reach: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Splats]:
    """Tokens and splats on the sphere on which a layer has them; a token receives near where it sends."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, options.seq_len, options.num_heads, width)
    steps = torch.randn(shape, generator=generator)
    if kind == "drifting":
        kept = 1 - options.drift
        position, path = steps[:, 0], []
        for step in steps.unbind(1):
            position = kept * position + math.sqrt(1 - kept**2) * step
            path.append(position)
        steps = torch.stack(path, 1)
    send, receive = (
        F.rms_norm(steps + noise * torch.randn(shape, generator=generator), (width,)) for noise in (0.0, 0.05)
    )
    values = torch.randn(*shape[:3], options.value_width, generator=generator)
    centers = F.rms_norm(torch.randn(options.num_heads, num_splats, width, generator=generator), (width,))
    zeros = torch.zeros(options.num_heads, num_splats)
    splats = Splats(centers, zeros + 0.5 * math.log(math.sqrt(width) / 2), zeros, zeros + math.log(reach * width**0.5))
    return send, receive, values, splats


def a_call(
    leaves: tuple[torch.Tensor, torch.Tensor, torch.Tensor, Splats], causal: bool, backend: str, gradients: bool
) -> Callable[[], None]:
    *tokens, splats = leaves
    tokens = [part.detach().requires_grad_(gradients) for part in tokens]
    splats = Splats(*(part.detach().requires_grad_(gradients) for part in splats))

    def call() -> None:
        with patch.object(reach_module, "FEWEST_SPLATS", 0):
            output, _ = splat_attention(*tokens, splats, routing="compact", causal=causal, backend=backend)
        if gradients:
            torch.autograd.grad(output.sum(), [*tokens, *splats])

    return call


def least_seconds(calls: dict[str, Callable[[], None]], count: int) -> dict[str, float]:
    """Seconds of the processor, of the quickest of so many calls, all called in turn after one that is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(count + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    return {name: min(measured[1:]) for name, measured in seconds.items()}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
