"""The kernels of the sparse path: the search finds what looking at all splats finds, the scan is what it is in torch.

Without a GPU they are interpreted, in small tiles of which a segment has few, so that short sequences meet all borders.
"""

# B batch, T token, H head, N sequence and head, K point of half a lattice, M splat, P position width, D value width,
# p event of a token, E event, X row width

import importlib.util
import itertools
import math
import random
import subprocess
import sys
from contextlib import contextmanager
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

from splatflow.ops import ROUTINGS, Lattice, kernels
from splatflow.ops import scan as scan_module
from splatflow.ops import sparse as sparse_module
from splatflow.ops.routing import Router, posterior
from splatflow.ops.scan import scan

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from kernels import poisoned
from test_triton_compiles import FAST_MEMORY, bytes_used_by

from splatflow.ops.triton import launch_sparse
from splatflow.ops.triton import sparse as operators

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets, of what is not selected
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE, SEGMENT = 4, 8
SEARCHED = 16  # tokens of a tile in the search
TOLERANCE = 1e-5  # of fp32
ROUTE = {"routing": "lattice", "backend": "sparse"}


@contextmanager
def by_kernels():
    with patch.object(kernels, "run_on", lambda device: True):
        yield


@pytest.fixture(autouse=True)
def _small_and_poisoned():
    """Segments of two tiles, slices of few columns; and what is not written is NaN."""
    rules = {"TILE": TILE, "SEGMENT": SEGMENT, "LOOKED_UP": 8, "COLUMNS": 4, "SCORES": 1}
    with patch.multiple(launch_sparse, **rules), poisoned():
        yield


# the search


