"""One-hot routing to fixed centers is a hash table without chains: the formula, and the operator beside it."""

# H head, M splat, N pair

import pytest
import torch
from benchmarks.capacity import (
    axes,
    binomial_interval,
    cell_shares,
    chance_alone,
    chance_alone_in_cells,
    filler,
    is_alone,
    is_nearest,
    layer_scale,
    on_sphere,
    share_alone,
    store_and_ask,
)
from benchmarks.capacity import gaussians as gaussians_at

FILLINGS = 3001
WIDTH = 3  # of values, and of the sphere on which random centers have unequal cells

sizes = pytest.mark.parametrize(
    ("num_splats", "num_heads", "num_pairs"), [(6, 1, 5), (14, 1, 11), (14, 2, 13), (22, 3, 31), (62, 2, 37)]
)


@sizes
def test_splats_that_are_equally_likely_keep_the_formula(num_splats, num_heads, num_pairs):
    centers = axes(torch.Generator().manual_seed(1), num_heads, num_splats)
    measured = share_alone(filler(2, num_pairs, num_heads, num_splats // 2, WIDTH), centers, FILLINGS)
    low, high = binomial_interval(chance_alone(num_splats, num_heads, num_pairs), FILLINGS)
    assert low <= measured <= high
    assert high - low < 0.07  # so the test can fail


@pytest.mark.parametrize(("num_splats", "num_heads", "num_pairs"), [(17, 1, 13), (31, 1, 17), (61, 2, 37)])
def test_random_centers_collide_more_and_as_their_cells_say(num_splats, num_heads, num_pairs):
    centers = on_sphere(torch.Generator().manual_seed(3), num_heads, num_splats, WIDTH)
    measured = share_alone(filler(4, num_pairs, num_heads, WIDTH, WIDTH), centers, FILLINGS)
    low, high = binomial_interval(chance_alone_in_cells(cell_shares(centers, 5), num_pairs), FILLINGS)
    assert low <= measured <= high
    lowest, _ = binomial_interval(chance_alone(num_splats, num_heads, num_pairs), FILLINGS)
    assert measured < lowest


def test_unequal_cells_help_where_the_table_is_overfull():
    """p (1 - p)^(N-1) is convex for p > 2 / N: then small cells gain more than large ones lose."""
    equal, unequal = torch.full((1, 2), 0.5), torch.tensor([[0.1, 0.9]])
    assert chance_alone_in_cells(unequal, 3) < chance_alone_in_cells(equal, 3)
    assert chance_alone_in_cells(unequal, 31) > 1000 * chance_alone_in_cells(equal, 31)


def test_the_interval_is_that_of_a_few_coins():
    assert binomial_interval(0.5, 3, level=0.7) == (1 / 3, 2 / 3)  # each end has the chance 1/8 < 0.15
    assert binomial_interval(0.5, 3, level=0.8) == (0.0, 1.0)
    assert binomial_interval(1.0, 7) == (1.0, 1.0)


def test_heads_that_share_one_position_gain_less():
    """A neighbour in one head is then a likely neighbour in the next: the formula wants independent heads."""
    num_splats, num_heads, num_pairs = 6, 3, 7
    centers = axes(torch.Generator().manual_seed(1), num_heads, num_splats)
    fill = filler(2, num_pairs, num_heads, num_splats // 2, WIDTH, one_position=True)
    low, _ = binomial_interval(chance_alone(num_splats, num_heads, num_pairs), FILLINGS)
    assert share_alone(fill, centers, FILLINGS) < low


def test_soft_weights_find_pairs_that_are_not_alone():
    num_splats, num_heads, num_pairs, width = 17, 2, 31, 29
    centers = on_sphere(torch.Generator().manual_seed(6), num_heads, num_splats, width)
    positions, values = filler(7, num_pairs, num_heads, width, width)(1009)
    heard, _ = store_and_ask(positions, values, gaussians_at(centers, layer_scale(width)))
    assert not is_alone(heard, values).any()  # no splat holds one value only
    _, high = binomial_interval(chance_alone(num_splats, num_heads, num_pairs), 1009)
    assert is_nearest(heard, values).double().mean() > high
