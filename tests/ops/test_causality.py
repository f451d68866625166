"""What lies in the future, or in another sequence, changes not one bit."""

from unittest.mock import patch

import pytest
import torch
from cases import (
    OF_SPLATS,
    PER_SPLAT,
    PER_TOKEN,
    attend,
    cases,
    every_backend,
    fit,
    make_arguments,
    results,
    skip_unless,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import splatflow.ops.chunked as chunked_module
import splatflow.ops.sparse as sparse_module
from splatflow.ops.chunked import MIN_CHUNK

LARGEST = torch.finfo(torch.float32).max
LENGTHS = (2, 7, MIN_CHUNK, MIN_CHUNK + 1, 2 * MIN_CHUNK + 1)
ANYTHING = st.sampled_from((0.0, -1.0, 1e30, -1e30, LARGEST, -LARGEST))


def filled(name, part, number):
    """`part` with `number` in every place, as far as such an argument may hold it."""
    allowed = {"log_decay": (-torch.inf, 0.0), "write_gate": (0.0, 1.0), "padding_mask": (0, 1)}.get(name)
    return torch.full_like(part, number if allowed is None else min(max(number, allowed[0]), allowed[1]))


@every_backend
@settings(max_examples=200)
@given(
    case=cases(causal=True, lengths=LENGTHS),
    where=st.floats(0.01, 1.0),
    numbers=st.tuples(*[ANYTHING] * len(PER_TOKEN)),
    block_rows=st.sampled_from((1, chunked_module.BLOCK_ROWS)),
)
def test_the_future_changes_no_bit_of_the_past(backend, case, where, numbers, block_rows):
    sizes, options = fit(backend, *case)
    arguments = make_arguments(**sizes, dtype=torch.float32)
    past = int(where * (sizes["T"] - 1))
    changed = dict(arguments)
    for name, number in zip(PER_TOKEN, numbers, strict=True):
        if name in arguments:
            part = arguments[name]
            changed[name] = torch.cat([part[:, :past], filled(name, part[:, past:], number)], 1)
    block_tokens = 5 if block_rows == 1 else sparse_module.BLOCK_TOKENS
    with (
        patch.object(chunked_module, "BLOCK_ROWS", block_rows),
        patch.object(sparse_module, "BLOCK_TOKENS", block_tokens),
    ):
        before, _ = attend(arguments, **options, backend=backend)
        after, _ = attend(changed, **options, backend=backend)
    assert torch.equal(after[:, :past], before[:, :past])


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_gaussian_that_overflows_does_not_reach_the_past(value):
    options = {"routing": "gaussian", "top_p": 1, "backend": "sparse"}
    arguments = make_arguments(T=64, H=1, M=1, decay="head", bias=True, dtype=torch.float32)
    changed = {**arguments, "send_bias": arguments["send_bias"].index_fill(1, torch.tensor(63), 1e30)}
    changed["values"] = arguments["values"].index_fill(1, torch.tensor(63), value)
    before, after = (attend(given, **options)[0] for given in (arguments, changed))
    assert torch.equal(after[:, :63], before[:, :63])
    assert not torch.equal(after[:, 63:], before[:, 63:])


@every_backend
def test_the_past_does_change_the_future(backend):
    route = {"routing": "mixture", **({"top_p": 7} if backend == "sparse" else {})}
    skip_unless(backend, route)
    arguments = make_arguments(T=MIN_CHUNK + 1)
    values = arguments["values"].clone()
    values[:, 0] += 1.0
    before, _ = attend(arguments, backend=backend, **route)
    after, _ = attend({**arguments, "values": values}, backend=backend, **route)
    assert (after != before).any(-1).all()


@every_backend
@settings(max_examples=30)
@given(case=cases(lengths=LENGTHS))
def test_nan_in_one_sequence_reaches_no_other(backend, case):
    sizes, options = fit(backend, *case)
    arguments = make_arguments(**{**sizes, "B": 3}, dtype=torch.float32)
    sick = {name: part.clone() for name, part in arguments.items()}
    for name in (*PER_TOKEN, "mass", "total"):
        if name in sick and name != "padding_mask":
            sick[name][1] = torch.nan
    expected = results(arguments, **options, backend=backend)
    actual = results(sick, **options, backend=backend)
    of_splats = {f"d {name}" for name in OF_SPLATS + PER_SPLAT}  # shared by all sequences
    others = torch.tensor([0, 2])
    for name in expected.keys() - of_splats:
        assert torch.equal(actual[name][others], expected[name][others]), name
    assert sizes["padding"] or actual["mass"][1].isnan().any()  # where all is padding there is no NaN to spread


@every_backend
@pytest.mark.parametrize("grain", ["head", "splat"])
def test_a_decay_of_minus_infinity_forgets_all_that_came_before(backend, grain):
    skip_unless(backend, {"routing": "mixture"}, decay=grain)
    arguments = make_arguments(T=MIN_CHUNK + 7, decay=grain, state=True, dtype=torch.float32)
    reset = MIN_CHUNK - 3
    arguments["log_decay"][:, reset] = -torch.inf
    output, _ = attend(arguments, backend=backend)
    later = {name: part[:, reset:] if name in PER_TOKEN else part for name, part in arguments.items()}
    alone = {**later, "mass": torch.zeros_like(later["mass"]), "total": torch.zeros_like(later["total"])}
    torch.testing.assert_close(output[:, reset:], attend(alone, backend=backend)[0])