def whole_numbers(number):
    """Positions, lattice and bias of whole numbers, of which fp32 makes no rounding errors, many of them equal."""
    draw, generator = random.Random(number), torch.Generator().manual_seed(number)
    K = (1, 2, 3, 7, 16, 37, 256)[number % 7]
    top_p, P = min(K * K, 1 + number % 8), draw.choice((2, 6, 34, 128))
    T, H = (1, SEARCHED - 1, SEARCHED, SEARCHED + 1)[number // 2 % 4], draw.choice((1, 2))

    def whole(most, *shape):
        return torch.randint(-most, most + 1, shape, generator=generator).float().to(DEVICE)

    lattice = Lattice(whole(2, H, 2, K, P // 2), torch.zeros(H, 2, K, device=DEVICE), whole(1, H, 2, K))
    bias = None
    if draw.random() < 0.6:
        bias = whole(3, 2, T, H, 2 * K)
        bias[whole(3, *bias.shape) == 3.0] = -torch.inf
        if draw.random() < 0.5:
            bias[whole(40, *bias.shape) == 40.0] = torch.nan
    dtype = draw.choice((torch.float32, torch.bfloat16, torch.float16))
    return whole(3, 2, T, H, P).to(dtype), lattice, bias, top_p


def exact_halves(positions, lattice, bias):
    """log alpha - |p - c|^2 / 2 of both halves, [B, T, H, 2, K], as differences are squared."""
    halves = positions.float().unflatten(-1, (2, -1))[..., None, :]
    affinities = lattice.log_amplitudes - 0.5 * (halves - lattice.centers).square().sum(-1)
    return affinities if bias is None else affinities + bias.unflatten(-1, (2, -1))


def best_of_all(first, second, count):
    """Of all K x K sums the largest; of equals the one whose point is better placed in the first half, then second."""
    least = torch.finfo(first.dtype).min
    in_first, in_second = (half.clamp_min(least).sort(descending=True, stable=True).indices for half in (first, second))
    sums = (first[in_first, None] + second[None, in_second]).clamp_min(least).flatten()
    chosen = sums.sort(descending=True, stable=True).indices[:count]
    return in_first[chosen // len(first)], in_second[chosen % len(first)]


@pytest.mark.parametrize("number", range(56))
def test_the_search_finds_what_looking_at_all_splats_finds(number):
    positions, lattice, bias, top_p = whole_numbers(number)
    found = torch.stack(operators.best_pairs(positions, lattice, bias, top_p), -1)
    halves = exact_halves(positions, lattice, bias)
    for place in itertools.product(*map(range, positions.shape[:3])):
        expected = torch.stack(best_of_all(*halves[place], top_p), -1)
        assert torch.equal(found[place], expected), (place, *halves[place])


def test_the_cases_of_the_search_meet_everything():
    drawn = [whole_numbers(number) for number in range(56)]
    assert {top_p for *_, top_p in drawn} == {*range(1, 9)}
    assert {lattice.centers.shape[2] for _, lattice, _, _ in drawn} == {1, 2, 3, 7, 16, 37, 256}
    assert {positions.shape[1] for positions, *_ in drawn} == {1, SEARCHED - 1, SEARCHED, SEARCHED + 1}
    assert {positions.shape[-1] for positions, *_ in drawn} == {2, 6, 34, 128}
    biases = [bias for _, _, bias, _ in drawn if bias is not None]
    assert any(bias.isnan().any() for bias in biases)
    assert any(bias.isneginf().any() for bias in biases)
    assert sum(is_tied(*case) for case in drawn) > 14


def is_tied(positions, lattice, bias, top_p):
    """Whether the last splat that the first token chooses is as near as one that it leaves out."""
    first, second = exact_halves(positions, lattice, bias)[0, 0, 0]
    sums = (first[:, None] + second).flatten().sort(descending=True).values
    return top_p < len(sums) and bool(sums[top_p - 1] == sums[top_p])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("K", "P", "top_p"), [(37, 10, 5), (256, 64, 4), (5, 2, 8)])
def test_no_other_splats_are_nearer_than_those_chosen(dtype, K, P, top_p):
    generator = torch.Generator().manual_seed(K)
    centers, log_scales, log_amplitudes = (
        torch.randn(2, 2, K, *width, generator=generator).to(DEVICE) for width in ((P // 2,), (), ())
    )
    lattice = Lattice(centers, 0.3 * log_scales, log_amplitudes)
    positions = torch.randn(1, 19, 2, P, generator=generator).to(DEVICE, dtype)
    bias = torch.randn(1, 19, 2, 2 * K, generator=generator).to(DEVICE, dtype)
    row = ROUTINGS["lattice"]
    with by_kernels():
        index, weights = Router(row, lattice, top_p).chosen(positions, bias)
    wide = Lattice(*(part.double() for part in lattice))
    of_all = row.affinity(positions.double(), wide, bias.double())
    chosen, best = of_all.gather(-1, index), of_all.topk(top_p).values
    assert all(len(set(places)) == top_p for places in index.flatten(0, 2).tolist())
    torch.testing.assert_close(chosen, best, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(weights.double(), posterior(chosen), rtol=1e-4, atol=1e-5)


# the scan


def events(seed, N, M, T, p, X):
    """Table, rows, and where events write and read; half of them at the first rows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

    def places():
        keys = torch.rand(N, T, M, generator=generator) - 0.7 * (torch.arange(M) < p).float()
        return keys.argsort(-1)[..., :p].flatten(1).to(DEVICE)

    return normal(N, M, X), normal(N, T * p, X), places(), places()


@pytest.mark.parametrize("clock", [False, True])
@pytest.mark.parametrize(
    ("N", "M", "T", "p", "X"),
    [
        (2, 9, 37, 2, 5),
        (1, 1, 45, 1, 4),  # one row, of more segments than a tile has events
        (3, 100, 5, 4, 3),  # many rows that are used once
        (2, 3, SEGMENT, 3, 9),
        (1, 2, SEGMENT + 1, 1, 1),
        (1, 5, 1, 2, 6),
    ],
)
def test_a_scan_by_kernels_is_a_scan(N, M, T, p, X, clock):
    table, rows, write_at, read_at = events(T, N, M, T, p, X)
    log_kept = None
    if clock:
        steps = -torch.rand(N, T, dtype=torch.float64, device=DEVICE)
        steps[:, T // 2] = sparse_module.FORGOTTEN
        log_kept = steps.cumsum(1)

    def found_and_gradients(dtype):
        parts = [part.detach().to(dtype).requires_grad_() for part in (table, rows)]
        times = [] if log_kept is None else [log_kept.detach().requires_grad_()]
        found, after = scan(parts[0] + 0.0, parts[1], write_at, read_at, *(times or [None]), p)
        loss = (found * found.detach().sin()).sum() + (after * after.detach().cos()).sum()
        return found, after, *torch.autograd.grad(loss, [*parts, *times])

    expected = found_and_gradients(torch.float64)
    with by_kernels(), patch.object(scan_module, "pieces_of", None):
        actual = found_and_gradients(torch.float32)
    for here, there in zip(actual, expected, strict=True):
        assert relative_error(here, there) <= 1e-6 * (10 if here.dtype == torch.float64 else 1)


def test_a_slow_decay_over_many_segments_is_exact():
    """Products of rounded decays would be off by as many roundings as there are events."""
    T = 600
    table, rows, place, _ = events(0, 1, 1, T, 1, 1)
    log_kept = torch.full((1, T), -1e-4, dtype=torch.float64, device=DEVICE).cumsum(1)
    table, rows = torch.ones_like(table), torch.zeros_like(rows)
    rows[:, 0] = 1.0
    with by_kernels(), patch.multiple(launch_sparse, TILE=8, SEGMENT=64):
        found, _ = scan(table.float(), rows.float(), place, place, log_kept, 1)
    expected = log_kept.exp() + (log_kept - log_kept[:, :1]).exp()
    torch.testing.assert_close(found[..., 0].double(), expected, rtol=1e-6, atol=0)


# the operator

LENGTHS = (1, TILE - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 3)
NUM_CASES = 45


def case(number):
    """Keywords of `make_arguments` and options of the call: a fixed draw of all that there is with a lattice."""
    draw = random.Random(number)
    causal = number // len(LENGTHS) % 3 > 0
    batch, heads = draw.choice(((1, 1), (1, 2), (2, 1)))
    sizes = {
        "T": LENGTHS[number % len(LENGTHS)],
        "B": batch,
        "H": heads,
        "M": draw.choice((1, 4, 9, 25)),
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
    top_p = draw.choice((1, 2, 3, 5, 8) if sizes["T"] <= SEGMENT else (1, 2, 3))  # many events take long
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


def make(**sizes):
    kinds = {"B": 1, "H": 2, "M": 9, "D": 5, "routing": "lattice", "dtype": torch.float32}
    return {name: part.to(DEVICE) for name, part in make_arguments(**{**kinds, **sizes}).items()}


@pytest.mark.parametrize("number", range(NUM_CASES), ids=named)
def test_equals_the_reference(number):
    sizes, options = case(number)
    arguments = make(**sizes)
    expected = results(cast(arguments, torch.float64), **{**ROUTE, **options, "backend": "reference"})
    with by_kernels(), patch.object(scan_module, "pieces_of", None), patch("splatflow.ops.routing.best_pairs", None):
        actual = results(arguments, **ROUTE, **options)
    for name, part in actual.items():
        assert relative_error(part, expected[name], unit_of(name, sizes, "lattice")) <= TOLERANCE, name


def test_the_cases_meet_everything():
    drawn = [case(number) for number in range(NUM_CASES)]
    assert {(sizes["T"], options["causal"]) for sizes, options in drawn} == {*itertools.product(LENGTHS, (True, False))}
    for name, values in {
        "decay": (None, "head"),
        "gate": (None, "head", "splat"),
        "M": (1, 4, 9, 25),
        **dict.fromkeys(("state", "padding", "tied", "bias", "strided", "transform"), (True, False)),
    }.items():
        assert {sizes[name] for sizes, _ in drawn} == {*values}, name
    assert {options["top_p"] for _, options in drawn} == {1, 2, 3, 4, 5, 8}


@pytest.mark.parametrize("kinds", [{}, {"decay": "head", "gate": "head", "bias": True}], ids=str)
@pytest.mark.parametrize("worst", [torch.nan, torch.inf, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("past", [1, SEGMENT + 3])
def test_the_future_changes_no_bit_of_the_past(kinds, worst, past):
    arguments = make(T=2 * SEGMENT + 3, H=1, state=True, **kinds)
    changed = {name: part.clone() for name, part in arguments.items()}
    for name in changed.keys() & set(PER_TOKEN):
        bounded = {} if math.isnan(worst) else {"log_decay": -torch.inf, "write_gate": 0.5}
        changed[name][:, past:] = bounded.get(name, worst)
    with by_kernels():
        before, after = (attend(given, top_p=2, **ROUTE)[0][:, :past] for given in (arguments, changed))
    assert before.isfinite().all()
    assert torch.equal(before, after)


@pytest.mark.parametrize("kinds", [{"gate": "head"}, {"decay": "head"}], ids=str)
def test_any_split_equals_one_pass(kinds):
    arguments = make(T=21, H=1, state=True, **kinds)
    options = {"top_p": 2, **ROUTE}
    expected, expected_state = attend(cast(arguments, torch.float64), **{**options, "backend": "reference"})
    outputs = []
    for start, stop in itertools.pairwise((0, 1, 2, 12, 21)):
        with by_kernels():
            output, state = attend(part_of(arguments, slice(start, stop)), **options)
        outputs.append(output)
        arguments |= {"mass": state.mass, "total": state.total}
    assert relative_error(torch.cat(outputs, 1), expected) <= TOLERANCE
    assert relative_error(state.mass, expected_state.mass) <= TOLERANCE
    assert relative_error(state.total, expected_state.total) <= TOLERANCE


def test_blocks_are_longer_where_kernels_scan():
    table = torch.zeros(2, 9, 5)
    assert sparse_module.block_of(table, top_p=4) == sparse_module.BLOCK_TOKENS
    with by_kernels():
        assert sparse_module.block_of(table, top_p=4) == sparse_module.EVENTS_AT_ONCE // 8
        assert sparse_module.block_of(table.double(), top_p=4) == sparse_module.BLOCK_TOKENS


def test_what_they_are_not_built_for_is_done_in_torch():
    def searched(top_p=8, **sizes):
        arguments = make_arguments(**{"T": 3, "M": 16, "H": 1, "routing": "lattice", "dtype": torch.float32, **sizes})
        lattice = Lattice(*(arguments[name] for name in ("centers", "log_scales", "log_amplitudes")))
        return kernels.search_for(arguments["send_positions"], lattice, top_p) is not None

    assert not searched()
    assert kernels.scan_for(torch.zeros(1, 2, 3)) is None
    with by_kernels():
        assert searched()
        assert searched(M=256 * 256, P=128)
        assert not searched(M=257 * 257)
        assert not searched(P=130)
        assert not searched(top_p=9)
        assert not searched(T=0)
        assert not searched(dtype=torch.float64)
        assert kernels.scan_for(torch.zeros(1, 2, 3)) is not None
        assert kernels.scan_for(torch.zeros(1, 2, 3, dtype=torch.float64)) is None


@pytest.mark.parametrize("fades", [False, True])
def test_operators_of_torch(fades):
    table, rows, write_at, read_at = events(0, 2, 3, 2 * SEGMENT, 2, 5)
    table, rows = table.float(), rows.float()
    times = -torch.arange(rows.shape[1], device=DEVICE).double().expand(2, -1).contiguous() if fades else None
    edge = None if times is None else times[:, 0].contiguous()
    order = operators.in_order(write_at)
    last = operators.last_before(read_at, order.sorted_at, order.by, 2)
    given = (rows, order.by, order.rank, operators.starts_of(order, 3), times)
    sums = operators.running_sums(*given)
    torch.library.opcheck(operators.running_sums, given)
    torch.library.opcheck(operators.look_up, (table, sums, order.by, times, edge, read_at, last))
    torch.library.opcheck(operators.add_last, (table, sums, order.sorted_at, order.by, times, edge))


@pytest.mark.parametrize("number", [3, 12])
def test_the_search_as_an_operator_of_torch(number):
    positions, lattice, bias, top_p = whole_numbers(number)
    factors = operators.lattice_factors(lattice, torch.float32).contiguous()
    torch.library.opcheck(operators.search_lattice, (positions, factors, bias, top_p))


SCRIPT = """
import splatflow.ops.triton.launch_sparse as launch


def compile_all(num_points, position_dim, top_p, dtype, biased, fades, num_tokens, num_heads):
    positions = torch.empty(2, num_tokens, num_heads, position_dim, dtype=dtype)
    factors = torch.empty(num_heads, 2, num_points, position_dim // 2 + 2)
    bias = positions.new_empty(*positions.shape[:3], 2 * num_points) if biased else None
    chosen = torch.empty(*positions.shape[:3], top_p, dtype=torch.int64)
    launch.best_pairs(positions, factors, bias, top_p, chosen, chosen)
    heads, num_events, num_rows, width = 2 * num_heads, num_tokens * top_p, num_points, position_dim + 1
    rows, table = torch.empty(heads, num_events, width), torch.empty(heads, num_rows, width)
    places = torch.empty(heads, num_events, dtype=torch.int64)
    times = torch.empty(heads, num_events, dtype=torch.float64) if fades else None
    edge = None if times is None else times[:, 0]
    starts = torch.empty(heads, 1 + launch.num_segments_of(num_events, num_rows), dtype=torch.int64)
    sums = launch.running_sums(rows, places, places, starts, times)
    launch.look_up(table, sums, places, times, edge, places, places)
    launch.add_last(table, sums, places, places, times, edge)


compile_all(CASE)
"""
EVERY_KERNEL = {"best_pairs_kernel", "running_sums_kernel", "look_up_kernel", "add_last_kernel"}


@pytest.mark.parametrize(
    ("case", "more"),
    [
        ("256, 128, 8, torch.float32, True, True, 300, 3", {"segment_sums_kernel"}),
        ("32, 64, 4, torch.bfloat16, False, False, 300, 3", {"segment_sums_kernel"}),
        ("1, 2, 1, torch.float16, True, True, 1, 1", set()),  # what is 1 is a constant to the compiler
    ],
)
def test_kernels_compile_for_hopper_and_fit(case, more, tmp_path):
    used = bytes_used_by(SCRIPT.replace("CASE", case), tmp_path)
    assert {name for name, _ in used} == EVERY_KERNEL | more
    assert max(number for _, number in used) <= FAST_MEMORY


COMPILED = """
import torch
from splatflow import splat_attention
from splatflow.ops import Lattice, kernels

kernels.run_on = lambda device: True
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
positions, values, centers = (torch.randn(size, device=device) for size in ((1, 11, 2, 4), (1, 11, 2, 3), (2, 2, 3, 2)))
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
