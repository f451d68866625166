"""The main job in one command: a splat model and its softmax twin learn the same text and are compared.

The text is the source of Python's own standard library, which every machine has. What is printed is also written as a
page with pictures, and as a record, demo.json.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from splatflow import diagnostics
from splatflow.diagnostics.page import short_count
from splatflow.diagnostics.speed import compare_mixers
from splatflow.models import SplatFlowCache, SplatFlowForCausalLM
from splatflow.nn import silence
from splatflow.requirements import require_at_least

from .baselines import ngram_bits_per_byte, xz_bits_per_byte
from .config import ModelConfig, TrainConfig
from .evaluate import Score, bits_per_byte
from .text import TokenWindows, byte_tokenizer, encode, standard_library_text, token_byte_lengths
from .trainer import build_model, train

SPLATS, SOFTMAX, WITHOUT_SPLATS = "splats + window", "softmax twin", "splats + window, splats off"
XZ, NGRAM = "xz -9", "5-gram"
TRAIN, HELDOUT, SPLATS_FOLDER, SOFTMAX_FOLDER = "train.txt", "heldout.txt", "splats", "softmax"
MARK = ".splatflow-demo"  # an empty file in a folder that a demo may write over
HELDOUT_BYTES = 262_144  # enough for an interval of a few percent, and few enough to be read many times
PROMPT = "    def read(self, size=-1):\n"
SAMPLE_TOKENS = 300

MODEL = ModelConfig(
    hidden_size=128, num_layers=4, num_heads=4, num_splats=32, window_size=16, head_norm=True, output_gate=True
)


@dataclass(frozen=True)
class DemoConfig:
    """Train a small splat model and its softmax twin on Python's own library, and compare them."""

    output_dir: str = "runs/demo"
    """Folder for the models, their logs and the page; an earlier demo there is replaced."""
    steps: int = 300
    """Updates of each model, of 4,096 tokens each."""
    learning_rate: float = 2e-3
    """The highest of the schedule, for both models."""
    seed: int = 0
    """Of both models, of the order of the text, and of the sample."""
    seq_lens: tuple[int, ...] = (256, 1024, 4096, 16384)
    """Lengths at which time and memory are measured."""

    def __post_init__(self) -> None:
        require_at_least(1, steps=self.steps, seq_lens=min(self.seq_lens, default=0))


def demo(config: DemoConfig) -> int:
    """Trains, measures, prints, and writes the page; the exit status."""
    start, console = time.perf_counter(), Console()
    folder = Path(config.output_dir)
    clear(folder)
    learnt, heldout = write_text(folder)
    console.print(f"Python's own library: {len(learnt):,} bytes to learn from, {len(heldout):,} held out, by file.")

    splat_run = train_config(config, folder)
    runs = {SPLATS: splat_run, SOFTMAX: softmax_twin(splat_run, folder)}
    models = {}
    for name, run in runs.items():
        console.rule(f"training: {name}, {num_parameters(run.model):,} parameters")
        models[name] = train(run).to("cpu")  # where the mixers are timed and the sample is written

    console.rule("held-out text")
    scores = measure_quality(models, heldout, splat_run.seq_len)
    levels = {XZ: xz_bits_per_byte(learnt, heldout), NGRAM: ngram_bits_per_byte(learnt, heldout)}
    quality = quality_table(scores, levels, runs)
    show(console, quality)

    console.rule("speed and memory of one mixer, forward")
    mixers = {name: model.model.layers[0].get_submodule("mixer") for name, model in models.items()}
    rows = compare_mixers(mixers, MODEL.hidden_size, config.seq_lens)
    scaling = scaling_table(rows)
    show(console, scaling)

    console.rule("what the splat model writes")
    sample, num_tokens, states = write_sample(models, config.seed)
    console.print(sample, markup=False, highlight=False)
    memory = (
        f"After {num_tokens:,} tokens the splat model remembers {states[SPLATS]:,} bytes and will never need more; "
        f"the twin's KV cache holds {states[SOFTMAX]:,} bytes and grows by {states[SOFTMAX] // num_tokens:,} a token."
    )
    console.print(memory)

    curves = {name: learning_curve(Path(run.output_dir)) for name, run in runs.items()}
    page = folder / "demo.html"
    page.write_text(
        diagnostics.page(
            "Splat attention and its softmax twin",
            [
                diagnostics.Section("Learning", diagnostics.figure_learning_curves(curves, levels)),
                diagnostics.Section("Held-out text", diagnostics.table(*quality)),
                diagnostics.Section(
                    "Time and memory of one mixer", diagnostics.figure_scaling(rows) + diagnostics.table(*scaling)
                ),
                diagnostics.Section(
                    "A sample", f"<pre>{diagnostics.escape(sample)}</pre><p>{diagnostics.escape(memory)}</p>"
                ),
            ],
        ),
        encoding="utf-8",
    )
    record: list[dict[str, Any]] = [{"model": name, **asdict(score)} for name, score in scores.items()]
    record += [{"model": name, "parameters": num_parameters(run.model)} for name, run in runs.items()]
    record += [{"model": name, "bits_per_byte": bits} for name, bits in levels.items()]
    record += [*rows, *({"model": name, "tokens": num_tokens, "state_bytes": size} for name, size in states.items())]
    command = f"splatflow demo --steps {config.steps} --learning-rate {config.learning_rate} --seed {config.seed}"
    diagnostics.write_record(folder / "demo.json", command=command, rows=record, seeds=[config.seed])
    console.rule()
    console.print(f"{time.perf_counter() - start:.0f} s. The same with pictures: {page.resolve()}", soft_wrap=True)
    return 0


