"""The fused kernels where several heads receive from one that sends: as if what is sent were repeated for each."""

# B batch, T target token, S source token, G sending head, R receiving heads of each, M splat, P position width,
# D value width

import importlib.util
import itertools
import random

import pytest
import torch
from cases import GRAINS, OF_SPLATS, attend, cast, relative_error, results, unit_of

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from kernels import SEGMENT, TILE, TOLERANCE, WIDTHS, make, small_and_poisoned

from splatflow.ops import ROUTINGS, Splats, SplatState
from splatflow.ops.routing import Router
from splatflow.ops.splats import Sources, Targets, per_splat
from splatflow.ops.triton import operators
from splatflow.ops.triton.fused import for_kernels, fused

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets, that exp(-1e9) is 0
LENGTHS = (1, TILE - 1, TILE + 1, SEGMENT + 1)
# of packed documents; the longest is cut into two segments
DOCUMENTS = ((7, 0, TILE + 1), (2 * SEGMENT, 0, 1), (TILE, TILE - 1))
NUM_CASES = 24
HEAD_AXIS = {
    **dict.fromkeys(("send_positions", "values", "log_decay", "write_gate"), 2),
    **dict.fromkeys(OF_SPLATS, 0),
    **dict.fromkeys(("mass", "total"), 1),
}


@pytest.fixture(autouse=True)
def _small_and_poisoned():
    with small_and_poisoned():
        yield


def make_grouped(group, boundaries=None, **sizes):
    arguments = make(**sizes)
    receiving = make(**{**sizes, "H": sizes["H"] * group, "seed": sizes.get("seed", 0) + 1})
    arguments["receive_positions"] = receiving["receive_positions"]
    if boundaries is not None and "mass" in arguments:
        states = make(**{**sizes, "T": 1, "B": len(boundaries) - 1})
        arguments |= {name: states[name] for name in ("mass", "total")}
    return arguments


def by_kernels(arguments, causal, boundaries=None):
    values, splats = arguments["values"], Splats(*(arguments[name] for name in OF_SPLATS if name in arguments))
    factors = (per_splat(arguments.get(name), torch.float32) for name in ("log_decay", "write_gate"))
    sources = Sources(arguments["send_positions"], values, None, *factors)
    if "mass" in arguments:
        state = SplatState(arguments["mass"], arguments["total"])
    else:
        state = SplatState.empty(values, len(boundaries) - 1 if boundaries else len(values), splats.num_splats)
    targets = Targets(arguments["receive_positions"], None)
    router = Router(ROUTINGS["mixture"], splats, None)
    return fused(sources, targets, router, state, causal=causal, boundaries=boundaries)


def repeated(arguments, causal, boundaries=None):
    """The definition, of heads that send once for each that receives; of the states one of each group."""
    group = arguments["receive_positions"].shape[2] // arguments["values"].shape[2]
    arguments = {
        name: part.repeat_interleave(group, HEAD_AXIS[name]) if name in HEAD_AXIS else part
        for name, part in arguments.items()
    }
    packed = {} if boundaries is None else {"cu_seqlens": torch.tensor(boundaries)}
    output, state = attend(arguments, causal=causal, backend="reference", **packed)
    return output, SplatState(*(part[:, ::group] for part in state))


