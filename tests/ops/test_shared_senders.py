"""Heads that share a sending one are the same as heads of their own that are given the same, and cost less."""

import pytest
import torch
from cases import attend, every_backend, every_route, make_arguments, relative_error, results, skip_unless
from torch.utils._pytree import tree_leaves

from splatflow.ops import splat_attention

H, RECEIVERS = 2, 3
OF_RECEIVERS = ("receive_positions", "receive_bias")
KINDS = {"decay": "head", "gate": "splat", "state": True, "bias": True, "padding": True}


def of_receiver(arguments, number):
    """The call in which each sending head has one receiving head, this one of its own."""
    mine = {name: arguments[name][:, :, number::RECEIVERS] for name in OF_RECEIVERS if name in arguments}
    return {**arguments, **mine}


@every_backend
@every_route
@pytest.mark.parametrize("causal", [True, False])
def test_each_receiving_head_hears_what_it_would_alone(backend, route, causal):
    skip_unless(backend, route, "head" if causal else None)
    kinds = KINDS if causal else {**KINDS, "decay": None}
    arguments = make_arguments(T=71, H=H, receivers=RECEIVERS, routing=route["routing"], **kinds)
    together, state = attend(arguments, causal=causal, backend=backend, **route)
    assert list(together.shape) == [2, 71, H * RECEIVERS, 5]
    for number in range(RECEIVERS):
        alone, after = attend(of_receiver(arguments, number), causal=causal, backend=backend, **route)
        assert relative_error(together[:, :, number::RECEIVERS], alone) <= 1e-12
        assert relative_error(state.mass, after.mass) <= 1e-12
        assert relative_error(state.total, after.total) <= 1e-12


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_heads_of_their_own(causal):
    kinds = KINDS if causal else {**KINDS, "decay": None}
    arguments = make_arguments(T=131, H=H, receivers=RECEIVERS, **kinds)

    def one_by_one(arguments, **options):
        found = [attend(of_receiver(arguments, number), **options) for number in range(RECEIVERS)]
        return torch.stack([output for output, _ in found], 3).flatten(2, 3), found[0][1]

    expected = results(arguments, one_by_one, causal=causal, backend="reference")
    actual = results(arguments, causal=causal, backend="chunked")
    assert "d send_positions" in actual
    for name, part in actual.items():
        assert relative_error(part, expected[name]) <= 1e-12, name


def test_what_splats_hold_is_kept_once():
    tokens, heads, receivers, width = 8192, 2, 4, 8
    of_sender, of_receivers = (torch.zeros(1, tokens, count, width) for count in (heads, heads * receivers))
    splats = (torch.randn(heads, 64, width), torch.zeros(heads, 64), torch.zeros(heads, 64))
    shared = kept_states(of_sender.requires_grad_(), of_receivers, of_sender, splats)
    copies = tuple(part.repeat_interleave(receivers, 0) for part in splats)
    own = kept_states(of_receivers.clone().requires_grad_(), of_receivers, of_receivers, copies)
    assert 0 < receivers * shared <= own


def kept_states(send_positions, receive_positions, values, splats):
    """How many numbers are kept for the backward pass that are states, [B, heads, M, D]."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda part: kept.append(part) or part, lambda part: part):
        output, _ = splat_attention(send_positions, receive_positions, values, splats)
    assert all(isinstance(part, torch.Tensor) for part in tree_leaves(kept))
    states = [part for part in kept if part.ndim == 4 and part.shape[2] == 64]
    assert output.requires_grad
    return sum(part.numel() for part in states)


@pytest.mark.parametrize("receiving", [1, 3, 0])
def test_heads_that_cannot_be_shared_out_are_refused(receiving):
    arguments = make_arguments(H=2)
    arguments["receive_positions"] = arguments["receive_positions"][:, :, :1].repeat(1, 1, receiving, 1)
    with pytest.raises(ValueError, match=f"receive_positions has {receiving} heads, values has 2"):
        attend(arguments)
