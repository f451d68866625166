"""The nearest splats: exactly those that looking at all of them finds, equals included; and what touching few saves."""

from unittest.mock import patch

import pytest
import torch
from cases import make_arguments, results
from hypothesis import given, settings
from hypothesis import strategies as st

import splatflow.ops.sparse as sparse_module
from splatflow.diagnostics import peak_memory
from splatflow.ops import ROUTINGS, Lattice, Splats, splat_attention
from splatflow.ops.routing import Router, missed_share
from splatflow.ops.search import best, best_pairs, groups_of

# few different numbers, so that many are equal, and sums that are equal after rounding only
NUMBERS = st.sampled_from((-torch.inf, -1e30, -3.0, 0.0, 0.1, 0.2, 0.3, 1.0, 1.0 + 2**-23, 1e8))


def by_rule(scores, count):
    """Sorted by Python: the largest first, of equals the first. What is infinitely far counts as very far."""
    least = torch.finfo(torch.float32).min
    return sorted(range(len(scores)), key=lambda place: (-max(scores[place], least), place))[:count]


def pairs_by_rule(first, second, count):
    """All pairs: the largest sum first, of equals the one whose half is better placed in the first, then the second."""
    places = [by_rule(half.tolist(), len(half)) for half in (first, second)]
    least = torch.finfo(first.dtype).min
    first, second = first.clamp_min(least), second.clamp_min(least)
    sums = {(a, b): max((first[a] + second[b]).item(), least) for a in places[0] for b in places[1]}
    rank = [{point: place for place, point in enumerate(half)} for half in places]
    return sorted(sums, key=lambda pair: (-sums[pair], rank[0][pair[0]], rank[1][pair[1]]))[:count]


@settings(max_examples=1000)
@given(
    first=st.lists(NUMBERS, min_size=1, max_size=9),
    second=st.lists(NUMBERS, min_size=1, max_size=9),
    count=st.integers(1, 8),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)
def test_pairs_of_a_lattice_are_those_of_the_brute_force(first, second, count, dtype):
    length = min(len(first), len(second))
    halves = [torch.tensor(half[:length], dtype=dtype) for half in (first, second)]
    found = torch.stack(best_pairs(*halves, count), -1).tolist()
    assert [tuple(pair) for pair in found] == pairs_by_rule(*halves, count)


@given(scores=st.lists(NUMBERS, min_size=1, max_size=20), count=st.integers(1, 8))
def test_best_takes_the_first_of_equals(scores, count):
    assert best(torch.tensor(scores), count).tolist() == by_rule(torch.tensor(scores).tolist(), count)


@given(seed=st.integers(0, 10_000), runs=st.sampled_from((4, 5, 8)), count=st.integers(1, 8))
def test_best_of_many_is_the_same(seed, runs, count):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (2, 3, 32 * runs), generator=generator).float()
    scores[0, 0] = -torch.inf
    expected = scores.clamp_min(torch.finfo(scores.dtype).min).sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(best(scores, count), expected[..., :count])


