"""What M splats can hold: rank M for every value channel, so many numbers in all, so many bits."""

# N pair, H head, M splat, P position width, D value width

import pytest
import torch
from benchmarks.capacity import pairs_by_bits
from torch import Tensor

from splatflow.nn import SplatAttention
from splatflow.ops import Splats, splat_attention

M, P, D = 7, 5, 3


def state_of_values(num_pairs, values, *, kind, routing):
    """The totals [M, D] after `num_pairs` tokens, whose positions, gates and decays do not depend on the values."""
    generator = torch.Generator().manual_seed(num_pairs)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    splats = Splats(normal(1, M, P), 0.1 * normal(1, M), 0.1 * normal(1, M))
    factors = {
        "plain": {},
        "decay": {"log_decay": -0.1 * normal(1, num_pairs, 1, M).abs()},
        "write_gate": {"write_gate": normal(1, num_pairs, 1, M).sigmoid()},
    }[kind]
    positions = normal(1, num_pairs, 1, P)
    _, state = splat_attention(positions, positions, values[None, :, None], splats, routing=routing, **factors)
    return state.total[0, 0]


def tensors_of(state):
    return [state] if isinstance(state, Tensor) else [part for field in state if field is not None for part in field]


@pytest.mark.parametrize("routing", ["mixture", "gaussian"])
@pytest.mark.parametrize("kind", ["plain", "decay", "write_gate"])
@pytest.mark.parametrize("num_pairs", [5, 7, 11, 23])
def test_no_linear_reader_returns_more_values_a_channel_than_there_are_splats(num_pairs, kind, routing):
    """The map from the N values of a channel to its M totals, and the best linear map back."""
    forward = state_of_values(num_pairs, torch.eye(num_pairs, dtype=torch.float64), kind=kind, routing=routing).double()
    assert torch.linalg.matrix_rank(forward, rtol=1e-11) == min(num_pairs, M)
    lost = torch.eye(num_pairs, dtype=torch.float64) - torch.linalg.pinv(forward, rtol=1e-11) @ forward
    # squared error of a reader that knows all keys, summed over N values of variance 1
    assert lost.square().sum().item() == pytest.approx(max(0, num_pairs - M), abs=1e-6)


@pytest.mark.parametrize("routing", ["mixture", "gaussian"])
def test_values_that_differ_where_the_state_is_blind_are_one_to_every_reader(routing):
    """N D > M D numbers: some direction of the values changes no total, hence nothing that any later token hears."""
    num_pairs = 11
    options = {"kind": "plain", "routing": routing}
    forward = state_of_values(num_pairs, torch.eye(num_pairs, dtype=torch.float64), **options)
    blind = torch.linalg.svd(forward, full_matrices=True).Vh[M:]  # [N - M, N]
    values = torch.randn(num_pairs, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    others = values + blind.T @ torch.ones(len(blind), D, dtype=torch.float64)
    assert (others - values).norm() > 3
    here, there = (state_of_values(num_pairs, each, **options) for each in (values, others))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window_size", [0, 13])
def test_a_layer_remembers_so_many_numbers_and_no_more(window_size):
    H, head_dim, position_dim = 3, 11, 4
    layer = SplatAttention(H * head_dim, H, M, window_size=window_size, position_dim=position_dim)
    for length in (1, 17, 101):
        _, state = layer(torch.randn(1, length, H * head_dim))
        remembered = sum(part.numel() for part in state.splats)
        assert remembered == H * (M * head_dim + M)
        if window_size:
            tokens = state.window.send_positions.numel() + state.window.values.numel()
            assert tokens == window_size * H * (position_dim + head_dim)


def test_bits_are_counted_as_they_should_be():
    assert pairs_by_bits(3, 32, 2) == 96
    assert pairs_by_bits(16 * 33, 32, 256) == 2112
