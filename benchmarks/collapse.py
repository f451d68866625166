"""Which remedy brings collapsed splats apart? `python -m benchmarks.collapse --record benchmarks/results/<file>.json`

A small model learns to recall 8 pairs. In all its layers and heads the splats begin in one place, alike in everything,
so that by symmetry they get one gradient and stay one splat. Each remedy is called between the steps, alone. Some are
blind to splats that are exactly equal; with them the splats begin a hair apart, and so does a run without a remedy.

`python -m benchmarks.collapse --draw <record>` draws the picture of docs from a record.
"""

# H head, M splat

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import nn

from benchmarks.quality.probe import Probe, Run, build
from benchmarks.quality.studies import STUDIES
from splatflow.diagnostics import COLORS, drawing, svg_text, write_record
from splatflow.nn import Strategy, dead_fraction, effective_num_splats, overlap_loss, usage
from splatflow.nn.strategy import Curriculum, KMeansStart, MinimumDistance, OverlapLoss, Repulsion, SplitAndPrune
from splatflow.nn.usage import splat_layers
from splatflow.tasks import IGNORED

STUDY, STATE, RATE = "short recall", 1620, 1e-2
HAIR = 1e-3  # noise on collapsed centers, whose coordinates have size 1
MEASUREMENTS = 10  # over a run
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "collapse.svg"


class Remedy(NamedTuple):
    """A strategy, and how the splats begin: this far apart, or (None) where the layer puts them."""

    strategy: Strategy
    noise: float | None = 0.0


REMEDIES: dict[str, Remedy] = {
    "none, not collapsed": Remedy(Strategy(), noise=None),
    "none": Remedy(Strategy()),
    "none, a hair apart": Remedy(Strategy(), noise=HAIR),
    "overlap loss, a hair apart": Remedy(OverlapLoss(weight=1.0), noise=HAIR),
    "repulsion, a hair apart": Remedy(Repulsion(strength=10.0), noise=HAIR),
    "minimum distance": Remedy(MinimumDistance(distance=4.0)),
    "split and prune": Remedy(SplitAndPrune(every=15)),
    "curriculum": Remedy(Curriculum(first=1, until=60)),
    "k-means start": Remedy(KMeansStart()),
}


@torch.no_grad()
def collapse(model: nn.Module, noise: float, seed: int) -> None:
    """All splats of a layer at the place of the first splat of its head, but for noise."""
    generator = torch.Generator().manual_seed(seed)
    for layer in splat_layers(model).values():
        layer.centers.copy_(layer.centers[:, :1] + noise * torch.randn(layer.centers.shape, generator=generator))


