"""Memory is linear in the sequence: nothing of size T x T, T x M x D or T x M x P, forward and backward."""

from functools import cache
from unittest.mock import patch

import pytest
import torch
from cases import make_arguments, results

import splatflow.ops.chunked as chunked_module
from splatflow.diagnostics import peak_memory

M, P, D = 61, 131, 251  # M x P and M x D are many times the numbers that a token needs
FLOAT = 4
LENGTHS = (1024, 2048, 4096, 8192, 16384)


@cache
def bytes_per_token(length, causal, decay, planted=None):
    """Peak of forward and backward. `planted` is done beside them."""
    arguments = make_arguments(B=1, T=length, H=1, M=M, P=P, D=D, decay=decay, dtype=torch.float32)

    def forward_and_backward():
        extra = None if planted is None else planted(arguments)
        return results(arguments, causal=causal, backend="chunked"), extra

    with patch.object(chunked_module, "BLOCK_ROWS", 512):  # so that every length has several blocks
        return peak_memory(forward_and_backward) / length


def is_linear(lengths, **kinds):
    """Bytes a token do not grow, beyond what is rounding to whole chunks and blocks."""
    first, last = (bytes_per_token(length, **kinds) for length in (lengths[0], lengths[-1]))
    return last <= 1.1 * first


@pytest.mark.parametrize(("causal", "decay"), [(False, None), (True, None), (True, "head"), (True, "splat")])
def test_memory_is_linear_in_the_length(causal, decay):
    kinds = {"causal": causal, "decay": decay}
    assert is_linear(LENGTHS[2:], **kinds)
    for length in LENGTHS:
        assert bytes_per_token(length, **kinds) < M * P * FLOAT < M * D * FLOAT


def test_the_measure_sees_a_product_of_all_tokens_with_all_tokens():
    def every_pair(arguments):
        positions = arguments["send_positions"][0, :, 0]
        return positions @ positions.T

    assert not is_linear(LENGTHS[:3], causal=False, decay=None, planted=every_pair)
