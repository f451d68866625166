"""The law of the house, kept by reading the imports of every file: ops <- nn <- models <- training <- cli.

A room is a folder or a module directly under `src/splatflow`; "__init__" stands for the names of `splatflow` itself.
Imports inside functions and under `TYPE_CHECKING` count like any other.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "splatflow"

# room -> the other rooms it may import
LAW = {
    "__init__": {"ops", "nn", "models"},
    "requirements": set(),
    "presets": {"requirements"},
    "ops": set(),
    "nn": {"requirements", "ops"},
    "models": {"requirements", "presets", "ops", "nn"},
    "tasks": {"requirements"},
    "diagnostics": {"requirements", "ops", "nn"},
    "training": {"requirements", "ops", "nn", "models", "tasks", "diagnostics"},
    "__main__": {"cli"},
    "cli": {"__init__", "presets", "ops", "nn", "models", "tasks", "diagnostics", "training"},
}
# another package -> the only rooms that may import it
GUESTS = {"transformers": {"models", "migration", "training"}}

MOST_LINES, MOST_LINES_OF_KERNELS = 300, 600


def room_of(path: Path, source: Path) -> str:
    return path.relative_to(source).parts[0].removesuffix(".py")


def imported_names(path: Path, source: Path) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of everything that a file imports."""
    package = ["splatflow", *path.relative_to(source).parent.parts]
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # one dot is the file's own package, each further dot its parent
            above = package[: len(package) - node.level + 1] if node.level else []
            parts = [*above, *(node.module.split(".") if node.module else [])]
            names += [(node.lineno, ".".join([*parts, alias.name])) for alias in node.names]
    return names


def breaches(source: Path) -> list[str]:
    """What in the files under `source` breaks the law, a line each."""
    found = []
    for path in sorted(source.rglob("*.py")):
        room = room_of(path, source)
        if room not in LAW:
            found.append(f"{path.relative_to(source)}: the room {room} has no row in LAW")
            continue
        for line, name in imported_names(path, source):
            package, _, rest = name.partition(".")
            place = f"{path.relative_to(source)}:{line}: {room} imports"
            if package == "splatflow":
                first = rest.partition(".")[0]
                other = first if first in LAW else "__init__"
                if other not in LAW[room] | {room}:
                    found.append(f"{place} {other}")
            elif package in GUESTS and room not in GUESTS[package]:
                found.append(f"{place} {package}")
    return found


def too_long(source: Path) -> list[str]:
    found = []
    for path in sorted(source.rglob("*.py")):
        relative = path.relative_to(source)
        limit = MOST_LINES_OF_KERNELS if relative.parts[:2] == ("ops", "triton") else MOST_LINES
        length = len(path.read_text(encoding="utf-8").splitlines())
        if length > limit:
            found.append(f"{relative}: {length} lines, at most {limit}")
    return found


def test_every_file_keeps_the_law():
    assert (SOURCE / "__init__.py").exists()
    assert breaches(SOURCE) == []


def test_no_file_is_too_long():
    assert too_long(SOURCE) == []


@pytest.mark.parametrize(
    ("file", "line", "breach"),
    [
        ("ops/a.py", "from splatflow.nn import SplatAttention", "ops imports nn"),
        ("ops/a.py", "import splatflow.nn.blocks", "ops imports nn"),
        ("ops/a.py", "from splatflow import nn", "ops imports nn"),
        ("ops/a.py", "from splatflow import SplatAttention", "ops imports __init__"),
        ("ops/a.py", "import splatflow", "ops imports __init__"),
        ("ops/a.py", "from ..nn.blocks import Block", "ops imports nn"),
        ("ops/a.py", "from .. import nn", "ops imports nn"),
        ("ops/__init__.py", "from ..nn import Block", "ops imports nn"),
        ("ops/triton/a.py", "from ...nn import Block", "ops imports nn"),
        ("nn/a.py", "def late():\n    from splatflow.models import cache", "nn imports models"),
        ("nn/a.py", "if TYPE_CHECKING:\n    from splatflow.models import cache", "nn imports models"),
        ("nn/a.py", "from splatflow.diagnostics import machine", "nn imports diagnostics"),
        ("diagnostics/a.py", "from splatflow import models", "diagnostics imports models"),
        ("models/a.py", "from splatflow.diagnostics import machine", "models imports diagnostics"),
        ("models/a.py", "from splatflow.tasks import recall", "models imports tasks"),
        ("tasks/a.py", "from splatflow.ops import routing", "tasks imports ops"),
        ("training/a.py", "from splatflow.cli import main", "training imports cli"),
        ("nn/a.py", "import transformers.cache_utils as cache", "nn imports transformers"),
        ("cli.py", "def late():\n    from transformers import AutoModel", "cli imports transformers"),
        ("__init__.py", "from .training import trainer", "__init__ imports training"),
        ("attic/a.py", "", "the room attic has no row in LAW"),
    ],
)
def test_a_planted_breach_is_found(tmp_path, file, line, breach):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line)
    [found] = breaches(tmp_path)
    assert file in found
    assert breach in found


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("ops/a.py", "import torch\nfrom . import b\nfrom .b import c\nfrom splatflow.ops.b import d"),
        ("ops/triton/a.py", "from ..routing import ROUTINGS"),
        ("nn/a.py", "from splatflow.ops import splat_attention\nfrom ..ops import dispatch"),
        ("models/a.py", "from transformers import PreTrainedModel"),
        ("training/a.py", "import transformers\nfrom splatflow import tasks, diagnostics"),
        ("cli.py", "from splatflow import __version__\nfrom .training import trainer"),
    ],
)
def test_what_the_law_allows_is_no_breach(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line)
    assert breaches(tmp_path) == []


@pytest.mark.parametrize(("file", "limit"), [("nn/a.py", MOST_LINES), ("ops/triton/a.py", MOST_LINES_OF_KERNELS)])
def test_a_planted_long_file_is_found(tmp_path, file, limit):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text("pass\n" * limit)
    assert too_long(tmp_path) == []
    path.write_text("pass\n" * (limit + 1))
    assert too_long(tmp_path) == [f"{file}: {limit + 1} lines, at most {limit}"]


def test_importing_splatflow_needs_torch_alone():
    optional = ("transformers", "datasets", "tokenizers", "matplotlib", "jaxtyping", "tyro", "rich", "triton")
    program = f"import sys, splatflow; print([name for name in {optional} if name in sys.modules])"
    finished = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(SOURCE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout.strip() == "[]"
