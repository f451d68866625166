"""The window against softmax attention with a dense mask and rotations written out."""

import math

import pytest
import torch

from splatflow.nn import SoftmaxAttention
from splatflow.ops.window import MIN_BLOCK, rotate, window_attention

B, H, P, D = 2, 3, 4, 5


def random(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(queries, keys, values, real):
    """Every query against every key, as complex numbers: a rotation is a product with exp(i angle)."""
    num_targets, num_sources = queries.shape[1], keys.shape[1]
    window_size = num_sources - num_targets
    frequency = 10000.0 ** (-torch.arange(0, P, 2, dtype=torch.float64) / P)

    def turned(vectors, places):
        angle = places[:, None, None] * frequency
        return torch.complex(*vectors.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)

    target, source = torch.arange(num_targets) + window_size, torch.arange(num_sources)
    scores = torch.einsum("BTHP,BSHP->BHTS", turned(queries, target), turned(keys, source).conj()).real / math.sqrt(P)
    distance = target[:, None] - source
    heard = (distance >= 0) & (distance < window_size) & real[:, None, None] | (distance == 0)
    return torch.einsum("BHTS,BSHD->BTHD", scores.masked_fill(~heard, -torch.inf).softmax(-1), values)


@pytest.mark.parametrize("window_size", [1, 7, MIN_BLOCK, 41])
@pytest.mark.parametrize("length", [0, 1, 5, MIN_BLOCK - 1, MIN_BLOCK, MIN_BLOCK + 1, 101])
def test_window_equals_a_dense_mask(window_size, length):
    queries = random(B, length, H, P, seed=1)
    keys = random(B, window_size + length, H, P, seed=2)
    values = random(B, window_size + length, H, D, seed=3)
    real = random(B, window_size + length, seed=4) < 0.7
    actual = window_attention(queries, keys, values, real)
    torch.testing.assert_close(actual, dense(queries, keys, values, real), rtol=0, atol=1e-12)


def test_rotated_products_depend_on_the_distance_alone():
    vector, other = random(1, 1, P, seed=1).expand(9, 1, P), random(1, 1, P, seed=2).expand(9, 1, P)
    for start in (0, 1000):
        products = (rotate(vector, start) * rotate(other, start + 3)).sum(-1)
        torch.testing.assert_close(products, products[:1].expand_as(products))


def test_a_window_as_long_as_the_sequence_hears_all():
    torch.manual_seed(0)
    whole = SoftmaxAttention(24, 2).double()
    window = SoftmaxAttention(24, 2, window_size=37).double()
    window.load_state_dict(whole.state_dict())
    tokens = random(B, 37, 24, seed=1)
    torch.testing.assert_close(window(tokens)[0], whole(tokens)[0], rtol=0, atol=1e-10)
