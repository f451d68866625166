"""The fused kernels: what they compute is what the definition says, in every case that they are built for.

Without a GPU they are interpreted, in small tiles of which a segment has few, so that short sequences meet all borders.
"""

# B batch, T token, H head, M splat, P position width, D value width

import importlib.util
import itertools
import random
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from cases import (
    GRAINS,
    PER_TOKEN,
    attend,
    cast,
    make_arguments,
    part_of,
    relative_error,
    results,
    unit_of,
)

import splatflow.ops.triton as room
from splatflow.ops import BACKENDS, ROUTINGS, Splats, SplatState, dispatch
from splatflow.ops.reference import decay_matrix
from splatflow.ops.routing import Router
from splatflow.ops.splats import Sources, Targets

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from kernel_cases import DEVICE, SEGMENT, TILE, TOLERANCE, WIDTHS, make, small_and_poisoned

from splatflow.ops.triton import operators
from splatflow.ops.triton.fused import for_kernels

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets, that exp(-1e9) is 0
LENGTHS = (1, TILE - 1, TILE, TILE + 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 3)
NUM_CASES = 64


@pytest.fixture(autouse=True)
def _small_and_poisoned():
    with small_and_poisoned():
        yield


def case(number):
    """Keywords of `make_arguments` and options of the call: a fixed draw of all that the kernels are built for."""
    draw = random.Random(number)
    causal = number // len(LENGTHS) % 3 > 0
    batch, heads = draw.choice(((1, 1), (1, 1), (1, 2), (2, 1)))
    widths = dict(zip("MPD", draw.choice(WIDTHS), strict=True))
    sizes = {"T": LENGTHS[number % len(LENGTHS)], "B": batch, "H": heads, **widths}
    kinds = {
        "decay": draw.choice(GRAINS) if causal else None,
        "gate": draw.choice(GRAINS),
        **{name: draw.random() < 0.5 for name in ("state", "padding", "tied")},
        "strided": draw.random() < 0.2,
    }
    if not causal and not kinds["tied"]:
        sizes["S"] = draw.choice(LENGTHS)
    return {"seed": number, **sizes, **kinds}, {"causal": causal}


def named(number):
    sizes, options = case(number)
    kinds = [f"{name}={value}" for name, value in sizes.items() if name != "seed" and value not in (False, None)]
    return "-".join(["causal" if options["causal"] else "both", *kinds])


@pytest.mark.parametrize("number", range(NUM_CASES), ids=named)
def test_equals_the_reference(number):
    sizes, options = case(number)
    arguments = make(**sizes)
    expected = results(cast(arguments, torch.float64), **options, backend="reference")
    actual = results(arguments, **options, backend="triton")
    for name, part in actual.items():
        assert relative_error(part, expected[name], unit_of(name, sizes, "mixture")) <= TOLERANCE, name


def test_the_cases_meet_everything():
    drawn = [case(number) for number in range(NUM_CASES)]
    met = {(name, value) for sizes, _ in drawn for name, value in sizes.items() if name in ("decay", "gate", "tied")}
    assert met >= {*itertools.product(("decay", "gate"), GRAINS), ("tied", True), ("tied", False)}
    assert {(sizes["T"], options["causal"]) for sizes, options in drawn} == {*itertools.product(LENGTHS, (True, False))}
    assert {(sizes["M"], sizes["P"], sizes["D"]) for sizes, _ in drawn} == {*WIDTHS}
    assert torch.empty_like(torch.ones(3)).isnan().all()
    assert torch.ones(3).new_empty(5).isnan().all()


