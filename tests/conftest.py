"""What holds in every test: one thread, repeatable examples in CI, and shapes checked against the annotations.

Without a GPU, kernels are interpreted on the CPU.
"""

import os
import sys
import typing
from collections.abc import Callable, Hashable
from functools import cache, wraps
from inspect import isfunction
from typing import Any
from unittest.mock import patch

import torch
from beartype import beartype
from hypothesis import settings
from jaxtyping import jaxtyped

torch.set_num_threads(1)  # pytest-xdist already fills the cores
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which may be long before a test of kernels

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.load_profile("ci" if "CI" in os.environ else "local")


def look_of(given: Any) -> Hashable:
    """What annotations tell apart: shape and type of tensors, also in tuples and dicts; numbers, words; else types."""
    if isinstance(given, torch.Tensor):
        return str(given.shape), given.dtype  # symbolic sizes have no hash
    if isinstance(given, tuple | list):
        return type(given), *map(look_of, given)
    if isinstance(given, dict):
        return *given, *map(look_of, given.values())
    return given if isinstance(given, bool | int | str | None) else type(given)


@cache
def checked(function: Callable) -> Callable:
    """`function`, checked for the shapes in its annotations when no compiler traces it, once for all calls alike."""
    strict = jaxtyped(function, typechecker=beartype)
    seen = set()

    @wraps(function)
    def checked_function(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*arguments, **options)
        look = look_of((arguments, options))
        if look in seen:
            return function(*arguments, **options)
        found = strict(*arguments, **options)
        seen.add(look)
        return found

    return checked_function


# These meet wrong calls with errors of their own, which are tested; all behind them is checked.
BORDER = {"splatflow.ops.dispatch", "splatflow.ops.hybrid", "splatflow.ops.validate"}

with patch.object(typing, "TYPE_CHECKING", True):  # else the names in the annotations are not imported
    import splatflow.ops

for module in [module for name, module in sys.modules.items() if name.startswith("splatflow.")]:
    for name, value in list(vars(module).items()):
        if isfunction(value) and value.__module__.startswith("splatflow.ops.") and value.__module__ not in BORDER:
            setattr(module, name, checked(value))
for name, backend in splatflow.ops.BACKENDS.items():
    splatflow.ops.BACKENDS[name] = backend._replace(function=checked(backend.function))
