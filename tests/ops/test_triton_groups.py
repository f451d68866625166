"""The fused kernels where several heads receive from one that sends: as if what is sent were repeated for each."""

# B batch, T target token, S source token, H sending head, R receiving heads of each, M splat, P position width,
# D value width

import importlib.util
import itertools
import random
from unittest.mock import patch

import pytest
import torch
from cases import GRAINS, OF_SPLATS, attend, cast, relative_error, results, unit_of

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from kernel_cases import (
    SEGMENT,
    TILE,
    TOLERANCE,
    WIDTHS,
    boundaries_of,
    make,
    make_packed,
    packed_at,
    small_and_poisoned,
)

from splatflow.ops import Splats
from splatflow.ops.triton import operators
from splatflow.ops.triton.fused import for_kernels

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets, that exp(-1e9) is 0
LENGTHS = (1, TILE - 1, TILE + 1, SEGMENT + 1)
# of packed documents; the longest is cut into two segments
DOCUMENTS = ((7, 0, TILE + 1), (2 * SEGMENT, 0, 1), (TILE, TILE - 1))
NUM_CASES = 24


@pytest.fixture(autouse=True)
def _small_and_poisoned():
    with small_and_poisoned():
        yield


def case(number):
    """Boundaries or None, keywords of `make_arguments` and options of the call: a fixed draw."""
    draw = random.Random(number)
    causal = number % 3 > 0
    boundaries = None
    sizes = {"seed": number, "H": draw.choice((1, 2)), **dict(zip("MPD", draw.choice(WIDTHS), strict=True))}
    if number % 4 == 3:
        boundaries = boundaries_of(*DOCUMENTS[number // 4 % len(DOCUMENTS)])
        sizes["T"] = boundaries[-1]
    else:
        sizes["T"] = LENGTHS[number // 3 % len(LENGTHS)]
        sizes["B"] = draw.choice((1, 2))
        if not causal:
            sizes["S"] = draw.choice(LENGTHS)
    kinds = {
        "decay": draw.choice(GRAINS) if causal else None,
        "gate": draw.choice(GRAINS),
        "state": draw.random() < 0.5,
        "strided": draw.random() < 0.2,
        "receivers": draw.choice((2, 3, 4)),
    }
    return boundaries, {**sizes, **kinds}, {"causal": causal}


def named(number):
    boundaries, sizes, options = case(number)
    kinds = [f"{name}={value}" for name, value in sizes.items() if name != "seed" and value not in (False, None)]
    return "-".join(["causal" if options["causal"] else "both", *map(str, boundaries or ["alone"]), *kinds])


@pytest.mark.parametrize("number", range(NUM_CASES), ids=named)
def test_equals_the_reference(number):
    boundaries, sizes, options = case(number)
    if boundaries is None:
        arguments, options = make(**sizes), {**options, "backend": "triton"}
    else:
        arguments, options = make_packed(boundaries, **sizes), {**options, **packed_at(boundaries)}
    expected = results(cast(arguments, torch.float64), **{**options, "backend": "reference"})
    actual = results(arguments, **options)
    for name, part in actual.items():
        unit = unit_of(name, {"B": 1, **sizes}, "mixture")
        assert relative_error(part, expected[name], unit) <= TOLERANCE, name


def test_the_cases_meet_everything():
    drawn = [case(number) for number in range(NUM_CASES)]
    kinds = ("decay", "gate", "state", "H", "receivers")
    met = {(name, sizes[name]) for _, sizes, _ in drawn for name in kinds}
    assert met >= {
        *itertools.product(("decay", "gate"), GRAINS),
        *itertools.product(("state",), (True, False)),
        *itertools.product(("H",), (1, 2)),
        *itertools.product(("receivers",), (2, 3, 4)),
    }
    ways = {(boundaries is not None, options["causal"]) for boundaries, _, options in drawn}
    assert ways == {*itertools.product((True, False), repeat=2)}
    lengths = {sizes["T"] for boundaries, sizes, options in drawn if options["causal"] and boundaries is None}
    assert lengths == {*LENGTHS}
    packed = {sizes["T"] for boundaries, sizes, _ in drawn if boundaries is not None}
    assert packed == {sum(lengths) for lengths in DOCUMENTS}


@pytest.mark.parametrize("kinds", [{}, {"decay": "head", "gate": "splat"}, {"decay": "splat"}], ids=str)
def test_single_tokens_are_steps(kinds):
    arguments = make(T=1, B=2, receivers=3, state=True, **kinds)
    expected, expected_state = attend(cast(arguments, torch.float64), backend="reference")
    with patch.object(operators, "mix", None):
        output, state = attend(arguments, backend="triton")  # no gradient is wanted
    assert relative_error(output, expected) <= TOLERANCE
    assert relative_error(state.mass, expected_state.mass) <= TOLERANCE
    assert relative_error(state.total, expected_state.total) <= TOLERANCE


@pytest.mark.parametrize("causal", [True, False])
def test_heads_that_receive_do_not_hear_each_other(causal):
    arguments = make(T=TILE + 1, receivers=3, decay="head" if causal else None)
    changed = {**arguments, "receive_positions": arguments["receive_positions"].clone()}
    changed["receive_positions"][:, :, 1] = torch.nan
    (before, state), (after, changed_state) = (
        attend(given, causal=causal, backend="triton") for given in (arguments, changed)
    )
    others = [0, 2, 3, 4, 5]
    assert torch.equal(before[:, :, others], after[:, :, others])
    assert after[:, :, 1].isnan().all()
    assert torch.equal(state.total, changed_state.total)


@pytest.mark.parametrize("causal", [True, False])
def test_nothing_to_do(causal):
    arguments = make(T=0, receivers=2, state=True)
    output, state = attend(arguments, causal=causal, backend="triton")
    assert output.shape == (1, 0, 4, 5)
    assert torch.equal(state.mass, arguments["mass"])


@pytest.mark.parametrize("name", ["mix", "collect", "hand_out"])
def test_operators_of_torch(name):
    arguments = make(T=TILE + 1, H=1, receivers=2, state=True)
    arguments = {name: part.requires_grad_() for name, part in arguments.items()}
    splats = for_kernels(Splats(*(arguments[of] for of in OF_SPLATS[:3])))
    splats = [part.detach().requires_grad_() for part in splats]
    places, targets, values = (arguments[of] for of in ("send_positions", "receive_positions", "values"))
    received = targets.new_zeros(*targets.shape[:3], 5).requires_grad_()
    given = {
        "mix": (places, targets, values, splats, None, None, arguments["mass"], arguments["total"], None),
        "collect": (targets, received, splats, None, None),
        "hand_out": (targets, arguments["total"], splats, torch.float32, None),
    }
    torch.library.opcheck(getattr(operators, name), given[name])
