"""The parallel forms of the rivals are what their formulas say: outputs and gradients, causal, at any decay."""

import doctest

import pytest
import torch
import torch.nn.functional as F
from benchmarks.rivals import operators
from definitions import DEFINITIONS
from hypothesis import given, settings
from hypothesis import strategies as st

B, H, P, D, M = 2, 3, 5, 7, 11
LENGTHS = (1, 2, 7, 63, 64, 65, 129)
every_operator = pytest.mark.parametrize("name", DEFINITIONS)


def arguments(name, seed, length, decay, dtype):
    """What a layer would give; decays from none at all to all that was."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*width):
        return torch.randn(B, length, H, *width, generator=generator, dtype=torch.float64)

    def log_decay(*width):
        drawn = torch.rand(B, length, H, *width, generator=generator, dtype=torch.float64)
        return {"none": 0.0, "weak": -0.05, "strong": -30.0, "mixed": -3.0}[decay] * drawn.where(drawn > 0.3, 0.0)

    keys = normal(P)
    rest = {
        "gated_linear_attention": lambda: [log_decay(P)],
        "gated_delta_rule": lambda: [log_decay(), normal().sigmoid()],
        "slot_attention": lambda: [normal(M).sigmoid(), log_decay(M)],
    }.get(name, list)()
    queries = normal(P)
    if name == "gated_delta_rule":
        keys = F.normalize(keys, dim=-1)
    if name == "based":  # as in a layer: features are squares
        queries, keys = queries / P**0.25, keys / P**0.25
    return [part.to(dtype).requires_grad_() for part in (queries, keys, normal(D), *rest)]


def with_gradients(function, tensors, weights):
    output = function(*tensors)
    output = output[0] if isinstance(output, tuple) else output
    gradients = torch.autograd.grad((output * weights).sum(), tensors, allow_unused=True)
    return [output, *(torch.zeros(1) if part is None else part for part in gradients)]


@every_operator
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    length=st.sampled_from(LENGTHS),
    decay=st.sampled_from(["none", "weak", "strong", "mixed"]),
)
def test_it_equals_its_definition(name, seed, length, decay):
    weights = torch.randn(B, length, H, D, dtype=torch.float64)
    tensors = arguments(name, seed, length, decay, torch.float64)
    wanted = with_gradients(DEFINITIONS[name], tensors, weights)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        tensors = arguments(name, seed, length, decay, dtype)
        given = with_gradients(getattr(operators, name), tensors, weights.to(dtype))
        for mine, other in zip(given, wanted, strict=True):
            assert (mine - other).abs().max() <= tolerance * (1 + other.abs().max()), dtype


@every_operator
@pytest.mark.parametrize("length", [65, 129])
def test_the_future_changes_no_bit_of_the_past(name, length):
    tensors = [part.detach() for part in arguments(name, 0, length, "weak", torch.float32)]
    before = getattr(operators, name)(*tensors)
    for cut in (1, 40, 64):
        other = [part.detach() for part in arguments(name, 1, length, "weak", torch.float32)]
        mixed = [torch.cat([old[:, :cut], new[:, cut:]], 1) for old, new in zip(tensors, other, strict=True)]
        after = getattr(operators, name)(*mixed)
        assert torch.equal(before[:, :cut], after[:, :cut])
        assert not torch.equal(before[:, cut:], after[:, cut:])


def test_examples_in_docstrings():
    results = doctest.testmod(operators)
    assert results.attempted
    assert not results.failed
