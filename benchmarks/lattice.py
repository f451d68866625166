"""What many splats cost, of which a token touches few: time and memory beside a dense mixture, in one run.

    python -m benchmarks.lattice --record benchmarks/results/lattice.json

One thread, timed by the processor's clock, which other work on the machine disturbs least; the smallest of a few calls.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

from splatflow.diagnostics import peak_memory, write_record
from splatflow.ops import Lattice, Splats, splat_attention

# routing, top_p, splats
CASES = (
    ("lattice", 4, 1024),
    ("lattice", 4, 4096),
    ("lattice", 4, 16_384),
    ("lattice", 4, 65_536),
    ("mixture", 4, 1024),
    ("grouped", 4, 1024),
    ("mixture", None, 64),
    ("mixture", None, 1024),
)


@dataclass(frozen=True)
class Options:
    """Sizes of the call, and where its rows go."""

    seq_len: int = 16_384
    num_heads: int = 2
    width: int = 64
    """Of positions and values."""
    calls: int = 3
    record: Path | None = None


def main(options: Options) -> None:
    torch.set_num_threads(1)
    rows = []
    for routing, top_p, num_splats in CASES:
        row: dict[str, str | int | float] = {"routing": routing, "top_p": top_p or "all", "num_splats": num_splats}
        for name, gradients in (("forward", False), ("forward and backward", True)):
            call = a_call(options, routing, top_p, num_splats, gradients)
            row[f"{name}, seconds"] = round(min(processor_seconds(call) for _ in range(options.calls)), 3)
            row[f"{name}, bytes a token"] = round(peak_memory(call) / options.seq_len)
        rows.append(row)
        print(row, flush=True)
    if options.record is not None:
        command = f"python -m benchmarks.lattice --seq-len {options.seq_len} --num-heads {options.num_heads}"
        notes = (
            f"causal, P = D = {options.width}, one thread, seconds of the processor, the least of {options.calls} calls"
        )
        write_record(options.record, command=command, rows=rows, seeds=[0], notes=notes)


def a_call(options: Options, routing: str, top_p: int | None, num_splats: int, gradients: bool) -> Callable[[], None]:
    """The operator on random tokens and splats, causal."""
    torch.manual_seed(0)
    heads, width = options.num_heads, options.width
    send, receive = (F.rms_norm(torch.randn(1, options.seq_len, heads, width), (width,)) for _ in range(2))
    values = torch.randn(1, options.seq_len, heads, width)
    scale = 0.5 * math.log(math.sqrt(width) / 2)
    splats: Splats | Lattice
    if routing == "lattice":
        points = math.isqrt(num_splats)
        halves = torch.full((heads, 2, points), scale)
        splats = Lattice(torch.randn(heads, 2, points, width // 2), halves, torch.zeros_like(halves))
    else:
        scales = torch.full((heads, num_splats), scale)
        splats = Splats(torch.randn(heads, num_splats, width), scales, torch.zeros_like(scales))
    leaves = [part.requires_grad_(gradients) for part in (send, receive, values, splats.centers)]

    def call() -> None:
        output, _ = splat_attention(send, receive, values, splats, routing=routing, top_p=top_p)
        if gradients:
            torch.autograd.grad(output.sum(), leaves)

    return call


def processor_seconds(call: Callable[[], None]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