def health(model: Probe, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Means over all heads and layers: of usage, which is blind to splats in one place, and of their overlap."""
    shares = torch.cat(list(usage(model, batch).values()))  # [layers H, M]
    overlaps = [overlap_loss(layer.splats).item() for layer in splat_layers(model).values()]
    return {
        "dead_fraction": dead_fraction(shares).mean().item(),
        "effective_num_splats": effective_num_splats(shares).mean().item(),
        "overlap": fmean(overlaps),
    }


def learn(name: str, seed: int, steps: int) -> list[dict[str, str | int | float]]:
    """Rows over one run; the last has the accuracy of the trained model. As `probe.learn`, with the remedy's calls."""
    start = time.perf_counter()
    remedy, study = REMEDIES[name], STUDIES[STUDY]
    run = Run(STUDY, "splats", STATE, RATE, seed, steps)
    model = build(run, study.vocab_size)
    if remedy.noise is not None:
        collapse(model, remedy.noise, seed)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)]
    others = [parameter for parameter in model.parameters() if not any(parameter is weight for weight in weights)]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, run.rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.rate, steps, pct_start=0.1)
    rows: list[dict[str, str | int | float]] = []
    for step in range(1, steps + 1):
        inputs, labels = study.lessons[0](1_000_000 * seed + step - 1, None, run.batch_tokens)
        batch = {"inputs": inputs, "asked": labels != IGNORED}
        if step == 1:
            remedy.strategy.begin(model, optimizer, batch)
            rows.append({"remedy": name, "seed": seed, "step": 0, **health(model, batch)})
        loss = F.cross_entropy(model(**batch), labels[batch["asked"]])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        remedy.strategy.after_backward(model, optimizer, step)
        optimizer.step()
        remedy.strategy.after_step(model, optimizer, step, batch)
        schedule.step()
        if step % (steps // MEASUREMENTS) == 0:
            rows.append({"remedy": name, "seed": seed, "step": step, "loss": loss.item(), **health(model, batch)})
    model.eval()
    with torch.no_grad():
        rows[-1]["accuracy"] = study.examine(model, seed, None)["8 pairs"]
    rows[-1]["seconds"] = round(time.perf_counter() - start, 1)
    return rows


# what is measured -> title of its panel, ends of its axis (None: those of the data)
PANELS: dict[str, tuple[str, float | None, float | None]] = {
    "dead_fraction": ("dead fraction", 0.0, None),
    "effective_num_splats": ("effective number of splats", 0.0, None),
    "overlap": ("mean overlap", 0.0, 1.05),
}


def draw(record: dict) -> str:
    """Means of how splats are used and overlap against the step, a line for each remedy; names say the accuracy."""
    names = list(dict.fromkeys(row["remedy"] for row in record["rows"]))
    ordered = sorted(names, key=lambda name: -_mean(record, name, "accuracy"))
    with drawing(10.0, 4.4) as (figure, first):
        first.remove()
        for axes, (key, (title, bottom, top)) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
            for index, name in enumerate(ordered):
                steps = sorted({row["step"] for row in record["rows"] if row["remedy"] == name and key in row})
                heights = [_mean(record, name, key, step) for step in steps]
                color, style = COLORS[index % len(COLORS)], "-" if index < len(COLORS) else "--"
                label = f"{name}: {_mean(record, name, 'accuracy'):.3f}"
                axes.plot(steps, heights, color=color, linestyle=style, marker=".", label=label)
            axes.set_xlim(0, steps[-1])
            axes.set_ylim(bottom, top)
            axes.set_xlabel("step")
            axes.set_title(title)
        lines, labels = axes.get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=3, frameon=False, title="remedy: final accuracy")
        measured = ", ".join(title for title, _, _ in PANELS.values())
        return svg_text(figure, f"{measured} against the step, from collapsed splats, for each remedy")


def _mean(record: dict, remedy: str, key: str, step: int | None = None) -> float:
    rows = [row for row in record["rows"] if row["remedy"] == remedy and key in row]
    return fmean(row[key] for row in rows if step is None or row["step"] == step)


@dataclass(frozen=True)
class Options:
    steps: int = 300
    seeds: tuple[int, ...] = (1, 2, 3)
    record: str | None = None
    draw: str | None = None
    """Draw the picture from this record, without measuring."""


def main(options: Options) -> None:
    if options.draw is not None:
        svg = draw(json.loads(Path(options.draw).read_text(encoding="utf-8")))
        white = re.sub(r"(<svg[^>]*>)", r'\1<rect width="100%" height="100%" fill="white"/>', svg, count=1)
        PICTURE.write_text(white, encoding="utf-8")
        return
    torch.set_num_threads(1)
    rows = []
    for name in REMEDIES:
        for seed in options.seeds:
            rows += learn(name, seed, options.steps)
            print(rows[-1], flush=True)
    if options.record is not None:
        notes = (
            f"Recall of 8 pairs in 32 tokens, two layers of two heads, state {STATE}, rate {RATE:g}, {options.steps} "
            f"steps. A hair is noise of {HAIR:g}. Health is measured on the batch of its step; the last row of a run "
            f"has the accuracy on fresh sequences. Settings: {REMEDIES}"
        )
        command = f"python -m benchmarks.collapse --steps {options.steps} --record {options.record}"
        write_record(options.record, command=command, rows=rows, seeds=options.seeds, notes=notes)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
