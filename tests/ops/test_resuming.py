"""A sequence may be cut anywhere: into pieces, into documents, around its padding."""

import itertools

import pytest
import torch
from cases import (
    PER_TOKEN,
    PORTABLE,
    attend,
    cases,
    every_backend,
    every_route,
    fit,
    is_clear,
    make_arguments,
    part_of,
    relative_error,
    results,
    skip_unless,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from splatflow.ops.chunked import MIN_CHUNK

LENGTHS = (2, 7, 31, MIN_CHUNK + 1, 2 * MIN_CHUNK + 1)
TOLERANCE = 1e-10


def in_pieces(arguments, cuts, backends, **options):
    """Output and state of the pieces between the cuts, each computed by the next of the backends."""
    outputs = []
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        piece = part_of(arguments, slice(start, stop))
        output, state = attend(piece, **options, backend=backends[number % len(backends)])
        outputs.append(output)
        arguments = {**arguments, "mass": state.mass, "total": state.total}
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize(
    "backends",
    # no routing is for both of those that are for a few routings
    [*([name] for name in PORTABLE), *([name for name in PORTABLE if name != other] for other in ("reach", "sparse"))],
    ids="+".join,
)
@settings(max_examples=60)
@given(case=cases(causal=True, lengths=LENGTHS), cuts=st.lists(st.floats(0.0, 1.0), max_size=5))
def test_any_split_equals_one_pass(backends, case, cuts):
    sizes, options = case
    for backend in backends:
        sizes, options = fit(backend, sizes, options)
    arguments = make_arguments(**sizes)
    assume(is_clear(arguments, options))  # backends alternate
    cuts = [0, *sorted(round(cut * sizes["T"]) for cut in cuts), sizes["T"]]
    expected, expected_state = attend(arguments, **options, backend="reference")
    output, state = in_pieces(arguments, cuts, backends, **options)
    assert relative_error(output, expected) <= TOLERANCE
    assert relative_error(state.mass, expected_state.mass) <= TOLERANCE
    assert relative_error(state.total, expected_state.total) <= TOLERANCE


@every_backend
def test_gradients_flow_through_the_carried_state(backend):
    sizes, options = fit(backend, {"decay": "splat"}, {"routing": "mixture"})
    arguments = make_arguments(T=MIN_CHUNK + 7, state=True, **sizes)
    cotangent = torch.randn(arguments["values"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def gradients(cuts):
        leaves = {name: part.detach().requires_grad_() for name, part in arguments.items()}
        output, _ = in_pieces(leaves, cuts, [backend], **options)
        return torch.autograd.grad(output, leaves.values(), cotangent)

    length = MIN_CHUNK + 7
    for in_three, at_once in zip(gradients([0, 3, 41, length]), gradients([0, length]), strict=True):
        assert relative_error(in_three, at_once) <= TOLERANCE


def pack(arguments, boundaries):
    """The options for documents between these boundaries, and each document by itself with its state."""
    per_document = [
        {name: part[number : number + 1] if name in ("mass", "total") else part for name, part in arguments.items()}
        for number in range(len(boundaries) - 1)
    ]
    pieces = zip(per_document, boundaries, boundaries[1:], strict=False)
    return [part_of(document, slice(start, stop)) for document, start, stop in pieces]


# lengths 1, 0, 63, 64, 0, 5, 65 and 3: none, one, about a chunk
BOUNDARIES = [0, 1, 1, 64, 128, 128, 133, 198, 201]
KINDS = [{}, {"state": True}, {"decay": "head", "gate": "splat"}, {"state": True, "decay": "splat", "gate": "head"}]
every_kind = pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "+".join(kinds) or "plain")


def make_packed(boundaries, *, dtype=torch.float64, **kinds):
    """Arguments for a batch of one, with a state for every document."""
    arguments = make_arguments(B=1, T=boundaries[-1], dtype=dtype, **kinds)
    if "mass" in arguments:
        routing = kinds.get("routing", "mixture")
        documents = make_arguments(B=len(boundaries) - 1, T=1, state=True, routing=routing, dtype=dtype)
        arguments |= {"mass": documents["mass"], "total": documents["total"]}
    return arguments


@every_backend
@every_route
@every_kind
@pytest.mark.parametrize("boundaries", [BOUNDARIES, [0, 0], [0, 0, 0, 7], [0, 31]], ids=str)
def test_packed_documents_equal_each_by_itself(backend, route, kinds, boundaries):
    skip_unless(backend, route, kinds.get("decay"))
    arguments = make_packed(boundaries, **kinds, routing=route["routing"], bias=True)
    options = {**route, "backend": backend}
    output, state = attend(arguments, **options, cu_seqlens=torch.tensor(boundaries, dtype=torch.int32))
    alone = [attend(document, **options) for document in pack(arguments, boundaries)]
    assert relative_error(output, torch.cat([output for output, _ in alone], 1)) <= TOLERANCE
    assert relative_error(state.mass, torch.cat([state.mass for _, state in alone])) <= TOLERANCE
    assert relative_error(state.total, torch.cat([state.total for _, state in alone])) <= TOLERANCE


@every_backend
@every_kind
def test_packed_gradients_equal_those_of_each_document(backend, kinds):
    kinds, options = fit(backend, kinds, {"routing": "mixture"})
    arguments = make_packed(BOUNDARIES, **{**kinds, "bias": True})
    generator = torch.Generator().manual_seed(5)
    cotangent = torch.randn(arguments["values"].shape, dtype=torch.float64, generator=generator)

    def gradients(function):
        leaves = {name: part.detach().requires_grad_() for name, part in arguments.items()}
        return torch.autograd.grad(function(leaves), leaves.values(), cotangent)

    options["backend"] = backend
    packed = gradients(lambda leaves: attend(leaves, **options, cu_seqlens=torch.tensor(BOUNDARIES))[0])
    alone = gradients(
        lambda leaves: torch.cat([attend(document, **options)[0] for document in pack(leaves, BOUNDARIES)], 1)
    )
    for name, actual, expected in zip(arguments, packed, alone, strict=True):
        assert relative_error(actual, expected) <= TOLERANCE, name


@every_backend
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sick_document", [0, 2, 5])
def test_nan_in_one_document_reaches_no_other(backend, causal, sick_document):
    kinds, options = fit(backend, {"decay": "head" if causal else None}, {"routing": "mixture"})
    arguments = make_packed(BOUNDARIES, state=True, gate="splat", dtype=torch.float32, **kinds)
    options = {**options, "causal": causal, "backend": backend, "cu_seqlens": torch.tensor(BOUNDARIES)}
    sick_tokens = slice(BOUNDARIES[sick_document], BOUNDARIES[sick_document + 1])
    sick = {name: part.clone() for name, part in arguments.items()}
    for name in sick.keys() & set(PER_TOKEN):
        sick[name][:, sick_tokens] = torch.nan
    expected, actual = (results(given, **options) for given in (arguments, sick))

    well_tokens = torch.ones(BOUNDARIES[-1], dtype=torch.bool)
    well_tokens[sick_tokens] = False
    well_documents = [number for number in range(len(BOUNDARIES) - 1) if number != sick_document]
    for name in expected:
        if name in ("mass", "total", "d mass", "d total"):
            assert torch.equal(actual[name][well_documents], expected[name][well_documents]), name
        elif name == "output" or name.removeprefix("d ") in PER_TOKEN:
            assert torch.equal(actual[name][:, well_tokens], expected[name][:, well_tokens]), name


@every_backend
@every_route
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("state", [True, False])
def test_padding_equals_leaving_the_padded_tokens_out(backend, route, causal, state):
    decay = ("head" if backend == "sparse" else "splat") if causal else None
    skip_unless(backend, route)
    kinds = {"routing": route["routing"], "state": state, "decay": decay, "gate": "head", "bias": True}
    arguments = make_arguments(B=1, T=101, padding=True, **kinds)
    real = arguments.pop("padding_mask")
    without = {name: part[:, real[0]] if name in PER_TOKEN else part for name, part in arguments.items()}
    for name in arguments.keys() & set(PER_TOKEN) - {"receive_positions", "receive_bias"}:
        arguments[name][~real] = torch.nan
    options = {"causal": causal, "backend": backend, **route}
    padded = results({**arguments, "padding_mask": real}, **options)
    output, after = attend(without, **options)
    assert relative_error(padded["output"][:, real[0]], output) <= TOLERANCE
    assert relative_error(padded["mass"], after.mass) <= TOLERANCE
    assert relative_error(padded["total"], after.total) <= TOLERANCE
    for name, part in padded.items():
        assert part.isfinite().all(), name


@every_backend
@every_route
@pytest.mark.parametrize("causal", [True, False])
def test_no_sequences_at_all_are_no_error(backend, route, causal):
    skip_unless(backend, route)
    arguments = make_arguments(B=0, T=5, M=9, routing=route["routing"], state=True)
    output, state = attend(arguments, causal=causal, backend=backend, **route)
    assert list(output.shape) == [0, 5, 3, 5]
    assert list(state.total.shape) == [0, 3, 9, 5]
