"""M splats a head: what passes through them has rank exactly M, where softmax attention has full rank."""

# T token, H head, M splat, P position width

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from splatflow.ops import Splats, splat_attention

P = 5
CUTOFF = 1e-11  # singular values below this share of the largest are rounding, in fp64

SIZES = {
    "seed": st.integers(0, 10_000),
    "length": st.sampled_from((11, 17, 23, 31)),
    "num_splats": st.sampled_from((1, 2, 3, 5, 7)),
    "num_heads": st.sampled_from((1, 3)),
}


def random_positions(generator, *shape):
    return F.rms_norm(torch.randn(*shape, P, generator=generator, dtype=torch.float64), (P,))


def token_matrices(seed, length, num_splats, num_heads, *, causal, routing):
    """[H, T, T], what each token hears of each other, by values that are one-hot."""
    generator = torch.Generator().manual_seed(seed)
    scales = 0.1 * torch.randn(num_heads, num_splats, generator=generator, dtype=torch.float64)
    splats = Splats(random_positions(generator, num_heads, num_splats), scales, -scales)
    send, receive = (random_positions(generator, 1, length, num_heads) for _ in range(2))
    whose = torch.eye(length, dtype=torch.float64)[None, :, None].expand(1, -1, num_heads, -1)
    output, _ = splat_attention(send, receive, whose, splats, causal=causal, routing=routing)
    return output[0].transpose(0, 1)


def ranks(matrices):
    return set(torch.linalg.matrix_rank(matrices, rtol=CUTOFF).tolist())


@pytest.mark.parametrize("routing", ["mixture", "gaussian"])
@settings(max_examples=30)
@given(**SIZES)
def test_the_bidirectional_matrix_has_rank_exactly_the_number_of_splats(routing, num_splats, **sizes):
    assert ranks(token_matrices(num_splats=num_splats, causal=False, routing=routing, **sizes)) == {num_splats}


@pytest.mark.parametrize("routing", ["mixture", "gaussian"])
@settings(max_examples=30)
@given(**SIZES)
def test_every_block_below_the_causal_diagonal_has_the_largest_rank_that_splats_allow(
    routing, length, num_splats, **sizes
):
    matrices = token_matrices(length=length, num_splats=num_splats, causal=True, routing=routing, **sizes)
    for cut in range(1, length):
        assert ranks(matrices[:, cut:, :cut]) == {min(num_splats, cut, length - cut)}


@settings(max_examples=30)
@given(seed=SIZES["seed"], length=SIZES["length"], num_heads=SIZES["num_heads"])
def test_the_same_blocks_of_softmax_attention_have_full_rank(seed, length, num_heads):
    # wide queries: scores of a few dimensions have full rank too, but with singular values below the rounding
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randn(num_heads, length, 37, generator=generator, dtype=torch.float64) for _ in range(2))
    whose = torch.eye(length, dtype=torch.float64).expand(num_heads, -1, -1)
    assert ranks(F.scaled_dot_product_attention(queries, keys, whose)) == {length}
    matrices = F.scaled_dot_product_attention(queries, keys, whose, is_causal=True)
    for cut in range(1, length):
        assert ranks(matrices[:, cut:, :cut]) == {min(cut, length - cut)}
