"""The sparse path by kernels: what the search and the scan make together is what the definition says.

Without a GPU they are interpreted, in small tiles of which a segment has few, so that short sequences meet all borders.
"""

# B batch, T token, H head, M splat, P position width, D value width

import importlib.util
import itertools
import math
import random
import subprocess
import sys
from functools import partial
from unittest.mock import patch

import pytest
import torch
from cases import (
    PER_TOKEN,
    attend,
    cast,
    is_clear,
    make_arguments,
    part_of,
    relative_error,
    results,
    unit_of,
)

from splatflow.ops import Lattice, kernels
from splatflow.ops import scan as scan_module

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from kernel_cases import (
    EVENTS_OF_SEGMENT,
    EVENTS_OF_TILE,
    TOLERANCE,
    few_events_and_poisoned,
    make,
    sparse_by_kernels,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets, of what is not selected
ROUTE = {"routing": "lattice", "backend": "sparse"}
LENGTHS = (1, EVENTS_OF_TILE - 1, EVENTS_OF_SEGMENT, EVENTS_OF_SEGMENT + 1, 2 * EVENTS_OF_SEGMENT + 1)
NUM_CASES = 20
make_lattice = partial(make, M=9, routing="lattice")


@pytest.fixture(autouse=True)
def _small_and_poisoned():
    with few_events_and_poisoned():
        yield


def case(number):
    """Keywords of `make_arguments` and options of the call: a fixed draw of all that there is with a lattice."""
    draw = random.Random(number)
    causal = number // len(LENGTHS) % 3 > 0
    batch, heads = draw.choice(((1, 1), (1, 1), (1, 2), (2, 1)))
    sizes = {
        "T": LENGTHS[number % len(LENGTHS)],
        "B": batch,
        "H": heads,
        "M": draw.choice((1, 4, 9)),
        "P": draw.choice((2, 4, 6)),
        "D": draw.choice((1, 3, 5)),
    }
    kinds = {
        "decay": draw.choice((None, "head")) if causal else None,
        "gate": draw.choice((None, "head", "splat")),
        **{name: draw.random() < 0.5 for name in ("state", "padding", "tied", "bias")},
        **{name: draw.random() < 0.25 for name in ("strided", "transform")},
    }
    if not causal and not kinds["tied"]:
        sizes["S"] = draw.choice(LENGTHS)
    top_p = draw.choice((1, 2, 3, 5, 8) if sizes["T"] < EVENTS_OF_TILE else (1, 2, 3))  # many events take long
    options = {"causal": causal, "top_p": min(sizes["M"], top_p)}
    kinds |= {"routing": "lattice", "dtype": torch.float32}
    seed = number
    while not is_clear(make_arguments(seed=seed, **sizes, **kinds), {**options, **ROUTE}):
        seed += 1000
    return {"seed": seed, **sizes, **kinds}, options


def named(number):
    sizes, options = case(number)
    left_out = ("seed", "routing", "dtype")
    kinds = [f"{name}={value}" for name, value in sizes.items() if name not in left_out and value not in (False, None)]
    return "-".join(["causal" if options["causal"] else "both", f"p={options['top_p']}", *kinds])


@pytest.mark.parametrize("number", range(NUM_CASES), ids=named)
def test_equals_the_reference(number):
    sizes, options = case(number)
    arguments = make_lattice(**sizes)
    expected = results(cast(arguments, torch.float64), **{**ROUTE, **options, "backend": "reference"})
    with (
        sparse_by_kernels(),
        patch.object(scan_module, "pieces_of", None),
        patch("splatflow.ops.routing.best_pairs", None),
    ):
        actual = results(arguments, **ROUTE, **options)
    for name, part in actual.items():
        assert relative_error(part, expected[name], unit_of(name, sizes, "lattice")) <= TOLERANCE, name


def test_the_cases_meet_everything():
    drawn = [case(number) for number in range(NUM_CASES)]
    assert {(sizes["T"], options["causal"]) for sizes, options in drawn} == {*itertools.product(LENGTHS, (True, False))}
    for name, values in {
        "decay": (None, "head"),
        "gate": (None, "head", "splat"),
        "M": (1, 4, 9),
        **dict.fromkeys(("state", "padding", "tied", "bias", "strided", "transform"), (True, False)),
    }.items():
        assert {sizes[name] for sizes, _ in drawn} == {*values}, name
    assert {options["top_p"] for _, options in drawn} == {1, 2, 3, 4, 5, 8}


@pytest.mark.parametrize("kinds", [{}, {"decay": "head", "gate": "head", "bias": True}], ids=str)
def test_the_future_changes_no_bit_of_the_past(kinds):
    arguments = make_lattice(T=EVENTS_OF_SEGMENT + 5, H=1, M=4, D=3, state=True, **kinds)

    def output_of(arguments):
        with sparse_by_kernels():
            return attend(arguments, top_p=2, **ROUTE)[0]

    expected, most, largest = output_of(arguments), EVENTS_OF_SEGMENT + 2, torch.finfo(torch.float32).max
    assert expected.isfinite().all()
    for worst, past in ((torch.nan, 1), (torch.nan, most), (torch.inf, most), (largest, most)):
        changed = {name: part.clone() for name, part in arguments.items()}
        bounded = {} if math.isnan(worst) else {"log_decay": -torch.inf, "write_gate": 0.5}
        for name in changed.keys() & set(PER_TOKEN):
            changed[name][:, past:] = bounded.get(name, worst)
        assert torch.equal(output_of(changed)[:, :past], expected[:, :past]), (worst, past)


@pytest.mark.parametrize("kinds", [{"gate": "head"}, {"decay": "head"}], ids=str)
def test_any_split_equals_one_pass(kinds):
    arguments = make_lattice(T=21, H=1, M=4, D=3, state=True, **kinds)
    options = {"top_p": 2, **ROUTE}
    expected, expected_state = attend(cast(arguments, torch.float64), **{**options, "backend": "reference"})
    outputs = []
    for start, stop in itertools.pairwise((0, 1, 2, 12, 21)):
        with sparse_by_kernels():
            output, state = attend(part_of(arguments, slice(start, stop)), **options)
        outputs.append(output)
        arguments |= {"mass": state.mass, "total": state.total}
    assert relative_error(torch.cat(outputs, 1), expected) <= TOLERANCE
    assert relative_error(state.mass, expected_state.mass) <= TOLERANCE
    assert relative_error(state.total, expected_state.total) <= TOLERANCE


def test_what_they_are_not_built_for_is_done_in_torch():
    def searched(top_p=8, **sizes):
        arguments = make_arguments(**{"T": 3, "M": 16, "H": 1, "routing": "lattice", "dtype": torch.float32, **sizes})
        lattice = Lattice(*(arguments[name] for name in ("centers", "log_scales", "log_amplitudes")))
        return kernels.search_for(arguments["send_positions"], lattice, top_p) is not None

    assert not searched()
    assert kernels.scan_for(torch.zeros(1, 2, 3)) is None
    with sparse_by_kernels():
        assert searched()
        assert searched(M=256 * 256, P=128)
        assert not searched(M=257 * 257)
        assert not searched(P=130)
        assert not searched(top_p=9)
        assert not searched(T=0)
        assert not searched(dtype=torch.float64)
        assert kernels.scan_for(torch.zeros(1, 2, 3)) is not None
        assert kernels.scan_for(torch.zeros(1, 2, 3, dtype=torch.float64)) is None


COMPILED = """
import torch
from splatflow import splat_attention
from splatflow.ops import Lattice, kernels

kernels.run_on = lambda device: True
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
positions, values, centers = (torch.randn(size, device=device) for size in ((1, 5, 1, 4), (1, 5, 1, 3), (1, 2, 2, 2)))
lattice = Lattice(centers, torch.zeros_like(centers[..., 0]), torch.zeros_like(centers[..., 0]))
values.requires_grad_()
options = {"routing": "lattice", "top_p": 2, "backend": "sparse"}


def function():
    fading = splat_attention(positions, positions, values, lattice, log_decay=-values[..., 0].abs(), **options)[0]
    return fading, splat_attention(positions, positions, values, lattice, **options)[0]


def outputs_and_gradient(function):
    outputs = function()
    return *outputs, *torch.autograd.grad(sum(output.square().sum() for output in outputs), values)


compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
for actual, expected in zip(outputs_and_gradient(compiled), outputs_and_gradient(function), strict=True):
    assert torch.equal(actual, expected)
"""


def test_compiled_in_one_graph_equals_eager():
    """In a process of its own: the checks of shapes that conftest installs cannot be traced."""
    outcome = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