def case(number):
    """R, boundaries or None, keywords of `make_arguments`, and whether it is causal: a fixed draw."""
    draw = random.Random(number)
    causal = number % 3 > 0
    boundaries = None
    sizes = {"seed": number, "H": draw.choice((1, 2)), **dict(zip("MPD", draw.choice(WIDTHS), strict=True))}
    if number % 4 == 3:
        boundaries = [0, *itertools.accumulate(DOCUMENTS[number // 4 % len(DOCUMENTS)])]
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
    }
    return draw.choice((2, 3, 4)), boundaries, {**sizes, **kinds}, causal


def named(number):
    group, boundaries, sizes, causal = case(number)
    kinds = [f"{name}={value}" for name, value in sizes.items() if name != "seed" and value not in (False, None)]
    return "-".join(["causal" if causal else "both", f"R={group}", *map(str, boundaries or ["alone"]), *kinds])


@pytest.mark.parametrize("number", range(NUM_CASES), ids=named)
def test_equals_what_is_sent_repeated(number):
    group, boundaries, sizes, causal = case(number)
    arguments = make_grouped(group, boundaries, **sizes)
    options = {"causal": causal, "boundaries": boundaries}
    expected = results(cast(arguments, torch.float64), call=repeated, **options)
    actual = results(arguments, call=by_kernels, **options)
    for name, part in actual.items():
        unit = unit_of(name, {"B": 1, **sizes}, "mixture")
        assert relative_error(part, expected[name], unit) <= TOLERANCE, name


def test_the_cases_meet_everything():
    drawn = [case(number) for number in range(NUM_CASES)]
    met = {(name, sizes[name]) for *_, sizes, _ in drawn for name in ("decay", "gate", "state", "H")}
    assert met >= {
        *itertools.product(("decay", "gate"), GRAINS),
        *itertools.product(("state",), (True, False)),
        *itertools.product(("H",), (1, 2)),
    }
    assert {group for group, *_ in drawn} == {2, 3, 4}
    ways = {(boundaries is not None, causal) for _, boundaries, _, causal in drawn}
    assert ways == {*itertools.product((True, False), repeat=2)}
    lengths = {sizes["T"] for _, boundaries, sizes, causal in drawn if causal and boundaries is None}
    assert lengths == {*LENGTHS}
    packed = {sizes["T"] for _, boundaries, sizes, _ in drawn if boundaries is not None}
    assert packed == {sum(lengths) for lengths in DOCUMENTS}


@pytest.mark.parametrize("kinds", [{}, {"decay": "head", "gate": "splat"}, {"decay": "splat"}], ids=str)
def test_single_tokens_are_steps(kinds):
    arguments = make_grouped(3, T=1, B=2, H=2, state=True, **kinds)
    expected = repeated(cast(arguments, torch.float64), causal=True)
    output, state = by_kernels(arguments, causal=True)  # no gradient is wanted
    assert relative_error(output, expected[0]) <= TOLERANCE
    assert relative_error(state.mass, expected[1].mass) <= TOLERANCE
    assert relative_error(state.total, expected[1].total) <= TOLERANCE


@pytest.mark.parametrize("causal", [True, False])
def test_heads_that_receive_do_not_hear_each_other(causal):
    arguments = make_grouped(3, T=TILE + 1, H=2, decay="head" if causal else None)
    changed = {**arguments, "receive_positions": arguments["receive_positions"].clone()}
    changed["receive_positions"][:, :, 1] = torch.nan
    (before, state), (after, changed_state) = (by_kernels(given, causal) for given in (arguments, changed))
    others = [0, 2, 3, 4, 5]
    assert torch.equal(before[:, :, others], after[:, :, others])
    assert after[:, :, 1].isnan().all()
    assert torch.equal(state.total, changed_state.total)


@pytest.mark.parametrize("causal", [True, False])
def test_nothing_to_do(causal):
    arguments = make_grouped(2, T=0, H=2, state=True)
    output, state = by_kernels(arguments, causal)
    assert output.shape == (1, 0, 4, 5)
    assert torch.equal(state.mass, arguments["mass"])


@pytest.mark.parametrize("name", ["mix", "collect", "hand_out"])
def test_operators_of_torch(name):
    arguments = make_grouped(2, T=TILE + 1, H=1, state=True)
    arguments = {name: part.requires_grad_() for name, part in arguments.items()}
    splats = [part.detach().requires_grad_() for part in for_kernels(Splats(*(arguments[of] for of in OF_SPLATS[:3])))]
    places, targets, values = (arguments[of] for of in ("send_positions", "receive_positions", "values"))
    received = targets.new_zeros(*targets.shape[:3], 5).requires_grad_()
    given = {
        "mix": (places, targets, values, splats, None, None, arguments["mass"], arguments["total"], None),
        "collect": (targets, received, splats, None, None),
        "hand_out": (targets, arguments["total"], splats, torch.float32, None),
    }
    torch.library.opcheck(getattr(operators, name), given[name])
