"""Does a mixer learn multi-query recall? `python -m benchmarks.recall --record benchmarks/results/<date>-recall.json`

Two blocks of width 64, vocabulary 256, 8 pairs in 64 tokens, 1,000 steps of 64 sequences, one core. Every mixer is
trained at several learning rates on one seed, then at its best rate on fresh seeds, whose accuracies are reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

from splatflow.diagnostics import write_record
from splatflow.nn import SoftmaxAttention, SplatAttention, SwiGLU
from splatflow.tasks import IGNORED, multi_query_recall

WIDTH, NUM_HEADS = 64, 2
MIXERS: dict[str, Callable[[], nn.Module]] = {
    "splats": lambda: SplatAttention(WIDTH, NUM_HEADS, num_splats=16, conv_size=4, head_norm=True),
    "window of 16 only": lambda: SoftmaxAttention(WIDTH, NUM_HEADS, window_size=16, conv_size=4, head_norm=True),
    "softmax": lambda: SoftmaxAttention(WIDTH, NUM_HEADS, conv_size=4, head_norm=True),
}


@dataclass(frozen=True)
class Task:
    """Pairs to recall, and how long to learn."""

    seq_len: int = 64
    num_pairs: int = 8
    vocab_size: int = 256
    batch_size: int = 64
    steps: int = 1000

    def batch(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return multi_query_recall(
            seed,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            num_pairs=self.num_pairs,
            vocab_size=self.vocab_size,
        )


@dataclass(frozen=True)
class Options:
    """Learning rates are tried on seed 0."""

    task: Task = Task()
    mixers: tuple[str, ...] = tuple(MIXERS)
    learning_rates: tuple[float, ...] = (3e-3, 5e-3, 1e-2, 2e-2)
    seeds: tuple[int, ...] = (1, 2, 3)
    record: str | None = None


class Recaller(nn.Module):
    """Two pre-norm blocks of a mixer and an MLP; embeddings and head are tied."""

    def __init__(self, mixer: Callable[[], nn.Module], vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, WIDTH)
        self.mixers = nn.ModuleList(mixer() for _ in range(2))
        self.mlps = nn.ModuleList(SwiGLU(WIDTH, 176) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(5))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(inputs)
        for index, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            hidden = hidden + mixer(self.norms[2 * index](hidden))[0]
            hidden = hidden + mlp(self.norms[2 * index + 1](hidden))
        return self.norms[4](hidden) @ self.embedding.weight.T


def accuracy_after_training(
    mixer: Callable[[], nn.Module], task: Task, *, learning_rate: float, seed: int, progress: str | None = None
) -> float:
    """Share of values recalled from batches that were not learnt from. `progress` names a bar."""
    torch.manual_seed(seed)
    model = Recaller(mixer, task.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, task.steps, pct_start=0.1)
    first = 1_000_000 * seed  # batches are numbered; no two runs, nor training and test, share one
    for step in tqdm(range(task.steps), desc=progress, disable=progress is None, leave=False):
        inputs, labels = task.batch(first + step)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        right, asked = 0, 0
        for test in range(8):
            inputs, labels = task.batch(first + task.steps + test)
            right += (model(inputs).argmax(-1) == labels).sum().item()
            asked += (labels != IGNORED).sum().item()
    return right / asked


def main(options: Options) -> None:
    torch.set_num_threads(1)
    rows = []
    for name in options.mixers:
        mixer = MIXERS[name]

        def measure(learning_rate: float, seed: int, name: str = name, mixer: Callable = mixer) -> float:
            start = time.perf_counter()
            label = f"{name}, rate {learning_rate:g}, seed {seed}"
            accuracy = accuracy_after_training(
                mixer, options.task, learning_rate=learning_rate, seed=seed, progress=label
            )
            seconds = round(time.perf_counter() - start, 1)
            rows.append(
                {"mixer": name, "learning_rate": learning_rate, "seed": seed, "accuracy": accuracy, "seconds": seconds}
            )
            print(f"{label}: {accuracy:.3f} in {seconds:.0f} s", flush=True)
            return accuracy

        best = max(options.learning_rates, key=lambda rate: measure(rate, 0))
        fresh = [measure(best, seed) for seed in options.seeds]
        print(
            f"{name}: {min(fresh):.3f} to {max(fresh):.3f} on {len(fresh)} fresh seeds at rate {best:g}\n", flush=True
        )
    if options.record is not None:
        command = f"python -m benchmarks.recall  # {options}"
        write_record(options.record, command=command, rows=rows, seeds=[0, *options.seeds])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
