"""The fused kernels on documents packed end to end, which they read where they lie: each is what it is by itself."""

# B batch, T token, H head, M splat, P position width, D value width

import importlib.util
import itertools
import random
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from cases import GRAINS, PER_TOKEN, attend, cast, part_of, relative_error, results, unit_of

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from kernel_cases import (
    OF_STATES,
    SEGMENT,
    TILE,
    TOLERANCE,
    WIDTHS,
    boundaries_of,
    make_packed,
    packed_at,
    small_and_poisoned,
)

from splatflow.ops import dispatch
from splatflow.ops.triton import cutting

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets, that exp(-1e9) is 0
# two segments are cut into two: shorter ones are one
LENGTHS = (0, 1, 2, 7, 13, TILE - 1, TILE, TILE + 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT, 2 * SEGMENT + 3)
NUM_CASES = 24


@pytest.fixture(autouse=True)
def _small_and_poisoned():
    with small_and_poisoned():
        yield


def case(number):
    """Boundaries, keywords of `make_arguments` and options of the call: a fixed draw."""
    draw = random.Random(number)
    causal = number < len(LENGTHS) or number % 2 > 0
    lengths = [LENGTHS[number % len(LENGTHS)], *draw.choices(LENGTHS, k=draw.choice((1, 2)))]
    draw.shuffle(lengths)
    kinds = {
        "decay": draw.choice(GRAINS) if causal else None,
        "gate": draw.choice(GRAINS),
        "H": draw.choice((1, 1, 2)),
        **{name: draw.random() < 0.5 for name in ("state", "tied")},
        "strided": draw.random() < 0.2,
    }
    widths = dict(zip("MPD", draw.choice(WIDTHS), strict=True))
    return boundaries_of(*lengths), {"seed": number, **widths, **kinds}, {"causal": causal}


def named(number):
    boundaries, sizes, options = case(number)
    kinds = [f"{name}={value}" for name, value in sizes.items() if name != "seed" and value not in (False, None)]
    return "-".join(["causal" if options["causal"] else "both", *map(str, boundaries), *kinds])


@pytest.mark.parametrize("number", range(NUM_CASES), ids=named)
def test_equals_the_reference(number):
    boundaries, sizes, options = case(number)
    arguments = make_packed(boundaries, **sizes)
    packed = packed_at(boundaries)
    expected = results(cast(arguments, torch.float64), **options, **packed | {"backend": "reference"})
    actual = results(arguments, **options, **packed)
    for name, part in actual.items():
        unit = unit_of(name, {"B": 1, "T": boundaries[-1]}, "mixture")
        assert relative_error(part, expected[name], unit) <= TOLERANCE, name


def test_the_cases_meet_everything():
    drawn = [case(number) for number in range(NUM_CASES)]
    kinds = ("decay", "gate", "tied", "state")
    met = {(name, value) for _, sizes, _ in drawn for name, value in sizes.items() if name in kinds}
    assert met >= {*itertools.product(("decay", "gate"), GRAINS), *itertools.product(("tied", "state"), (True, False))}
    lengths = {
        (stop - start, options["causal"])
        for boundaries, _, options in drawn
        for start, stop in itertools.pairwise(boundaries)
    }
    assert lengths >= {(length, True) for length in LENGTHS}
    assert lengths >= {(length, False) for length in (0, TILE, SEGMENT, 2 * SEGMENT)}
    pieces = [cutting.cut_documents(boundaries, sizes["H"], (1, 1, 1)) for boundaries, sizes, _ in drawn]
    assert {whole.alone for whole in pieces} == {True, False}


KINDS = [
    (True, {"H": 1, "decay": "head", "gate": "splat"}),
    (True, {"H": 1, "decay": "splat", "tied": True}),
    (False, {"gate": "head"}),
]


