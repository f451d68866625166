"""Does a prompt of a million tokens take more memory, or more time a token, than one of ten thousand?

    python -m benchmarks.prefill --record benchmarks/results/<file>.json

A small model with random values reads prompts of random bytes. Each figure comes from a process of its own: the peak
of resident memory of a whole `splatflow generate --prompt-file`, and the time of `prefill` in a process that has read
one piece before. Short prompts are read several times there. The cases take turns, so that a drifting machine meets
all alike, and medians are reported. Beside the time that passed stands the processor's, which neighbours disturb less.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import tyro

from splatflow.diagnostics import write_record

MEBIBYTE = 2**20
CLOCKS = {"seconds": time.perf_counter, "processor seconds": time.process_time}
SHORT = 500_000  # bytes; what is shorter is read several times, to be as little at the mercy of the moment


@dataclass(frozen=True)
class Options:
    """The model is that of the hybrid: a window beside the splats, and a decay a head."""

    num_tokens: tuple[int, ...] = (10_000, 1_000_000)
    prefill_sizes: tuple[int, ...] = (2048,)
    rounds: int = 3
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 2
    num_splats: int = 16
    window_size: int = 32
    record: str | None = None


def save_model(options: Options, folder: Path) -> None:
    from splatflow.training.config import ModelConfig
    from splatflow.training.text import byte_tokenizer
    from splatflow.training.trainer import build_model

    torch.manual_seed(0)
    names = ("hidden_size", "num_layers", "num_heads", "num_splats", "window_size")
    tokenizer = byte_tokenizer()
    build_model(ModelConfig(**{name: getattr(options, name) for name in names}), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def peak_of_command(model: Path, file: Path, prefill_size: int) -> int:
    """The most bytes that were resident at once in `splatflow generate`."""
    flags = ["--prompt-file", str(file), "--prefill-size", str(prefill_size), "--max-new-tokens", "20"]
    command = [sys.executable, "-m", "splatflow", "generate", str(model), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {status}")
    return usage.ru_maxrss * 1024  # Linux counts in KiB


def seconds_of_prefill(model: Path, file: Path, prefill_size: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.prefill", "--worker", str(model), str(file), str(prefill_size)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return json.loads(finished.stdout)


def worker(folder: str, file: str, prefill_size: str) -> None:
    """In a process of its own: prints the seconds of `prefill`."""
    from splatflow.training.pretrained import load_pretrained
    from splatflow.training.prompt import in_pieces, prefill, prompt_tokens
    from splatflow.training.text import text_blocks

    torch.set_num_threads(1)
    pretrained, size = load_pretrained(folder), int(prefill_size)
    prefill(pretrained.model, in_pieces([torch.arange(min(size, 8192)).numpy() % 256], size))
    durations: dict[str, list[float]] = {name: [] for name in CLOCKS}
    for _ in range(max(1, SHORT // Path(file).stat().st_size)):
        starts = {name: clock() for name, clock in CLOCKS.items()}
        prefill(pretrained.model, in_pieces(prompt_tokens(text_blocks(file), pretrained.tokenizer), size))
        for name, clock in CLOCKS.items():
            durations[name].append(clock() - starts[name])
    print(json.dumps({name: statistics.median(times) for name, times in durations.items()}))


def main(options: Options) -> None:
    peaks: dict[tuple[int, int], list[int]] = {}
    seconds: dict[tuple[int, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(options, folder)
        for num_tokens in options.num_tokens:
            text = random.Random(num_tokens).choices(range(32, 127), k=num_tokens - 1)  # and the mark before them
            (folder / f"{num_tokens}.txt").write_bytes(bytes(text))
        for _ in range(options.rounds):
            for case in product(options.num_tokens, options.prefill_sizes):
                file = folder / f"{case[0]}.txt"
                peaks.setdefault(case, []).append(peak_of_command(folder, file, case[1]))
                seconds.setdefault(case, []).append(seconds_of_prefill(folder, file, case[1]))
                times = ", ".join(f"{name} {1e6 * time / case[0]:.2f}" for name, time in seconds[case][-1].items())
                print(*case, f"{peaks[case][-1] / MEBIBYTE:.1f} MiB; a million tokens: {times}", flush=True)
    rows = [
        {
            "tokens": num_tokens,
            "prefill_size": prefill_size,
            "peak resident bytes": statistics.median(peaks[num_tokens, prefill_size]),
            **{
                f"{name} a token": statistics.median(round[name] for round in seconds[num_tokens, prefill_size])
                / num_tokens
                for name in CLOCKS
            },
        }
        for num_tokens, prefill_size in peaks
    ]
    for row in rows:
        print(", ".join(f"{name} {value:.6g}" for name, value in row.items()))
    if options.record is not None:
        notes = (
            f"Medians of {options.rounds} rounds in which the cases took turns, each figure from a process of its own, "
            "on a machine that others used at the same time. Peaks are of the whole command, Python and torch included."
        )
        command = f"OMP_NUM_THREADS=1 python -m benchmarks.prefill  # {options}"
        write_record(options.record, command=command, rows=rows, seeds=[0, *options.num_tokens], notes=notes)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main(tyro.cli(Options, description=__doc__))
