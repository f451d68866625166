"""What runs in a process of its own: texts are read once, then run after run is measured on one thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from splatflow.training.text import read_text

from .probe import Run, measure
from .studies import STUDIES, Corpus

Paths = tuple[Path, Path]  # of a text to learn from and of held-out text

_corpora: dict[str, Corpus] = {}


def prepare(paths: dict[str, Paths]) -> None:
    """Called once in each process."""
    torch.set_num_threads(1)
    _corpora.update({name: Corpus(*map(_read, pair)) for name, pair in paths.items()})


def work(run: Run, device: str) -> dict[str, Any]:
    corpus = STUDIES[run.study].corpus
    return measure(run, None if corpus is None else _corpora[corpus], device)


def _read(path: Path) -> bytes:
    return b"\n".join(read_text(str(path)))
