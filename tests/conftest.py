"""What holds in every test: one thread, repeatable examples in CI, and shapes checked against the annotations."""

import os
import typing
from pathlib import Path
from unittest.mock import patch

import beartype  # noqa: F401  # before TYPE_CHECKING is set below, which is meant for our package alone
import jaxtyping
import torch
from hypothesis import settings

torch.set_num_threads(1)  # pytest-xdist already fills the cores

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.load_profile("ci" if "CI" in os.environ else "local")

# These two meet wrong calls with errors of their own, which are tested; all behind them is checked by its annotations.
BORDER = {"dispatch", "validate"}
OPERATORS = Path(__file__).parents[1] / "src" / "splatflow" / "ops"
CHECKED = [f"splatflow.ops.{path.stem}" for path in OPERATORS.glob("[a-z]*.py") if path.stem not in BORDER]

# the package imports the names in its annotations for type checkers only
with patch.object(typing, "TYPE_CHECKING", True), jaxtyping.install_import_hook(CHECKED, "beartype.beartype"):
    import splatflow.ops  # noqa: F401

# a compiler cannot trace the checks; the flag that turns them off is read at every call
type(jaxtyping.config).jaxtyping_disable = property(lambda _: torch.compiler.is_compiling())
