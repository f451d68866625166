"""Splats that are out of reach are skipped: nothing changes but the time, and not one bit of the past."""

from unittest.mock import patch

import pytest
import torch
from cases import attend, make_arguments, part_of, relative_error, results, skipping_anyway

import splatflow.ops.reach as reach_module
import splatflow.ops.slots as slots_module
from splatflow.ops import Splats, skipped_share

B, T, H, M, P = 2, 67, 3, 32, 5
OPTIONS = {"routing": "compact", "backend": "reach"}
DORMANT = -1e30
TOLERANCE = 1e-11  # far from the origin a squared distance is a difference of larger numbers than in other tests


def clustered(*, causal=True, **kinds):
    """Four far clusters of splats. Tokens go from the first to the second and third, but for a few that are lost."""
    S = T if causal else 53
    arguments = make_arguments(B=B, T=T, S=S, H=H, M=M, P=P, routing="compact", **kinds)
    places = torch.tensor([-12.0, -4.0, 4.0, 12.0], dtype=torch.float64)
    arguments["centers"] = arguments["centers"] + places.repeat_interleave(M // 4)[:, None]
    for side, length in (("send", S), ("receive", T)):
        going = places[torch.arange(length) * 3 // length][:, None, None]
        arguments[f"{side}_positions"] = arguments[f"{side}_positions"] + going
        arguments[f"{side}_positions"][:, 31] += 4.0  # out of every reach
    arguments["log_reaches"] = torch.full((H, M), 3.1, dtype=torch.float64).log()
    arguments["log_reaches"] += 0.1 * torch.arange(M) / M
    arguments["log_amplitudes"][:, ::5] = DORMANT
    return arguments


def share_of(arguments, causal):
    splats = Splats(*(arguments[name] for name in ("centers", "log_scales", "log_amplitudes", "log_reaches")))
    with skipping_anyway():
        return skipped_share(arguments["send_positions"], arguments["receive_positions"], splats, causal=causal)


@pytest.mark.parametrize(
    ("causal", "kinds"),
    [
        (True, {}),
        (True, {"decay": "head", "state": True, "bias": True}),
        (True, {"decay": "splat", "gate": "splat", "state": True, "transform": True}),
        (True, {"gate": "head", "padding": True, "transform": True, "decay": "head"}),
        (False, {}),
        (False, {"gate": "splat", "state": True, "bias": True, "transform": True, "padding": True}),
    ],
    ids=str,
)
def test_skipping_changes_no_result(causal, kinds):
    arguments = clustered(causal=causal, **kinds)
    assert share_of(arguments, causal).min() > 0.3
    expected = results(arguments, routing="compact", backend="reference", causal=causal)
    actual = results(arguments, **OPTIONS, causal=causal)
    assert expected["d log_reaches"].abs().max() > 0
    for name, part in actual.items():
        assert relative_error(part, expected[name]) <= TOLERANCE, name


def test_what_is_skipped_is_not_computed():
    """One slot of the four groups of four splats is enough for tokens that stay where they are."""
    arguments = clustered()
    for side in ("send", "receive"):
        arguments[f"{side}_positions"] = arguments[f"{side}_positions"][:, :7].repeat(1, 10, 1, 1)[:, :T]
    computed = []
    near_splats = slots_module.near_splats

    def watched(tokens, factors):
        computed.append(factors.shape[1])
        return near_splats(tokens, factors)

    with patch.object(slots_module, "near_splats", watched):
        attend(arguments, **OPTIONS)
    # of each sequence three blocks after the first chunk: 52 tokens in blocks of two chunks, and two tokens
    assert computed == [8] * (2 * 2 * 3 * 1)


def crowded(**kinds):
    """Splats all over a square, of which a token reaches a fifth, in several groups; tokens are in a corner of it."""
    arguments = make_arguments(B=B, T=T, H=H, M=112, P=2, routing="compact", dtype=torch.float32, **kinds)
    arguments["log_reaches"] = torch.full((H, 112), 0.9).log()
    everywhere = {name: arguments[name] for name in ("send_positions", "receive_positions")}
    return arguments | {name: 0.3 * part + 1.1 for name, part in everywhere.items()}, everywhere


@pytest.mark.parametrize("decay", [None, "head", "splat"])
def test_the_future_decides_what_is_computed_and_changes_no_bit(decay):
    """Later tokens stay in the corner or do not: then the past's groups are other slots among more, with the same bits.

    Groups have 14 splats, so that a sum over all that are gathered would be split otherwise, and differ.
    """
    arguments, everywhere = crowded(decay=decay, bias=True, transform=True)
    past = 47  # within a chunk, 39 to 51, of the second block
    moved = {name: torch.cat([arguments[name][:, :past], part[:, past:]], 1) for name, part in everywhere.items()}
    slots = []

    def watched(*parts, slots_of=reach_module.slots_of):
        slots.append(slots_of(*parts))
        return slots[-1]

    with patch.object(reach_module, "slots_of", watched):
        here, _ = attend(arguments, **OPTIONS)
        middle = len(slots)
        there, _ = attend({**arguments, **moved}, **OPTIONS)
    few, many = slots[1], slots[middle + 1]
    assert 1 < len(few) < len(many)
    assert not torch.equal(few[0].rows, many[0].rows)
    assert torch.equal(here[:, :past], there[:, :past])
    assert not torch.equal(here[:, past:], there[:, past:])


def test_what_one_sequence_needs_changes_no_bit_of_another():
    arguments, everywhere = crowded(gate="splat", bias=True)
    other = arguments | {name: torch.cat([arguments[name][:1], part[1:]]) for name, part in everywhere.items()}
    here, there = (results(case, **OPTIONS) for case in (arguments, other))
    for name in ("output", "mass", "total", "d values", "d send_positions", "d receive_positions", "d write_gate"):
        assert torch.equal(here[name][0], there[name][0]), name
        assert not torch.equal(here[name][1], there[name][1]), name


def test_a_bias_as_large_as_what_is_out_of_reach_is_far_is_heeded():
    """Some tokens are sent to a far splat, others are kept from all that are near."""
    arguments = clustered(bias=True)
    arguments["send_bias"][:, ::3, :, -1] = 2e30
    arguments["receive_bias"][:, ::5, :, : M // 2] = -torch.inf
    expected, expected_state = attend(arguments, routing="compact", backend="reference")
    output, state = attend(arguments, **OPTIONS)
    assert relative_error(output, expected) <= TOLERANCE
    assert relative_error(state.mass, expected_state.mass) <= TOLERANCE
    assert state.mass[..., -1].min() > T // 4


@pytest.mark.parametrize("cut", [1, 13, 29, 66])
def test_any_split_of_a_sequence_that_skips_equals_one_pass(cut):
    arguments = clustered(decay="splat", gate="head", state=True, bias=True)
    expected, expected_state = attend(arguments, **OPTIONS)
    shared = {name: part for name, part in arguments.items() if part.shape[:2] != (B, T)}
    tokens = {name: part for name, part in arguments.items() if name not in shared}
    first, state = attend({**shared, **{name: part[:, :cut] for name, part in tokens.items()}}, **OPTIONS)
    rest = {
        **shared,
        **{name: part[:, cut:] for name, part in tokens.items()},
        "mass": state.mass,
        "total": state.total,
    }
    second, last = attend(rest, **OPTIONS)
    assert relative_error(torch.cat([first, second], 1), expected) <= TOLERANCE
    assert relative_error(last.mass, expected_state.mass) <= TOLERANCE
    assert relative_error(last.total, expected_state.total) <= TOLERANCE


def test_packed_documents_that_skip_equal_the_reference():
    arguments = {name: part[:1] if part.shape[:2] == (B, T) else part for name, part in clustered(decay="head").items()}
    boundaries = torch.tensor([0, 29, 30, T])
    output, state = attend(arguments, **OPTIONS, cu_seqlens=boundaries)
    expected, expected_state = attend(arguments, routing="compact", backend="reference", cu_seqlens=boundaries)
    assert relative_error(output, expected) <= TOLERANCE
    assert relative_error(state.total, expected_state.total) <= TOLERANCE


def test_a_splat_that_is_skipped_forgets_like_the_others():
    arguments = clustered(decay="splat", state=True)
    arguments["log_decay"] = arguments["log_decay"].clamp(-1.0, -0.1)
    _, state = attend(arguments, **OPTIONS)
    kept = arguments["log_decay"].sum(1).exp()  # nobody comes near the last cluster
    last = slice(3 * M // 4, M)
    torch.testing.assert_close(state.mass[..., last], (kept * arguments["mass"])[..., last])


def test_lost_tokens_go_to_the_nearest_and_of_equals_to_the_first():
    centers = torch.tensor([0.0, 100.0, 100.0, 0.0]).view(1, 4, 1)
    splats = (centers, *(torch.zeros(1, 4) for _ in range(3)))
    arguments = dict(zip(("centers", "log_scales", "log_amplitudes", "log_reaches"), splats, strict=True))
    arguments |= {"send_positions": torch.full((1, 29, 1, 1), 95.0), "values": torch.ones(1, 29, 1, 1)}
    _, state = attend(arguments, **OPTIONS)
    assert state.mass.flatten().tolist() == [0.0, 29.0, 0.0, 0.0]


def test_the_share_by_hand():
    """Two groups, at 0 and at 100. The second head's tokens are near the first group, the first head's go over."""
    centers = torch.tensor([0.0, 1.0, 100.0, 101.0]).view(1, 4, 1).expand(2, 4, 1)
    splats = Splats(centers, *(torch.zeros(2, 4) for _ in range(3)))
    positions = torch.zeros(1, 13 * 5, 2, 1)
    positions[:, 13 * 4 + 2 :, 0] = 100.0
    # the first chunk skips nothing, then come a block of three chunks and one of a single chunk, where half is needed
    # but for the last, in which a head needs both
    with patch.multiple(reach_module, SHORTEST=0, FEWEST_SPLATS=0, LEAST_SKIPPED=0.5, CHUNK=13, BLOCK_ROWS=78):
        assert skipped_share(positions, positions, splats).item() == pytest.approx(0.5 * 3 / 5)
        # of those who send nobody has a chunk before; the first chunk of a block says whether it skips
        assert skipped_share(positions, positions[:, :13], splats, causal=False).item() == pytest.approx(0.5 * 4 / 6)


@pytest.mark.parametrize(("spread", "skips"), [(0.0, True), (8.0, False)])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_that_would_skip_little_are_left_to_chunked(spread, skips, causal):
    arguments = part_of(clustered(), slice(65))  # five chunks
    for side in ("send", "receive"):
        arguments[f"{side}_positions"] += spread * (torch.arange(65) % 4 - torch.arange(65) * 3 // T)[:, None, None]
    with (
        patch.multiple(reach_module, SHORTEST=0, FEWEST_SPLATS=0, CHUNK=13, BLOCK_ROWS=80),
        patch.object(reach_module, "slots_of", wraps=reach_module.slots_of) as slots_of,
    ):
        output, _ = attend(arguments, routing="compact", causal=causal)
    assert slots_of.called == skips
    expected, _ = attend(arguments, routing="compact", causal=causal, backend="reference")
    assert relative_error(output, expected) <= TOLERANCE
