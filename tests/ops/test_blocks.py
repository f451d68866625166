"""Blocks that are computed again in the backward pass, and gradients that are written down."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
from cases import attend, make_arguments, relative_error, results
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import splatflow.ops.chunked as chunked_module
from splatflow.diagnostics import peak_memory
from splatflow.ops.gradients import with_gradient

every_kind = pytest.mark.parametrize(
    ("causal", "decay"), [(False, None), (True, None), (True, "head"), (True, "splat")]
)


@pytest.fixture(autouse=True)
def _small_blocks():
    with patch.object(chunked_module, "BLOCK_ROWS", 1):
        yield


def weighed(arguments, backend="chunked", of=("output", "mass", "total"), **options):
    """One number made of the output and the state."""
    output, (mass, total) = attend(arguments, backend=backend, **options)
    parts = {"output": output, "mass": mass, "total": total}
    return sum(
        (part * torch.arange(part.numel(), dtype=part.dtype).sin().view(part.shape)).sum()
        for name, part in parts.items()
        if name in of
    )


def arguments_of(decay, dtype=torch.float64):
    return make_arguments(B=1, T=131, H=1, M=5, P=3, D=2, decay=decay, gate="head", state=True, dtype=dtype)


def leaves_of(arguments):
    return {name: part.detach().clone().requires_grad_() for name, part in arguments.items()}


@every_kind
@pytest.mark.parametrize("of", ["output", "mass", "total"])
def test_output_and_state_have_gradients_each_by_itself(causal, decay, of):
    found = []
    for backend in ("chunked", "reference"):
        leaves = leaves_of(arguments_of(decay))
        number = weighed(leaves, backend, (of,), causal=causal)
        found.append(torch.autograd.grad(number, [*leaves.values()], materialize_grads=True))
    for name, ours, expected in zip(leaves, *found, strict=True):
        assert relative_error(ours, expected) < 1e-12, name


@every_kind
def test_gradients_have_gradients(causal, decay):
    found = []
    for backend in ("chunked", "reference"):
        leaves = leaves_of(arguments_of(decay))
        first = torch.autograd.grad(
            weighed(leaves, backend, causal=causal), [*leaves.values()], create_graph=True, materialize_grads=True
        )
        number = sum(part.square().sum() for part in first)
        found.append(torch.autograd.grad(number, [*leaves.values()], materialize_grads=True))
    for name, ours, expected in zip(leaves, *found, strict=True):
        assert relative_error(ours, expected) < 1e-10, name


def test_a_tensor_that_is_made_of_another_one_has_a_gradient_of_its_own_in_both_orders():
    """The second derivative may not go from one argument to the next behind the operator."""
    found = []
    for backend in ("chunked", "reference"):
        leaves = leaves_of(arguments_of(None))
        send = leaves["send_positions"]
        number = weighed({**leaves, "receive_positions": send.sin()}, backend)
        (first,) = torch.autograd.grad(number, send, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), send)[0])
    assert relative_error(*found) < 1e-10


@every_kind
def test_functional_transforms_see_through_it(causal, decay):
    arguments = arguments_of(decay)

    def number(values):
        return weighed({**arguments, "values": values}, causal=causal)

    values = arguments["values"]
    leaf = values.clone().requires_grad_()
    (expected,) = torch.autograd.grad(number(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(number)(values), expected)
    direction = torch.randn_like(values)
    along = (expected * direction).sum()
    torch.testing.assert_close(torch.func.jvp(number, (values,), (direction,))[1], along)
    with forward_ad.dual_level():
        dual = number(forward_ad.make_dual(values, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, along)
    both = torch.stack([values, 2 * values])
    torch.testing.assert_close(torch.func.vmap(number)(both), torch.stack([number(one) for one in both]))


@every_kind
def test_a_checkpoint_around_it_changes_no_number(causal, decay):
    arguments = arguments_of(decay)
    found = []
    for wrap in (lambda call, given: call(given), partial(checkpoint, use_reentrant=False)):
        leaves = leaves_of(arguments)
        number = wrap(partial(weighed, causal=causal), leaves)
        found.append(torch.autograd.grad(number, [*leaves.values()], materialize_grads=True))
    assert all(map(torch.equal, *found))


@every_kind
def test_many_sequences_are_worked_on_some_at_a_time(causal, decay):
    arguments = make_arguments(B=7, T=67, H=2, M=5, P=3, D=2, decay=decay, state=True)
    with patch.object(chunked_module, "_by_blocks", wraps=chunked_module._by_blocks) as by_blocks:
        found = results(arguments, causal=causal, backend="chunked")
    assert [call.args[0].values.shape[0] for call in by_blocks.call_args_list] == [1] * 7
    for name, expected in results(arguments, causal=causal, backend="reference").items():
        assert relative_error(found[name], expected) < 1e-12, name


def test_tied_positions_stay_tied_when_sequences_are_parted():
    arguments = make_arguments(B=3, T=67, H=1, M=5, P=3, D=2, tied=True)
    with patch.object(chunked_module, "_by_blocks", wraps=chunked_module._by_blocks) as by_blocks:
        attend(arguments, backend="chunked")
    assert [call.args[0].positions is call.args[1].positions for call in by_blocks.call_args_list] == [True] * 3


@pytest.mark.parametrize("causal", [True, False])
def test_without_gradients_only_one_state_is_kept(causal):
    def bytes_beside_output(length):
        arguments = make_arguments(B=1, T=length, H=1, M=61, P=3, D=97, dtype=torch.float32)
        return peak_memory(lambda: attend(arguments, backend="chunked", causal=causal)) - length * 97 * 4

    assert bytes_beside_output(8192) < 1.02 * bytes_beside_output(2048)


@every_kind
def test_many_gradients_at_once(causal, decay):
    arguments = arguments_of(decay)
    values = arguments["values"].clone().requires_grad_()
    output, _ = attend({**arguments, "values": values}, backend="chunked", causal=causal)
    directions = torch.stack([torch.ones_like(output), torch.arange(output.numel()).sin().view_as(output)])
    (together,) = torch.autograd.grad(output, values, directions, is_grads_batched=True, retain_graph=True)
    for direction, found in zip(directions, together, strict=True):
        torch.testing.assert_close(found, torch.autograd.grad(output, values, direction, retain_graph=True)[0])


def test_a_backward_pass_within_autocast_is_as_exact():
    found = []
    for enabled in (False, True):
        leaves = leaves_of(arguments_of("head", torch.float32))
        number = weighed(leaves)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(number, [*leaves.values()]))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("weakest", [-0.1, -5.0, -10.0])
def test_the_gradient_by_a_decay_is_exact_however_little_is_left(weakest):
    arguments = arguments_of("head")
    draws = torch.rand(arguments["log_decay"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    arguments["log_decay"] = weakest * (1 + draws)
    found = []
    for backend, dtype in (("reference", torch.float64), ("reference", torch.float32), ("chunked", torch.float32)):
        leaves = {name: part.detach().to(dtype).requires_grad_() for name, part in arguments.items()}
        found.append(torch.autograd.grad(weighed(leaves, backend, ("output",)), leaves["log_decay"])[0])
    exact, plain, ours = found
    assert relative_error(ours, exact, unit=0) < 2 * relative_error(plain, exact, unit=0) + 1e-7


def test_where_all_is_forgotten_a_decay_has_no_gradient():
    arguments = arguments_of("head")
    arguments["log_decay"] = torch.full_like(arguments["log_decay"], -torch.inf).requires_grad_()
    assert torch.autograd.grad(weighed(arguments, of=("output",)), arguments["log_decay"])[0].abs().max() == 0


@pytest.mark.parametrize("decay", [None, "head"])
def test_a_huge_value_to_come_does_not_reach_the_gradients_of_the_past(decay):
    found = []
    for value in (0.0, 3e38):
        leaves = leaves_of(make_arguments(B=1, T=191, H=1, M=5, P=3, D=2, decay=decay, dtype=torch.float32))
        with torch.no_grad():
            leaves["values"][:, 150:] = value
        output, _ = attend(leaves, backend="chunked")
        places = (leaves["send_positions"], leaves["receive_positions"])
        found.append([part[:, :150] for part in torch.autograd.grad(output[:, :150].sum(), places)])
    assert all(map(torch.equal, *found))


def test_what_all_blocks_share_is_summed_in_a_type_that_is_wide_enough():
    """In bf16 a sum of many small terms ends when it is 256 times as large as they are."""
    arguments = make_arguments(B=1, T=64 * 700, H=1, M=1, P=1, D=1, dtype=torch.bfloat16)
    arguments["send_positions"].fill_(1.0)
    arguments["receive_positions"].fill_(1.0)
    arguments["values"].fill_(1.0)
    arguments["log_amplitudes"].requires_grad_()
    options = {"backend": "chunked", "routing": "gaussian", "causal": False}
    output, _ = attend(arguments, **options)
    (found,) = torch.autograd.grad(output.sum(), arguments["log_amplitudes"])
    (expected,) = torch.autograd.grad(
        attend({name: part.float() for name, part in arguments.items()}, **options)[0].sum(),
        arguments["log_amplitudes"],
    )
    assert relative_error(found, expected) < 1e-2


def test_a_written_gradient_is_the_one_that_is_taken_and_only_for_first_derivatives():
    square = with_gradient(torch.square, lambda d_output, x: (7.0 * d_output * x,))
    x = torch.tensor(3.0, requires_grad=True)
    assert torch.autograd.grad(square(x), x)[0] == 21.0
    (first,) = torch.autograd.grad(square(x), x, create_graph=True)
    assert (first, torch.autograd.grad(first, x)[0]) == (6.0, 2.0)
    assert torch.func.grad(square)(x) == 6.0
    assert torch.jit.trace(square, torch.tensor(3.0, requires_grad=True))(torch.tensor(5.0)) == 25.0
