"""The kernel that searches a lattice finds the splats that looking at all of them finds."""

# B batch, T token, H head, K point of half a lattice, P position width

import importlib.util
import itertools
import random

import pytest
import torch

from splatflow.ops import ROUTINGS, Lattice
from splatflow.ops.routing import Router, posterior

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from kernel_cases import DEVICE, few_events_and_poisoned, sparse_by_kernels

from splatflow.ops.triton import sparse as operators

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets, of what is not selected
TILE = 16  # tokens
NUM_CASES = 28


@pytest.fixture(autouse=True)
def _small_and_poisoned():
    with few_events_and_poisoned():
        yield


def whole_numbers(number):
    """Positions, lattice and bias of whole numbers, of which fp32 makes no rounding errors, many of them equal."""
    draw, generator = random.Random(number), torch.Generator().manual_seed(number)
    K = (1, 2, 3, 7, 16, 37, 256)[number % 7]
    top_p, P = min(K * K, 1 + number % 8), draw.choice((2, 6, 34, 128))
    T, H = (1, TILE - 1, TILE, TILE + 1)[number // 2 % 4], draw.choice((1, 2))

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


@pytest.mark.parametrize("number", range(NUM_CASES))
def test_the_search_finds_what_looking_at_all_splats_finds(number):
    positions, lattice, bias, top_p = whole_numbers(number)
    found = torch.stack(operators.best_pairs(positions, lattice, bias, top_p), -1)
    halves = exact_halves(positions, lattice, bias)
    for place in itertools.product(*map(range, positions.shape[:3])):
        expected = torch.stack(best_of_all(*halves[place], top_p), -1)
        assert torch.equal(found[place], expected), (place, *halves[place])


def test_the_cases_meet_everything():
    drawn = [whole_numbers(number) for number in range(NUM_CASES)]
    assert {top_p for *_, top_p in drawn} == {*range(1, 9)}
    assert {lattice.centers.shape[2] for _, lattice, _, _ in drawn} == {1, 2, 3, 7, 16, 37, 256}
    assert {positions.shape[1] for positions, *_ in drawn} == {1, TILE - 1, TILE, TILE + 1}
    assert {positions.shape[-1] for positions, *_ in drawn} == {2, 6, 34, 128}
    biases = [bias for _, _, bias, _ in drawn if bias is not None]
    assert any(bias.isnan().any() for bias in biases)
    assert any(bias.isneginf().any() for bias in biases)
    assert sum(is_tied(*case) for case in drawn) > 7


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
    with sparse_by_kernels():
        index, weights = Router(row, lattice, top_p).chosen(positions, bias)
    wide = Lattice(*(part.double() for part in lattice))
    of_all = row.affinity(positions.double(), wide, bias.double())
    chosen, best = of_all.gather(-1, index), of_all.topk(top_p).values
    assert all(len(set(places)) == top_p for places in index.flatten(0, 2).tolist())
    torch.testing.assert_close(chosen, best, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(weights.double(), posterior(chosen), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [8, 9])
def test_the_operator_of_torch(number):
    positions, lattice, bias, top_p = whole_numbers(number)
    factors = operators.lattice_factors(lattice, torch.float32).contiguous()
    torch.library.opcheck(operators.search_lattice, (positions, factors, bias, top_p))
