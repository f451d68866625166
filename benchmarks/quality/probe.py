"""One run: a small model with one mixer learns a study at one rate from one seed, and is examined.

Two pre-norm blocks of mixer and SwiGLU, embeddings and head tied. The SwiGLUs are as wide as it takes to give all
contestants the same number of parameters. Embeddings begin at RMS 1, weights at 1 / sqrt(fan-in), and logits are
divided by sqrt(C), as in T5: of what was tried every contestant learns soonest so (`docs/log.md`).
"""

# B sequence, T token, V vocabulary, C channel, L token with a label

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from splatflow.nn import SplatAttention, SwiGLU, initialise_from_attention
from splatflow.nn.fewer_splats import keep_splats
from splatflow.tasks import IGNORED

from .contestants import CONTESTANTS, SHELL, TOLERANCE, Shell, size_for, state_size, step_operations
from .studies import STUDIES, Corpus, Study

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

REFERENCE, REFERENCE_WIDTH = "splats", 96  # whose parameters the others are given, and its SwiGLUs' width
PLACES = 64  # of a table by place; farther on it begins anew


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's figures. Two runs that compare equal give the same numbers on one machine."""

    study: str
    mixer: str
    state: int  # numbers a layer, as asked for
    rate: float
    seed: int
    steps: int
    shell: Shell = SHELL
    num_layers: int = 2
    batch_tokens: int = 2048  # a step


class Probe(nn.Module):
    """Token ids -> logits, at the places that are asked for."""

    def __init__(self, run: Run, vocab_size: int, inner_width: int) -> None:
        super().__init__()
        width, contestant = run.shell.width, CONTESTANTS[run.mixer]
        size = size_for(run.mixer, run.shell, run.state)
        self.embedding = nn.Embedding(vocab_size, width)
        self.mixers = nn.ModuleList(contestant.build(run.shell, size) for _ in range(run.num_layers))
        self.mlps = nn.ModuleList(SwiGLU(width, inner_width) for _ in range(run.num_layers))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * run.num_layers + 1))
        self.table, rows = contestant.table, {None: 0, "token": vocab_size, "place": PLACES}[contestant.table]
        biases = [run.shell.num_heads * mixer.num_biases for mixer in self.mixers] if rows else []
        self.tables = nn.ModuleList(nn.Embedding(rows, numbers) for numbers in biases)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for mixer in self.mixers:
            mixer.reset_parameters()
        for table in self.tables:
            nn.init.zeros_(table.weight)

    def forward(self, inputs: Int[Tensor, "B T"], asked: Bool[Tensor, "B T"]) -> Float[Tensor, "L V"]:
        hidden = self.embedding(inputs)
        for index, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            hidden = hidden + mixer(self.norms[2 * index](hidden), **self.biases(index, inputs))[0]
            hidden = hidden + mlp(self.norms[2 * index + 1](hidden))
        return self.norms[-1](hidden[asked]) @ self.embedding.weight.T * self.embedding.embedding_dim**-0.5

    def biases(self, index: int, inputs: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        """What the table of a layer says of each token or of its place, as an argument of its mixer."""
        if self.table is None:
            return {}
        places = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs) % PLACES
        biases = self.tables[index](inputs if self.table == "token" else places)
        return {"token_bias": biases.unflatten(-1, (self.mixers[index].num_heads, -1))}

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


@lru_cache
def inner_width_for(mixer: str, state: int, shell: Shell, num_layers: int, vocab_size: int) -> int:
    """How wide SwiGLUs are so that a contestant has the reference's parameters.

    Raises:
        ValueError: the mixer alone has more.
    """

    def parameters(name: str, inner_width: int) -> int:
        run = Run("", name, state, rate=0.0, seed=0, steps=0, shell=shell, num_layers=num_layers)
        return Probe(run, vocab_size, inner_width).num_parameters()

    wanted = parameters(REFERENCE, REFERENCE_WIDTH)
    without = parameters(mixer, 1)
    per_unit = parameters(mixer, 2) - without
    inner_width = 1 + round((wanted - without) / per_unit)
    if inner_width < 1 or abs(without + (inner_width - 1) * per_unit - wanted) > TOLERANCE * wanted:
        raise ValueError(f"{mixer} of state {state} has {without} parameters without a SwiGLU, {wanted} are asked for")
    return inner_width


def build(run: Run, vocab_size: int) -> Probe:
    """A fresh model, the same for the same run."""
    inner_width = inner_width_for(run.mixer, run.state, run.shell, run.num_layers, vocab_size)
    torch.manual_seed(run.seed)
    return Probe(run, vocab_size, inner_width)


