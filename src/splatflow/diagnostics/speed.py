"""How time and memory grow with the sequence: the operator beside fused softmax attention, in one run."""

# B batch, T token, H head, M splat, D head width

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from splatflow.ops import Splats, splat_attention
from splatflow.requirements import require_at_least

from .measure import machine, peak_memory, time_calls
from .records import write_record

SDPA, SPLATS = "scaled_dot_product_attention", "splat_attention"


@dataclass(frozen=True)
class BenchConfig:
    """The operator and fused softmax attention, forward, on inputs of the same shape."""

    seq_lens: tuple[int, ...] = (256, 1024, 4096, 16384, 131072)
    """Sequence lengths in tokens."""
    batch_size: int = 1
    """Sequences at once."""
    num_heads: int = 8
    """Heads."""
    head_dim: int = 64
    """Width of positions and values in a head."""
    num_splats: int = 16
    """Splats a head."""
    longest_softmax: int = 16384
    """Softmax attention is left out for longer sequences, where it would take minutes."""
    threads: int | None = None
    """CPU threads; those torch chooses if not given"""
    seconds: float = 20.0
    """Time for each length, at least three rounds."""
    record: str | None = None
    """JSON file to write the rows to"""

    def __post_init__(self) -> None:
        require_at_least(
            1,
            batch_size=self.batch_size,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            num_splats=self.num_splats,
            threads=1 if self.threads is None else self.threads,
            seq_lens=min(self.seq_lens, default=0),
        )
        require_at_least(0, seconds=self.seconds)


def bench(config: BenchConfig) -> int:
    """Prints the table of `compare_operators`; the exit status."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(
        f"forward, fp32, B = {config.batch_size}, H = {config.num_heads}, P = D = {config.head_dim}, "
        f"M = {config.num_splats}; milliseconds, and how many times faster splats are\n"
    )
    print(f"{'':>9}{'bidirectional':>30}{'causal':>30}{'splats, µs a token':>24}")
    print(f"{'n':>9}" + f"{'softmax':>12}{'splats':>10}{'ratio':>8}" * 2 + f"{'bidir.':>14}{'causal':>10}")
    rows = []
    for seq_len in config.seq_lens:
        rows += (here := compare_operators(config, seq_len))
        print(f"{seq_len:>9,}" + _cells(here, seq_len), flush=True)
    if config.record is not None:
        options = (
            f"--batch-size {config.batch_size} --num-heads {config.num_heads} --head-dim {config.head_dim} "
            f"--num-splats {config.num_splats} --seq-lens {' '.join(map(str, config.seq_lens))} "
            f"--longest-softmax {config.longest_softmax} --seconds {config.seconds} --threads {torch.get_num_threads()}"
        )
        write_record(config.record, command=f"splatflow bench {options}", rows=rows, seeds=[0])
        print(f"\nrows written to {config.record}")
    return 0


@torch.no_grad()
def compare_operators(config: BenchConfig, seq_len: int) -> list[dict[str, Any]]:
    """A forward pass of each operator, causal and not, all called in turn on the same tensors.

    Returns dicts with the keys `mixer`, `causal`, `seq_len` (tokens), `seconds` (median) and `bytes` (peak memory).
    """
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch_size, seq_len, config.num_heads, config.head_dim)
    queries, keys, values = (torch.randn(shape, generator=generator) for _ in range(3))
    splats = random_splats(config.num_heads, config.num_splats, config.head_dim, generator)
    q, k, v = (
        part.transpose(1, 2).contiguous() for part in (queries, keys, values)
    )  # [B, H, T, D], as softmax likes it

    calls: dict[tuple[str, bool], Callable[[], object]] = {}
    for causal in (False, True):
        if seq_len <= config.longest_softmax:
            calls[SDPA, causal] = partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal)
        calls[SPLATS, causal] = partial(splat_attention, keys, queries, values, splats, causal=causal)
    named = {f"{mixer} {causal}": call for (mixer, causal), call in calls.items()}
    seconds = time_calls(named, repeats=50, warmup=2, seconds=config.seconds)
    return [
        {
            "mixer": mixer,
            "causal": causal,
            "seq_len": seq_len,
            "seconds": seconds[f"{mixer} {causal}"],
            "bytes": peak_memory(call),
        }
        for (mixer, causal), call in calls.items()
    ]


def random_splats(num_heads: int, num_splats: int, width: int, generator: torch.Generator) -> Splats:
    """Splats as a layer starts with them: on the sphere |c|^2 = P, with sigma^2 = sqrt(P) / 2."""
    centers = F.rms_norm(torch.randn(num_heads, num_splats, width, generator=generator), (width,))
    log_scales = torch.full((num_heads, num_splats), 0.5 * math.log(math.sqrt(width) / 2))
    return Splats(centers, log_scales, torch.zeros_like(log_scales))


@torch.no_grad()
def compare_mixers(
    mixers: Mapping[str, nn.Module], hidden_size: int, seq_lens: Sequence[int], *, seconds: float = 5.0
) -> list[dict[str, Any]]:
    """Time and peak memory of a forward pass of each layer at each length, as rows for `figure_scaling`.

    Returns dicts with the keys `mixer`, `seq_len` (tokens), `seconds` (median) and `bytes` (peak tensor memory).
    """
    rows = []
    for seq_len in seq_lens:
        hidden_states = torch.randn(1, seq_len, hidden_size, generator=torch.Generator().manual_seed(0))
        calls: dict[str, Callable[[], object]] = {name: partial(mixer, hidden_states) for name, mixer in mixers.items()}
        timed = time_calls(calls, repeats=15, seconds=seconds)
        rows += [
            {"mixer": name, "seq_len": seq_len, "seconds": timed[name], "bytes": peak_memory(call)}
            for name, call in calls.items()
        ]
    return rows


def _cells(rows: Sequence[Mapping[str, Any]], seq_len: int) -> str:
    seconds = {(row["mixer"], row["causal"]): row["seconds"] for row in rows}
    cells = ""
    for causal in (False, True):
        splats, softmax = seconds[SPLATS, causal], seconds.get((SDPA, causal))
        shown = ("-", "-") if softmax is None else (f"{1e3 * softmax:.2f}", f"{softmax / splats:.1f}x")
        cells += f"{shown[0]:>12}{1e3 * splats:>10.2f}{shown[1]:>8}"
    return cells + "".join(
        f"{1e6 * seconds[SPLATS, c] / seq_len:>{width}.2f}" for c, width in ((False, 14), (True, 10))
    )
