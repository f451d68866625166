"""Memory is linear in the sequence: nothing of size T x T, T x M x D or T x M x P, forward and backward."""

from functools import cache
from unittest.mock import patch

import pytest
import torch
from cases import attend, make_arguments, results
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import splatflow.ops.chunked as chunked_module
import splatflow.ops.sparse as sparse_module
from splatflow.diagnostics import peak_memory

M, P, D = 61, 131, 251  # M x P and M x D are many times the numbers that a token needs
FLOAT = 4
LENGTHS = (1024, 2048, 4096, 8192, 16384)

every_kind = pytest.mark.parametrize(
    ("causal", "decay"), [(False, None), (True, None), (True, "head"), (True, "splat")]
)


def small_blocks():
    """So that every length has several blocks."""
    return patch.object(chunked_module, "BLOCK_ROWS", 512)


@cache
def bytes_per_token(length, causal, decay, planted=None):
    """Peak of forward and backward. `planted` is done beside them."""
    arguments = make_arguments(B=1, T=length, H=1, M=M, P=P, D=D, decay=decay, dtype=torch.float32)

    def forward_and_backward():
        extra = None if planted is None else planted(arguments)
        return results(arguments, causal=causal, backend="chunked"), extra

    with small_blocks():
        return peak_memory(forward_and_backward) / length


def is_linear(lengths, **kinds):
    """Bytes a token do not grow, beyond what is rounding to whole chunks and blocks."""
    first, last = (bytes_per_token(length, **kinds) for length in (lengths[0], lengths[-1]))
    return last <= 1.1 * first


@every_kind
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


@pytest.mark.parametrize("decay", [None, "head", "splat"])
def test_memory_is_little_more_than_the_output_and_the_gradients(decay):
    """Output, its gradient, and those by two positions, values and decays; a block is small beside 16,384 tokens."""
    numbers = 2 * D + 2 * P + D + {None: 0, "head": 1, "splat": M}[decay]
    assert bytes_per_token(LENGTHS[-1], True, decay) < 1.4 * numbers * FLOAT


class Allocated(TorchDispatchMode):
    """Counts the numbers of all tensors that come into being, kept or not: a bound on the time that it takes."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        views = function.is_view or function._schema.is_mutable
        self.numbers += (
            0 if views else sum(part.numel() for part in tree_leaves(made) if isinstance(part, torch.Tensor))
        )
        return made


@pytest.mark.parametrize(("backend", "top_p"), [("chunked", None), ("sparse", 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_what_is_computed_in_the_backward_pass_is_linear_in_the_length(backend, top_p, causal):
    def numbers_per_token(length):
        arguments = make_arguments(B=1, T=length, H=1, M=7, bias=True, dtype=torch.float32)
        with (
            patch.object(chunked_module, "BLOCK_ROWS", 64),
            patch.object(sparse_module, "BLOCK_TOKENS", 64),
            Allocated() as allocated,
        ):
            results(arguments, causal=causal, backend=backend, top_p=top_p)
        return allocated.numbers / length

    assert numbers_per_token(2048) <= 1.1 * numbers_per_token(512)


def kept_bytes(arguments, **options):
    """Bytes that autograd keeps from the forward for the backward pass, besides the arguments."""
    leaves = {name: part.detach().requires_grad_(part.is_floating_point()) for name, part in arguments.items()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with small_blocks(), saved_tensors_hooks(keep, lambda tensor: tensor):
        results = attend(leaves, backend="chunked", **options)
    for part in leaves.values():
        kept.pop(part.untyped_storage().data_ptr(), None)
    assert results[0].requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@every_kind
def test_of_a_block_only_the_state_before_it_is_kept(causal, decay):
    num_blocks, state = 8, (M + M * D) * FLOAT
    sizes = {"B": 1, "T": 512 * num_blocks, "H": 1, "M": M, "P": P, "D": D}
    arguments = make_arguments(**sizes, decay=decay, state=True, dtype=torch.float32)
    assert 0 < kept_bytes(arguments, causal=causal) <= (num_blocks + 2) * state