def in_plain_torch(arguments, causal):
    """The formula in ordinary torch, in the type of its values all the way."""
    centers, log_scales, log_amplitudes = (arguments[name] for name in ("centers", "log_scales", "log_amplitudes"))
    values = arguments["values"]

    def posterior(positions):
        distance = (positions[..., None, :] - centers).square().sum(-1)
        return (log_amplitudes - distance / (2 * (2 * log_scales).exp())).softmax(-1)

    def of_splats(factor):
        return (factor if factor.ndim == 4 else factor[..., None]).expand_as(send)

    send, receive = posterior(arguments["send_positions"]), posterior(arguments["receive_positions"])
    if "write_gate" in arguments:
        send = send * of_splats(arguments["write_gate"])
    decay = of_splats(arguments["log_decay"]) if "log_decay" in arguments else torch.zeros_like(send)
    mass, total = (arguments[name].to(values.dtype) for name in ("mass", "total"))
    if causal:
        kept = decay.cumsum(1).exp()
        paths = torch.einsum("BHTSM,BSHM->BHTSM", decay_matrix(decay), send)
        paths = paths * paths.new_ones(paths.shape[2], paths.shape[2]).tril()[..., None]
        left = paths[:, :, -1]  # [B, H, S, M]
    else:
        kept, left = torch.ones_like(receive), send.transpose(1, 2)
        paths = left[:, :, None].expand(-1, -1, receive.shape[1], -1, -1)
    read = receive / (kept * mass[:, None] + torch.einsum("BHTSM->BTHM", paths))
    output = torch.einsum("BHTS,BSHD->BTHD", torch.einsum("BTHM,BHTSM->BHTS", read, paths), values)
    output = output + torch.einsum("BTHM,BHMD->BTHD", read * kept, total)
    after = (
        kept[:, -1] * mass + left.sum(2),
        kept[:, -1, ..., None] * total + torch.einsum("BHSM,BSHD->BHMD", left, values),
    )
    return output, SplatState(*(part.float() for part in after))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("causal", "kinds"),
    [(True, {}), (True, {"decay": "head", "gate": "head"}), (True, {"decay": "splat"}), (False, {"gate": "splat"})],
    ids=str,
)
def test_half_precision_is_at_most_twice_as_far_off_as_plain_torch(dtype, causal, kinds):
    sizes = {"B": 1, "T": 53, "H": 2, "M": 13, "P": 5, "D": 11}
    arguments = make(**sizes, **kinds, state=True, dtype=dtype)
    if "log_decay" in arguments:  # plain torch makes NaN of the gradient by -inf
        arguments["log_decay"] = arguments["log_decay"].clamp_min(-1.0)
    expected = results(cast(arguments, torch.float64), causal=causal, backend="reference")
    plain = results(arguments, call=in_plain_torch, causal=causal)
    actual = results(arguments, causal=causal, backend="triton")
    assert actual["output"].dtype == dtype
    assert actual["mass"].dtype == actual["total"].dtype == torch.float32
    for name, part in actual.items():
        unit = unit_of(name, sizes, "mixture")
        error, plain_error = (relative_error(found[name], expected[name], unit) for found in (actual, plain))
        assert error <= 2 * plain_error, (name, error, plain_error)
        assert name not in arguments or part.dtype == arguments[name.removeprefix("d ")].dtype


@pytest.mark.parametrize("kinds", [{}, {"decay": "head", "gate": "head"}, {"decay": "splat", "gate": "splat"}], ids=str)
@pytest.mark.parametrize("past", [1, TILE - 1, SEGMENT, SEGMENT + 3])
def test_the_future_changes_no_bit_of_the_past(kinds, past):
    largest = torch.finfo(torch.float32).max
    arguments = make(T=SEGMENT + 7, state=True, **kinds)
    changed = {name: part.clone() for name, part in arguments.items()}
    for name in changed.keys() & set(PER_TOKEN):
        changed[name][:, past:] = {"log_decay": -torch.inf, "write_gate": 0.5}.get(name, largest)
    before, after = (attend(given, backend="triton")[0][:, :past] for given in (arguments, changed))
    assert before.isfinite().all()
    assert torch.equal(before, after)


@pytest.mark.parametrize("backends", [("triton",), ("triton", "chunked")], ids="+".join)
@pytest.mark.parametrize("kinds", [{"gate": "head"}, {"decay": "head"}, {"decay": "splat"}], ids=str)
def test_any_split_equals_one_pass(backends, kinds):
    arguments = make(T=53, state=True, **kinds)
    expected, expected_state = attend(cast(arguments, torch.float64), backend="reference")
    outputs = []
    for number, (start, stop) in enumerate(itertools.pairwise((0, 1, 2, 17, 50, 53))):  # single tokens are steps
        piece = part_of(arguments, slice(start, stop))
        output, state = attend(piece, backend=backends[number % len(backends)])
        outputs.append(output)
        arguments |= {"mass": state.mass, "total": state.total}
    assert relative_error(torch.cat(outputs, 1), expected) <= TOLERANCE
    assert relative_error(state.mass, expected_state.mass) <= TOLERANCE
    assert relative_error(state.total, expected_state.total) <= TOLERANCE