def clear(folder: Path) -> None:
    """Makes the folder, or takes the models of an earlier demo from it; FileExistsError if it holds other things."""
    found = sorted(path.name for path in folder.glob("*"))
    if found and MARK not in found:
        raise FileExistsError(f"output_dir {folder} holds {found[0]}; expected a new folder or that of an earlier demo")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    for name in (SPLATS_FOLDER, SOFTMAX_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)


def write_text(folder: Path) -> tuple[bytes, bytes]:
    """The library's sources as two files in `folder`, and as bytes."""
    text = standard_library_text()
    learnt, heldout = b"".join(text.train), b"".join(text.heldout)[:HELDOUT_BYTES]
    (folder / TRAIN).write_bytes(learnt)
    (folder / HELDOUT).write_bytes(heldout)
    return learnt, heldout


def train_config(config: DemoConfig, folder: Path) -> TrainConfig:
    """How the splat model is trained."""
    return TrainConfig(
        text=str(folder / TRAIN),
        heldout=str(folder / HELDOUT),
        output_dir=str(folder / SPLATS_FOLDER),
        model=MODEL,
        seq_len=512,
        batch_size=8,
        steps=config.steps,
        learning_rate=config.learning_rate,
        warmup_steps=config.steps // 10,
        eval_every=max(1, config.steps // 5),
        save_every=0,
        seed=config.seed,
    )


def softmax_twin(run: TrainConfig, folder: Path) -> TrainConfig:
    """The same run of a softmax model, its MLP so wide that both have the same number of parameters."""
    twin = replace(run.model, mixer="softmax", window_size=0)
    narrow, wide = (num_parameters(replace(twin, intermediate_size=width)) for width in (1, 2))
    width = 1 + round((num_parameters(run.model) - narrow) / (wide - narrow))
    return replace(run, output_dir=str(folder / SOFTMAX_FOLDER), model=replace(twin, intermediate_size=width))


def num_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return build_model(config, byte_tokenizer()).num_parameters()


def measure_quality(models: dict[str, SplatFlowForCausalLM], heldout: bytes, seq_len: int) -> dict[str, Score]:
    """Bits per byte on the held-out text of both models, and of the splat model that has only its window left."""
    tokenizer = byte_tokenizer()
    windows = TokenWindows(encode([heldout], tokenizer), seq_len)
    lengths = token_byte_lengths(tokenizer)
    scores = {name: bits_per_byte(model, windows, bytes_per_token=lengths) for name, model in models.items()}
    with silence(models[SPLATS], "splats"):
        scores[WITHOUT_SPLATS] = bits_per_byte(models[SPLATS], windows, bytes_per_token=lengths)
    return scores


def quality_table(
    scores: dict[str, Score], levels: dict[str, float], runs: dict[str, TrainConfig]
) -> tuple[list[str], list[list[str]]]:
    """Headers and rows, best first."""
    rows = [
        (
            score.bits_per_byte,
            name,
            f"{score.low:.3f} to {score.high:.3f}",
            num_parameters(runs.get(name, runs[SPLATS]).model),
        )
        for name, score in scores.items()
    ]
    cells = [(bits, [name, f"{bits:.3f}", interval, f"{count:,}"]) for bits, name, interval, count in rows]
    cells += [(bits, [name, f"{bits:.3f}", "", ""]) for name, bits in levels.items()]
    return ["model", "bits per byte", "95 % interval", "parameters"], [row for _, row in sorted(cells)]


def scaling_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: tokens a second and peak memory of both mixers at each length."""
    found = {(row["mixer"], row["seq_len"]): row for row in rows}
    headers = ["n", *(f"{name}, {unit}" for unit in ("tokens/s", "MiB") for name in (SPLATS, SOFTMAX)), "faster"]
    table = []
    for seq_len in dict.fromkeys(row["seq_len"] for row in rows):
        splats, softmax = found[SPLATS, seq_len], found[SOFTMAX, seq_len]
        table.append(
            [
                short_count(seq_len),
                *(f"{seq_len / row['seconds']:,.0f}" for row in (splats, softmax)),
                *(f"{row['bytes'] / 2**20:.1f}" for row in (splats, softmax)),
                f"{softmax['seconds'] / splats['seconds']:.1f}x",
            ]
        )
    return headers, table


def write_sample(models: dict[str, SplatFlowForCausalLM], seed: int) -> tuple[str, int, dict[str, int]]:
    """A text by the splat model, its length in tokens, and how many bytes each model remembers after reading it."""
    tokenizer = byte_tokenizer()
    prompt = tokenizer(PROMPT, return_tensors="pt")
    torch.manual_seed(seed)
    options = {"max_new_tokens": SAMPLE_TOKENS, "do_sample": True, "temperature": 0.7, "top_k": 0}
    tokens = models[SPLATS].eval().generate(**prompt, **options, pad_token_id=tokenizer.pad_token_id)
    sizes = {}
    for name, model in models.items():
        cache = SplatFlowCache(MODEL.num_layers)
        with torch.no_grad():
            model.eval()(input_ids=tokens, past_key_values=cache)
        sizes[name] = cache.nbytes
    return tokenizer.decode(tokens[0]), tokens.shape[1], sizes


def learning_curve(folder: Path) -> list[tuple[int, float]]:
    """(tokens, held-out bits per byte) of each evaluation in a run's log."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["tokens"], line["eval_bits_per_byte"]) for line in lines if "eval_bits_per_byte" in line]


def show(console: Console, table: tuple[list[str], list[list[str]]]) -> None:
    """Print a table, its first column to the left and the others to the right."""
    headers, rows = table
    shown = Table(box=None, header_style="bold", padding=(0, 2))
    for index, header in enumerate(headers):
        shown.add_column(header, justify="left" if index == 0 else "right")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
