"""The rivals as layers: causal, learnable, and remembering what they say they remember."""

import pytest
import torch
from benchmarks.rivals import RIVALS, operators
from definitions import DEFINITIONS
from torch import nn

C, H, SIZE = 22, 2, 3
every_rival = pytest.mark.parametrize("name", RIVALS)


def layer(name, **options):
    torch.manual_seed(0)
    return RIVALS[name](C, H, SIZE, **options).eval()


@every_rival
def test_the_future_changes_no_bit_of_the_past(name):
    rival = layer(name, conv_size=4, head_norm=True, output_gate=True)
    hidden = torch.randn(2, 71, C)
    other = torch.cat([hidden[:, :67], torch.randn(2, 4, C)], 1)
    before, after = rival(hidden)[0], rival(other)[0]
    assert before.shape == hidden.shape
    assert torch.equal(before[:, :67], after[:, :67])
    assert not torch.equal(before[:, 67:], after[:, 67:])


@every_rival
def test_every_parameter_learns(name):
    rival = layer(name, conv_size=4, head_norm=True, output_gate=True)
    rival(torch.randn(2, 13, C))[0].square().sum().backward()
    for parameter_name, parameter in rival.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@every_rival
def test_the_state_has_the_size_that_is_said(name, monkeypatch):
    """The operator that a layer calls is replaced by its definition, whose memory is then counted."""
    remembered = []

    def defined(operator):
        def call(*tensors):
            output, memory = DEFINITIONS[operator](*tensors)
            parts = memory if isinstance(memory, tuple) else (memory,)
            remembered.append(sum(part[0].numel() for part in parts))
            return output

        return call

    rival = layer(name, conv_size=4)
    hidden = torch.randn(2, 9, C)
    expected = rival(hidden)[0]
    for operator in DEFINITIONS:
        monkeypatch.setattr(operators, operator, defined(operator))
    torch.testing.assert_close(rival(hidden)[0], expected)
    convolution = 3 * rival.convolution.weight.shape[1]
    extra = {
        "ABC": H * SIZE,  # its running normaliser, which the operator does not see
        "Based": -H * (C // H + 1) * (SIZE * (SIZE - 1) // 2),  # the definition keeps both halves of the square
    }
    assert rival.state_size == remembered[0] + extra.get(name, 0) + convolution


@every_rival
def test_an_outer_model_may_set_all_linear_weights_first(name):
    """`reset_parameters` gives every other parameter its initial value again."""
    rival, fresh = layer(name), layer(name)
    own = [key for key, part in rival.named_parameters(recurse=True) if "proj" not in key or key.endswith("bias")]
    with torch.no_grad():
        for key in own:
            rival.get_parameter(key).add_(1.0)
    for module in rival.modules():
        if isinstance(module, nn.RMSNorm):
            module.reset_parameters()
    rival.reset_parameters()
    assert all(torch.equal(rival.get_parameter(key), fresh.get_parameter(key)) for key in own)


def test_raven_chooses_half_of_its_slots_and_tries_others_while_training():
    raven = layer("Raven")
    hidden = torch.randn(2, 50, C)
    shares = raven.route(hidden)
    assert ((shares > 0).sum(-1) == raven.num_chosen).all()
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 50, H))
    assert torch.equal(raven.route(hidden), shares)
    raven.train()
    assert not torch.equal(raven.route(hidden) > 0, raven.route(hidden) > 0)


def test_abc_keeps_means():
    """Slots that all take the same value say that value, however long."""
    abc = layer("ABC")
    with torch.no_grad():
        abc.value_proj.weight.zero_()
    hidden = torch.randn(1, 40, C)
    values = torch.ones(1, 40, H, C // H)
    queries, keys = torch.randn(2, 1, 40, H, C // H).unbind()
    torch.testing.assert_close(abc.mix(queries, keys, values, hidden), values)


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_wrong_size_is_refused(size):
    with pytest.raises((TypeError, ValueError), match="size is"):
        RIVALS["GLA"](C, H, size)