def random_lattice(K, H=2, P=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers, log_scales, log_amplitudes = (
        torch.randn(H, 2, K, *width, generator=generator) for width in ((P // 2,), (), ())
    )
    return Lattice(centers, 0.3 * log_scales, log_amplitudes)


@pytest.mark.parametrize("top_p", [1, 4, 8])
@pytest.mark.parametrize("biased", [False, True])
def test_a_lattice_finds_the_best_of_all_its_splats(top_p, biased):
    lattice, generator = random_lattice(K=11), torch.Generator().manual_seed(1)
    positions = torch.randn(3, 199, 2, 6, generator=generator)
    bias = torch.randn(3, 199, 2, 22, generator=generator) if biased else None
    row = ROUTINGS["lattice"]
    index, weights = Router(row, lattice, top_p).chosen(positions, bias)
    of_all = row.affinity(positions, lattice, bias)
    assert of_all.shape[-1] == 121
    values, places = of_all.topk(top_p)  # no two are equal here
    assert torch.equal(index, places)
    torch.testing.assert_close(weights, values.softmax(-1))


def test_a_lattice_splat_is_a_gaussian_of_both_halves():
    lattice = random_lattice(K=3)
    positions = torch.randn(1, 5, 2, 6, generator=torch.Generator().manual_seed(1))
    affinities = ROUTINGS["lattice"].affinity(positions, lattice, None)
    for a in range(3):
        for b in range(3):
            expected = 0.0
            for half, point in ((0, a), (1, b)):
                gap = positions[..., 3 * half : 3 * half + 3] - lattice.centers[:, half, point]
                variance = (2 * lattice.log_scales[:, half, point]).exp()
                expected = expected + lattice.log_amplitudes[:, half, point] - gap.square().sum(-1) / (2 * variance)
            torch.testing.assert_close(affinities[..., 3 * a + b], expected, rtol=1e-4, atol=1e-4)


def test_groups_share_out_all_splats_and_lie_together():
    centers = torch.randn(3, 256, 5, generator=torch.Generator().manual_seed(0))
    members, means = groups_of(centers)
    assert members.shape == (3, 16, 16)
    assert all(sorted(head.flatten().tolist()) == list(range(256)) for head in members)
    inside = (centers[torch.arange(3)[:, None, None], members] - means[:, :, None]).square().sum(-1).mean()
    assert inside < 0.7 * centers.square().sum(-1).mean()
    assert groups_of(centers[:, :7])[0].shape == (3, 1, 7)  # 7 cannot be halved


def test_what_a_search_in_groups_misses_is_reported():
    generator = torch.Generator().manual_seed(0)
    splats = Splats(torch.randn(2, 1024, 4, generator=generator), torch.full((2, 1024), -1.0), torch.zeros(2, 1024))
    positions = torch.randn(1, 300, 2, 4, generator=generator)
    exact, grouped = (missed_share(positions, splats, routing, top_p=4) for routing in ("mixture", "grouped"))
    assert (grouped >= exact - 1e-6).all()
    assert exact.mean() < grouped.mean() < exact.mean() + 0.2
    few = Splats(*(part[:, :16] for part in splats[:3]))  # four groups, all of them looked at
    exact, grouped = (missed_share(positions, few, routing, top_p=4) for routing in ("mixture", "grouped"))
    torch.testing.assert_close(exact, grouped, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kinds", [{"routing": "lattice", "M": 1024}, {"M": 256}, {"routing": "grouped", "M": 256}])
def test_memory_of_few_touched_is_linear_and_holds_no_token_times_splat(kinds):
    def bytes_per_token(length):
        sizes = {"B": 1, "H": 1, "P": 8, "D": 8, "dtype": torch.float32, **kinds}
        arguments = make_arguments(T=length, **sizes)
        options = {"routing": kinds.get("routing", "mixture"), "top_p": 2, "backend": "sparse"}
        with patch.object(sparse_module, "BLOCK_TOKENS", 512):
            return peak_memory(lambda: results(arguments, **options)) / length

    assert bytes_per_token(16_384) <= 1.1 * bytes_per_token(8192)
    if kinds.get("routing") == "lattice":
        assert bytes_per_token(16_384) < 1024 * 4


@pytest.mark.parametrize("backend", ["reference", "recurrent", "chunked", "sparse"])
@pytest.mark.parametrize("routing", ["mixture", "gaussian", "grouped"])
def test_what_is_ruled_out_is_chosen_once_at_most(backend, routing):
    """A bias of -inf is a mask: here one splat is left, of the two that are asked for."""
    bias = torch.full((1, 3, 1, 4), -torch.inf)
    bias[..., 1] = 0.0
    splats = Splats(torch.zeros(1, 4, 2), torch.zeros(1, 4), torch.zeros(1, 4))
    positions, values = torch.zeros(1, 3, 1, 2), torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
    options = {"routing": routing, "top_p": 2, "send_bias": bias, "receive_bias": bias, "backend": backend}
    output, state = splat_attention(positions, positions, values, splats, **options)
    expected = [1.0, 3.0, 9.0] if routing == "gaussian" else [1.0, 1.5, 3.0]
    torch.testing.assert_close(output.flatten(), torch.tensor(expected))
    assert state.mass.flatten().tolist() == [0.0, 3.0, 0.0, 0.0]


def test_a_compact_splat_has_an_end():
    splats = Splats(torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))  # reach 1, at 0
    two = Splats(
        *(torch.cat([part, part + shift], 1) for part, shift in zip(splats, (3.0, 0.0, 0.0, 0.0), strict=True))
    )
    values = torch.tensor([1.0, 5.0]).view(1, 2, 1, 1)
    positions = torch.tensor([0.9, 2.1]).view(1, 2, 1, 1)  # one within reach of each
    output, state = splat_attention(positions, positions, values, two, routing="compact")
    assert output.flatten().tolist() == [1.0, 5.0]
    assert state.mass.flatten().tolist() == [1.0, 1.0]
    lonely = torch.tensor([1.4, 100.0]).view(1, 2, 1, 1)  # out of reach: to the nearest
    assert splat_attention(lonely, lonely, values, two, routing="compact")[0].flatten().tolist() == [1.0, 5.0]


def test_the_reach_learns():
    arguments = make_arguments(routing="compact", T=37)
    assert results(arguments, routing="compact")["d log_reaches"].abs().min() > 0
