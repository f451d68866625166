"""The shapes in the annotations are true, and checked in every other test."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import splatflow.nn
import splatflow.ops
from splatflow.ops.decay import decayed_cumsum, pairwise_decay

MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (splatflow.ops, splatflow.nn)
    for module in pkgutil.iter_modules(package.__path__)
]


def test_a_wrong_shape_is_seen():
    with pytest.raises(TypeError, match="log_decay"):
        decayed_cumsum(torch.ones(3, 2), torch.zeros(4, 2))
    with pytest.raises(TypeError, match="log_decay"):
        pairwise_decay(torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module)
    assert results.failed == 0
    assert bool(results.attempted) == (">>>" in Path(module.__file__).read_text(encoding="utf-8"))