def learn(model: Probe, study: Study, run: Run, corpus: Corpus | None, device: torch.device) -> Probe:
    """AdamW with a one-cycle schedule. Only the weights of linear layers and embeddings decay.

    An heir begins where the other one is after as many steps of the same schedule.

    Returns:
        The model that is to be examined: `model` itself, or one with the splats that the last batch used most.
    """
    contestant, lessons_before = CONTESTANTS[run.mixer], 0
    if contestant.heir_of is not None:
        lessons_before = run.steps
        forebear = _forebear(model, study, run, corpus, device)
        inherit(model, forebear, next(lessons_of(study, run, corpus, device, lessons_before))[1])
    strategy, kept = contestant.strategy, contestant.kept
    optimizer = optimizer_of(model, run.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.rate, run.steps, pct_start=0.1)
    for step, batch, answers in lessons_of(study, run, corpus, device, lessons_before):
        if step == 1:
            strategy.begin(model, optimizer, batch)
        loss = F.cross_entropy(model(**batch), answers)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        strategy.after_backward(model, optimizer, step)
        optimizer.step()
        strategy.after_step(model, optimizer, step, batch)
        schedule.step()
    return model if kept == 1.0 else keep_splats(model, max(1, round(kept * model.mixers[0].num_splats)), batch)


def _forebear(model: Probe, study: Study, run: Run, corpus: Corpus | None, device: torch.device) -> Probe:
    """Whom a model is the heir of, after its own lessons: equal in all but the mixers."""
    before = replace(run, mixer=CONTESTANTS[run.mixer].heir_of)
    torch.manual_seed(run.seed)
    forebear = Probe(before, study.vocab_size, model.mlps[0].down_proj.in_features).to(device)
    return learn(forebear, study, before, corpus, device)


def inherit(model: Probe, forebear: Probe, batch: dict[str, Tensor]) -> None:
    """Take over everything that two models share; splats start from softmax attention, layer by layer, on a batch."""
    shared = {name: value for name, value in forebear.state_dict().items() if not name.startswith("mixers.")}
    model.load_state_dict(shared, strict=False)
    for mixer, before in zip(model.mixers, forebear.mixers, strict=True):
        if isinstance(before, SplatAttention):
            mixer.load_state_dict(before.state_dict())
        else:
            initialise_from_attention(mixer, before, _arriving(model, mixer, batch))


@torch.no_grad()
def _arriving(model: Probe, mixer: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, "B T C"]:
    """The hidden states that reach a mixer."""
    seen = []
    hook = mixer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(**batch)
    hook.remove()
    return seen[0]


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)]
    others = [parameter for parameter in model.parameters() if not any(parameter is weight for weight in weights)]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, rate, betas=(0.9, 0.95), fused=True)


def lessons_of(
    study: Study, run: Run, corpus: Corpus | None, device: torch.device, lessons_before: int = 0
) -> Iterator[tuple[int, dict[str, Tensor], Int[Tensor, " L"]]]:
    """Each step from 1, its batch as arguments of a probe, and the right answers; so many lessons went before."""
    text = None if corpus is None else corpus.train
    for step in range(run.steps):
        lesson = study.lessons[step % len(study.lessons)]
        # batches are numbered; no two seeds, nor training and examination, share one
        number = 1_000_000 * run.seed + lessons_before + step
        inputs, labels = (part.to(device) for part in lesson(number, text, run.batch_tokens))
        asked = labels != IGNORED
        yield step + 1, {"inputs": inputs, "asked": asked}, labels[asked]


def measure(run: Run, corpus: Corpus | None, device: str = "cpu") -> dict[str, Any]:
    """Scores and sizes of a run. A score that is not finite, because training diverged, is None."""
    start = time.perf_counter()
    study = STUDIES[run.study]
    model = build(run, study.vocab_size).to(device)
    parameters = model.num_parameters()
    model = learn(model, study, run, corpus, torch.device(device))
    model.eval()
    with torch.no_grad():
        scores = study.examine(model, run.seed, corpus)
    model.cpu()
    return {
        "scores": {name: round(score, 5) if math.isfinite(score) else None for name, score in scores.items()},
        "size": size_for(run.mixer, run.shell, run.state),
        "state_size": state_size(model.mixers[0], study.seq_len),
        "step_operations": step_operations(model.mixers[0], study.seq_len),
        "parameters": parameters,
        "seconds": round(time.perf_counter() - start, 1),
    }
