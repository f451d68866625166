"""Every backend computes the same: output, final state and every gradient, in every type."""

from unittest.mock import patch

import pytest
import torch
from cases import (
    PORTABLE,
    attend,
    cases,
    cast,
    every_backend,
    every_route,
    fit,
    is_clear,
    make_arguments,
    relative_error,
    results,
    skip_unless,
    unit_of,
)
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import splatflow.ops.chunked as chunked_module
import splatflow.ops.scan as scan_module
import splatflow.ops.sparse as sparse_module

every_fast_backend = pytest.mark.parametrize("backend", [name for name in PORTABLE if name != "reference"])

SMALL_BLOCKS = 1  # blocks of a single chunk
LARGE_M = ({"B": 2, "T": 149, "M": 67, "H": 1, "state": True, "decay": "splat"}, {"causal": True, "routing": "mixture"})


@every_fast_backend
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@settings(max_examples=300)
@given(case=cases(), block_rows=st.sampled_from((SMALL_BLOCKS, chunked_module.BLOCK_ROWS)))
@example(case=LARGE_M, block_rows=SMALL_BLOCKS)
def test_agrees_with_the_reference(backend, dtype, tolerance, case, block_rows):
    sizes, options = fit(backend, *case)
    arguments = make_arguments(**sizes, dtype=dtype)
    assume(is_clear(arguments, options))
    expected = results(cast(arguments, torch.float64), **options, backend="reference")
    with (
        patch.object(chunked_module, "BLOCK_ROWS", block_rows),
        patch.object(sparse_module, "BLOCK_TOKENS", 53),
        patch.object(scan_module, "BLOCK_EVENTS", 101),
    ):
        actual = results(arguments, **options, backend=backend)
    for name, part in actual.items():
        assert relative_error(part, expected[name], unit_of(name, sizes, options["routing"])) <= tolerance, name


def plainly(arguments, causal):
    """The mixture's formula in ordinary torch, in the type of its arguments all the way."""
    splats = [arguments[name] for name in ("centers", "log_scales", "log_amplitudes")]

    def posterior(positions):
        centers, log_scales, log_amplitudes = splats
        distance = (positions[..., None, :] - centers).square().sum(-1)
        return (log_amplitudes - distance / (2 * (2 * log_scales).exp())).softmax(-1)

    send, receive = posterior(arguments["send_positions"]), posterior(arguments["receive_positions"])
    paths = torch.einsum("BTHM,BSHM->BHTSM", torch.ones_like(receive), send)
    if causal:
        paths = paths * torch.ones(paths.shape[2], paths.shape[2], dtype=paths.dtype).tril()[..., None]
    read = receive / torch.einsum("BHTSM->BTHM", paths)
    return torch.einsum("BHTS,BSHD->BTHD", torch.einsum("BTHM,BHTSM->BHTS", read, paths), arguments["values"])


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_half_precision_is_at_most_twice_as_far_off_as_plain_torch(backend, dtype, causal):
    skip_unless(backend, {"routing": "mixture"})
    arguments = make_arguments(T=131, dtype=dtype)
    expected, _ = attend(cast(arguments, torch.float32), causal=causal, backend=backend)
    actual, state = attend(arguments, causal=causal, backend=backend)
    assert actual.dtype == dtype
    assert state.mass.dtype == state.total.dtype == torch.float32
    assert relative_error(actual, expected) <= 2 * relative_error(plainly(arguments, causal), expected)


@every_backend
def test_gradients_come_in_the_type_of_their_argument(backend):
    sizes, options = fit(backend, {"decay": "splat", "gate": "head", "state": True}, {"routing": "mixture"})
    arguments = make_arguments(T=7, **sizes, dtype=torch.bfloat16)
    outcome = results(arguments, backend=backend, **options)
    assert {name: outcome[f"d {name}"].dtype for name in arguments} == {
        name: part.dtype for name, part in arguments.items()
    }


@every_backend
@every_route
@pytest.mark.parametrize(
    "kinds",
    [
        {"causal": False, "S": 3},
        {"causal": True, "gate": "splat"},
        {"causal": True, "decay": "head"},
        {"causal": True, "decay": "splat", "gate": "head"},
        {"causal": True, "decay": "head", "mixing": True},
        {"causal": False, "S": 3, "mixing": True, "transform": True},
        {"causal": True, "transform": True},
    ],
    ids=str,
)
def test_gradcheck(backend, route, kinds):
    skip_unless(backend, route, kinds.get("decay"), "mixing" in kinds)
    kinds = dict(kinds)
    causal = kinds.pop("causal")
    sizes = {"B": 1, "T": 5, "H": 1, "M": 4, "P": 2, "D": 2}  # several heads are compared with the reference above
    arguments = make_arguments(**sizes, routing=route["routing"], bias=True, state=True, **kinds)
    if "log_decay" in arguments:  # a difference quotient cannot step across 0 or from -inf
        arguments["log_decay"] = arguments["log_decay"].clamp(-1.0, -0.1)
    if "write_gate" in arguments:
        arguments["write_gate"] = arguments["write_gate"].clamp(0.1, 0.9)
    names = list(arguments)

    def function(*parts):
        output, state = attend(dict(zip(names, parts, strict=True)), causal=causal, backend=backend, **route)
        return output, *state

    with patch.object(chunked_module, "MIN_CHUNK", 2):  # so that chunks meet within five tokens
        assert torch.autograd.gradcheck(function, tuple(part.requires_grad_() for part in arguments.values()))