@pytest.mark.parametrize(
    ("causal", "kinds"), [(True, {"decay": "head"}), (True, {"decay": "splat"}), (False, {})], ids=str
)
def test_two_calls_give_the_same_bits(causal, kinds):
    arguments = make(T=SEGMENT + 5, gate="head", state=True, **kinds)
    first, second = (results(arguments, causal=causal, backend="triton") for _ in range(2))
    for name, part in first.items():
        assert torch.equal(part, second[name]), name


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("log10_scales", [(-8, 0, 8), (-8, -8, -8), (0, 1, 0), (8, 8, 8)], ids=str)
def test_extreme_splats(causal, log10_scales):
    arguments = make(T=TILE + 3, M=3, state=True)
    arguments["log_scales"] = (10.0 ** torch.tensor(log10_scales)).log().expand(2, -1).to(DEVICE).contiguous()
    for name, part in results(arguments, causal=causal, backend="triton").items():
        assert part.isfinite().all(), name


@pytest.mark.parametrize("kinds", [{"causal": False}, {"causal": True}, {"causal": True, "decay": "splat"}], ids=str)
@pytest.mark.parametrize("distance", [5.0, 8.5, 8.65, 14.0, 100.0])  # between 8.5 and 8.65 masses are the least ones
def test_a_splat_that_hardly_any_mass_reached(kinds, distance):
    """Tokens send to one splat and receive from another; then with gates of 0, so that no splat has any mass."""
    causal, sizes = kinds["causal"], {"B": 1, "T": 3, "H": 1, "M": 2, "P": 1}
    arguments = make(**sizes, decay=kinds.get("decay"))
    if "log_decay" in arguments:
        arguments["log_decay"] = arguments["log_decay"].clamp_min(-0.1)
    arguments["centers"] = torch.tensor([0.0, distance], device=DEVICE).view(1, 2, 1)
    arguments["log_scales"] = torch.zeros_like(arguments["log_scales"])
    arguments["send_positions"] = torch.zeros_like(arguments["send_positions"])
    arguments["receive_positions"] = torch.full_like(arguments["receive_positions"], distance)
    expected = results(cast(arguments, torch.float64), causal=causal, backend="reference")
    actual = results(arguments, causal=causal, backend="triton")
    for name, part in actual.items():
        assert relative_error(part, expected[name], unit_of(name, sizes, "mixture")) <= TOLERANCE, name
    closed = {**arguments, "write_gate": torch.zeros(1, 3, 1, device=DEVICE)}
    silent = results(closed, causal=causal, backend="triton")
    assert not silent["output"].any()
    assert all(part.isfinite().all() for part in silent.values()), distance


@pytest.mark.parametrize("grain", ["head", "splat"])
@pytest.mark.parametrize("reset", [0, TILE, SEGMENT + 5])
def test_a_decay_of_minus_infinity_forgets_all_that_came_before(grain, reset):
    arguments = make(T=SEGMENT + 9, decay=grain, state=True)
    arguments["log_decay"][:, reset] = -torch.inf
    later = part_of(arguments, slice(reset, None))
    later |= {name: torch.zeros_like(arguments[name]) for name in ("mass", "total")}
    expected, _ = attend(later, backend="chunked")
    output, _ = attend(arguments, backend="triton")
    assert relative_error(output[:, reset:], expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["values", "send_positions", "mass"])
def test_nan_in_one_sequence_reaches_no_other_and_is_not_hidden(name):
    arguments = make(B=2, T=TILE + 1, state=True)
    sick = {**arguments, name: arguments[name].clone()}
    sick[name][1] = torch.nan
    expected, actual = (results(given, backend="triton") for given in (arguments, sick))
    assert torch.equal(actual["output"][0], expected["output"][0])
    assert actual["output"][1].isnan().all()