@pytest.mark.parametrize(("causal", "kinds"), KINDS, ids=str)
@pytest.mark.parametrize("sick", [0, 2])
def test_the_numbers_of_a_document_change_no_bit_of_the_others(causal, kinds, sick):
    """Nor does NaN reach them: of output, state, and gradients by what is a token's or a document's own."""
    longest = 2 * SEGMENT if sick == 0 else TILE - 1  # cut into segments, or one as all
    boundaries = boundaries_of(7, 0, TILE + 1, longest)
    arguments = make_packed(boundaries, state=True, **kinds)
    here = slice(*boundaries[sick : sick + 2])
    changed = {name: part.clone() for name, part in arguments.items()}
    for name, part in changed.items():
        if name in PER_TOKEN:
            part[:, here] = torch.nan
        elif name in OF_STATES:
            part[sick] = torch.nan
    expected, actual = (results(given, causal=causal, **packed_at(boundaries)) for given in (arguments, changed))
    assert actual["output"][:, here].isnan().all()
    tokens = torch.ones(boundaries[-1], dtype=torch.bool)
    tokens[here] = False
    documents = [number for number in range(len(boundaries) - 1) if number != sick]
    for name, part in actual.items():
        of = name.removeprefix("d ")
        if of in OF_STATES:
            assert torch.equal(part[documents], expected[name][documents]), name
        elif of == "output" or of in PER_TOKEN:
            assert torch.equal(part[:, tokens], expected[name][:, tokens]), name


@pytest.mark.parametrize(("causal", "kinds"), KINDS, ids=str)
def test_equals_one_call_for_each_document(causal, kinds):
    boundaries = boundaries_of(1, 0, 2 * SEGMENT, TILE - 1, 0)
    arguments = make_packed(boundaries, state=True, **kinds)
    output, state = attend(arguments, causal=causal, **packed_at(boundaries))
    for number, (start, stop) in enumerate(itertools.pairwise(boundaries)):
        document = part_of(arguments, slice(start, stop))
        document |= {name: arguments[name][number : number + 1] for name in OF_STATES}
        alone, after = attend(document, causal=causal, backend="triton")
        assert relative_error(output[:, start:stop], alone) <= TOLERANCE
        assert relative_error(state.total[number], after.total[0]) <= TOLERANCE
        assert relative_error(state.mass[number], after.mass[0]) <= TOLERANCE


@pytest.mark.parametrize(("causal", "kinds"), KINDS, ids=str)
def test_two_calls_give_the_same_bits(causal, kinds):
    boundaries = boundaries_of(TILE + 1, 0, 2 * SEGMENT)
    arguments = make_packed(boundaries, state=True, **kinds)
    first, second = (results(arguments, causal=causal, **packed_at(boundaries)) for _ in range(2))
    for name, part in first.items():
        assert torch.equal(part, second[name]), name


@pytest.mark.parametrize("causal", [True, False])
def test_nothing_but_empty_documents(causal):
    arguments = make_packed([0, 0, 0], state=True)
    output, state = attend(arguments, causal=causal, **packed_at([0, 0, 0]))
    assert output.shape == (1, 0, 2, 5)
    for before, after in zip((arguments["mass"], arguments["total"]), state, strict=True):
        assert torch.equal(before, after)


def test_documents_are_not_cut_out_for_it():
    boundaries = boundaries_of(3, 5)
    with patch.object(dispatch, "over_documents", side_effect=AssertionError):
        attend(make_packed(boundaries), **packed_at(boundaries))
        with pytest.raises(AssertionError):
            attend(make_packed(boundaries), **packed_at(boundaries) | {"backend": "chunked"})


COMPILED = """
import torch
from splatflow import Splats, splat_attention

torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
splats = Splats(torch.randn(2, 11, 3), torch.zeros(2, 11), torch.zeros(2, 11))


def function(positions, values, boundaries):
    return splat_attention(positions, positions, 2 * values, splats, cu_seqlens=boundaries, backend="triton")[0] + 1


compiled = torch.compile(function, backend="aot_eager")
for boundaries in ([0, 3, 20], [0, 5, 20], [0, 1, 2, 20]):
    given = torch.randn(1, 20, 2, 3), torch.randn(1, 20, 2, 5, requires_grad=True), torch.tensor(boundaries)
    outputs = compiled(*given), function(*given)
    gradients = [torch.autograd.grad(output.square().sum(), given[1])[0] for output in outputs]
    assert torch.equal(*outputs) and torch.equal(*gradients)
"""


def test_compiled_with_other_boundaries_each_time_equals_eager():
    """In a process of its own: the checks of shapes that conftest installs cannot be traced."""
    outcome = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
