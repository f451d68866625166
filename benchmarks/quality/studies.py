"""What is asked of the contestants: from what they learn, on what they are examined, and which score decides.

A new study is one row of `STUDIES`.
"""

# B sequence, T token, L token with a label

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from splatflow.tasks import IGNORED, TASKS, TEXT_TASKS, consecutive_bytes, seen_before

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor, nn

Scores = dict[str, float]

EXAMINED = 900_000  # examination batches are numbered from here, training batches from 0
EXAM_TOKENS = 65_536  # of each exam
SWEEP_SEED = 0  # on which rates are chosen
HELDOUT_BYTES = 262_144  # on which a language model is examined, after as many on which its rate is chosen
MEAN, BITS = "mean accuracy", "bits per byte"


class Corpus(NamedTuple):
    """Bytes to learn from, and bytes kept away from learning."""

    train: bytes
    heldout: bytes


class Draw(NamedTuple):
    """`draw(seed, corpus)` gives inputs and labels of a fixed number of tokens; `task` is called by keyword."""

    task: Callable[..., tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]]
    options: dict[str, Any]

    def __call__(self, seed: int, text: bytes | None, num_tokens: int) -> tuple[Tensor, Tensor]:
        given = {} if text is None else {"text": text}
        batch_size = max(1, num_tokens // self.options["seq_len"])
        return self.task(seed, batch_size=batch_size, **given, **self.options)


Examine = Callable[["nn.Module", int, Corpus | None], Scores]


class Study(NamedTuple):
    """Lessons are taken in turn. `decides` names the score by which rates are chosen and contestants compared."""

    vocab_size: int
    lessons: tuple[Draw, ...]
    examine: Examine
    decides: str = MEAN
    higher_is_better: bool = True
    corpus: str | None = None  # the text that it needs

    @property
    def seq_len(self) -> int:
        """Of the longest lesson."""
        return max(lesson.options["seq_len"] for lesson in self.lessons)


def accuracies(model: nn.Module, seed: int, corpus: Corpus | None, *, exams: Mapping[str, Draw]) -> Scores:
    """Share of right answers in each exam, and their mean."""
    device = next(model.parameters()).device
    text = None if corpus is None else corpus.heldout
    scores = {}
    for name, draw in exams.items():
        right, asked = 0, 0
        for batch in range(EXAM_TOKENS // 2048):
            inputs, labels = (part.to(device) for part in draw(1_000_000 * seed + EXAMINED + batch, text, 2048))
            at = labels != IGNORED
            right += int((model(inputs, at).argmax(-1) == labels[at]).sum())
            asked += int(at.sum())
        scores[name] = right / asked
    return {**scores, MEAN: sum(scores.values()) / len(scores)}


def bits_per_byte(model: nn.Module, seed: int, corpus: Corpus | None, *, seq_len: int) -> Scores:
    """Bits on held-out bytes: of all, of those whose 4-gram stood in the window before and of the rest, by position.

    Every contestant and every seed is examined on the same bytes; rates are chosen on others.
    """
    assert corpus is not None
    first = 0 if seed == SWEEP_SEED else HELDOUT_BYTES
    heldout = corpus.heldout[first : first + HELDOUT_BYTES]
    device = next(model.parameters()).device
    bits, seen = [], []
    for inputs, labels in consecutive_bytes(heldout, batch_size=16, seq_len=seq_len):
        everywhere = torch.ones_like(inputs, dtype=torch.bool).to(device)
        nats = F.cross_entropy(model(inputs.to(device), everywhere), labels.flatten().to(device), reduction="none")
        bits.append(nats.cpu().view_as(inputs).double() / math.log(2))
        seen.append(seen_before(inputs, labels))
    bits, seen = torch.cat(bits), torch.cat(seen)
    scores = {BITS: bits.mean(), "4-gram seen": bits[seen].mean(), "4-gram new": bits[~seen].mean()}
    start = 0
    while start < seq_len:  # octaves: 0-15, 16-31, 32-63, ...
        end = min(max(16, 2 * start), seq_len)
        scores[f"bytes {start}-{end - 1}"] = bits[:, start:end].mean()
        start = end
    return {name: float(score) for name, score in scores.items()}


def _accuracy_study(
    task: Callable[..., Any],
    vocab_size: int,
    exams: Mapping[str, dict[str, Any]],
    unlearnt: Mapping[str, dict[str, Any]] | None = None,
    **study: Any,
) -> Study:
    """Lessons are like the exams, but for exams that nothing was learnt for."""
    lessons = {name: Draw(task, options) for name, options in exams.items()}
    more = {name: Draw(task, options) for name, options in (unlearnt or {}).items()}
    return Study(vocab_size, tuple(lessons.values()), partial(accuracies, exams={**lessons, **more}), **study)


def _pairs(*counts: int, room: int = 4, **options: int) -> dict[str, dict[str, Any]]:
    """Exams of so many pairs, in sequences of `room` tokens a pair."""
    return {f"{pairs} pairs": {"num_pairs": pairs, "seq_len": room * pairs, **options} for pairs in counts}


def _lengths(*lengths: int, **options: Any) -> dict[str, dict[str, Any]]:
    return {f"{length} tokens": {"seq_len": length, **options} for length in lengths}


STUDIES: dict[str, Study] = {
    "short recall": _accuracy_study(TASKS["recall"], 64, _pairs(8, vocab_size=64)),
    "recall": _accuracy_study(TASKS["recall"], 128, _pairs(4, 8, 16, 32, vocab_size=128), _pairs(48, vocab_size=128)),
    # twice the pairs, so that a larger memory is not full marks for everyone
    "wide recall": _accuracy_study(
        TASKS["recall"], 256, _pairs(8, 16, 32, 64, vocab_size=256), _pairs(96, 120, vocab_size=256)
    ),
    # the definition of Zoology: lengths 64 to 1,024, 4 to 256 pairs
    "long recall": _accuracy_study(
        TASKS["recall"],
        8192,
        {
            **_pairs(4, room=16, vocab_size=8192),
            **_pairs(8, room=8, vocab_size=8192),
            **_pairs(16, 32, 64, vocab_size=8192),
        },
        _pairs(128, 256, vocab_size=8192),
    ),
    "rebound recall": _accuracy_study(TASKS["rebound recall"], 128, _pairs(4, 8, 16, room=6, vocab_size=128)),
    "noisy recall": _accuracy_study(TASKS["noisy recall"], 128, _pairs(8, 16, room=6, vocab_size=128)),
    "copying": _accuracy_study(TASKS["copying"], 64, _lengths(64, vocab_size=64)),
    "selective copying": _accuracy_study(
        TASKS["selective copying"], 64, _lengths(64, vocab_size=64), _lengths(128, 256, vocab_size=64)
    ),
    "induction": _accuracy_study(
        TASKS["induction"], 64, _lengths(64, 128, vocab_size=64), _lengths(256, 512, vocab_size=64)
    ),
    "listops": _accuracy_study(TASKS["listops"], 32, _lengths(64)),
    "long listops": _accuracy_study(TASKS["listops"], 32, _lengths(2000, min_len=500, max_depth=10, max_args=10)),
    "needle": _accuracy_study(TEXT_TASKS["needle"], 256, _lengths(128), _lengths(256, 512, 1024), corpus="novels"),
    "wikitext bytes": Study(
        256,
        (Draw(TEXT_TASKS["next byte"], {"seq_len": 256}),),
        partial(bits_per_byte, seq_len=256),
        BITS,
        higher_is_better=False,
        corpus="wikitext",
    ),
    "novel bytes": Study(
        256,
        (Draw(TEXT_TASKS["next byte"], {"seq_len": 1024}),),
        partial(bits_per_byte, seq_len=1024),
        BITS,
        higher_is_better=False,
        corpus="novels",
    ),
}