def test_nothing_to_do():
    for causal in (True, False):
        arguments = make(T=0, state=True)
        output, state = attend(arguments, causal=causal, backend="triton")
        assert output.shape == (1, 0, 2, 5)
        assert torch.equal(state.mass, arguments["mass"])
    arguments = make(T=5, S=0, state=True)
    expected, _ = attend(arguments, causal=False, backend="chunked")
    output, _ = attend(arguments, causal=False, backend="triton")
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    ("sizes", "options", "reason"),
    [
        ({"dtype": torch.float64}, {}, "send_positions is torch.float64"),
        ({}, {"routing": "gaussian"}, "the routing 'mixture' alone"),
        ({}, {"top_p": 2}, "top_p is 2"),
        ({"bias": True}, {}, "send_bias"),
        ({"mixing": True}, {}, "receive_mixing"),
        ({"transform": True}, {}, "transform"),
        (
            {"M": 129, "dtype": torch.bfloat16},
            {},
            "the number of splats is 129, expected 1 to 128 for tokens of torch.bfloat16",
        ),
        ({"P": 65}, {}, "the width of positions is 65, expected 1 to 64 for tokens of torch.float32"),
        (
            {"D": 65, "dtype": torch.float16},
            {},
            "the width of values is 65, expected 1 to 64 for tokens of torch.float16",
        ),
    ],
    ids=str,
)
def test_what_it_is_not_built_for_is_refused_with_the_reason(sizes, options, reason):
    with pytest.raises(ValueError, match="backend 'triton' cannot do this") as raised:
        attend(make(T=3, **sizes), backend="triton", **options)
    assert reason in str(raised.value)


def test_where_it_cannot_run_it_is_refused_with_the_reason():
    arguments = make_arguments(T=3, dtype=torch.float32)
    with patch.object(room, "is_interpreted", lambda: False), pytest.raises(ValueError, match="values is on cpu"):
        attend(arguments, backend="triton")
    with (
        patch.object(importlib.util, "find_spec", lambda name: None),
        pytest.raises(ValueError, match="triton is not installed"),
    ):
        attend(arguments, backend="triton")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("top_p", "built"), [(None, True), (2, False)])
def test_auto_takes_it_on_cuda_if_it_can(device, top_p, built):
    tokens = SimpleNamespace(shape=(1, 7, 2, 5), dtype=torch.float32, device=torch.device(device))  # no GPU is needed
    router = Router(ROUTINGS["mixture"], Splats(torch.zeros(2, 11, 5), *torch.zeros(2, 2, 11)), top_p)
    sources, targets = Sources(tokens, tokens, None, None, None), Targets(tokens, None)
    chosen = dispatch._choose("auto", router, sources, targets, causal=True)
    assert (chosen is BACKENDS["triton"]) == (built and device == "cuda")


OPERATORS = {
    "mix": ("send_positions", "receive_positions", "values", "SPLATS", "log_decay", "write_gate", "mass", "total"),
    "collect": ("send_positions", "values", "SPLATS", "write_gate"),
    "hand_out": ("receive_positions", "total", "SPLATS", "DTYPE"),
}


@pytest.mark.parametrize("boundaries", [None, [0, 5, 5, 2 * SEGMENT + 6]], ids=["", "packed"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_of_torch(name, boundaries):
    batch, num_tokens = (1, SEGMENT + 1) if boundaries is None else (len(boundaries) - 1, boundaries[-1])
    arguments = make(T=num_tokens, H=1, gate="splat", decay="head")
    arguments |= {name: part for name, part in make(B=batch, T=1, H=1, state=True).items() if name in ("mass", "total")}
    arguments["log_decay"] = arguments["log_decay"][..., None]
    splats = for_kernels(Splats(*(arguments[part] for part in ("centers", "log_scales", "log_amplitudes"))))
    given = []
    for part in OPERATORS[name]:
        if part == "SPLATS":
            given.append([part.detach().requires_grad_() for part in splats])
        else:
            given.append(torch.float32 if part == "DTYPE" else arguments[part])
    given = [part.detach().contiguous().requires_grad_() if isinstance(part, torch.Tensor) else part for part in given]
    torch.library.opcheck(getattr(operators, name), (*given, boundaries))


COMPILED = """
import torch
import splatflow.ops.triton.cutting as cutting
from splatflow import Splats, splat_attention

cutting.FEWEST_TILES, cutting.PROGRAMS = 1, 1000
torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)
positions, values = torch.randn(1, 37, 2, 3), torch.randn(1, 37, 2, 5, requires_grad=True)
splats = Splats(torch.randn(2, 11, 3), torch.zeros(2, 11), torch.zeros(2, 11))
log_decay = -values.detach()[..., 0].abs()


def function():
    causal = splat_attention(positions, positions, values, splats, log_decay=log_decay, backend="triton")[0]
    return causal, splat_attention(positions, positions, values, splats, causal=False, backend="triton")[0]


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
