"""Usage counts what real tokens send, of every layer, and changes nothing."""

import pytest
import torch

from splatflow.models import SplatFlowConfig, SplatFlowForCausalLM
from splatflow.nn import SplatAttention, dead_fraction, effective_num_splats, usage
from splatflow.ops.routing import route

B, T, C, H, M = 3, 23, 24, 2, 5


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("num_heads", "senders"), [(H, None), (3 * H, H)])
def test_usage_is_the_mean_share_of_what_real_tokens_send(num_heads, senders, biased):
    options = {"num_key_value_heads": senders, "routing_bias": biased, "conv_size": 3, "window_size": 4}
    layer, tokens = SplatAttention(C, num_heads, M, **options), torch.randn(B, T, C)
    mask = torch.ones(B, T, dtype=torch.bool).index_fill(1, torch.arange(4), False)
    shares = usage(layer, {"hidden_states": tokens, "attention_mask": mask})[""]
    positions = layer.projections(tokens.masked_fill(~mask[..., None], 0.0))[0]
    expected = route(positions, layer.splats, "mixture")[mask].mean(0)
    torch.testing.assert_close(shares, expected)
    torch.testing.assert_close(shares.sum(-1), torch.ones(H))


def test_plain_sums_have_shares_too_and_none_where_all_underflows():
    layer = SplatAttention(C, H, M, routing="gaussian")
    torch.testing.assert_close(usage(layer, torch.randn(B, T, C))[""].sum(-1), torch.ones(H))
    layer.log_scales.data.fill_(-9.0)
    assert not usage(layer, torch.randn(B, T, C))[""].any()


def test_measuring_leaves_a_model_as_it_was():
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_splats": 5}
    model, tokens = SplatFlowForCausalLM(SplatFlowConfig(**sizes)).train(), torch.randint(257, (B, T))
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chance = torch.get_rng_state()
    shares = usage(model, tokens)
    assert list(shares) == ["model.layers.0.mixer", "model.layers.1.mixer"]
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("shares", "effective", "dead"),
    [
        ([0.2] * 5, 5.0, 0.0),
        ([1.0, 0.0, 0.0, 0.0, 0.0], 1.0, 0.8),
        ([0.499, 0.499, 0.0021, 0.0019, 0.0], None, 0.4),  # 1 % of 1 / 5 is 0.002
    ],
)
def test_health_of_known_shares(shares, effective, dead):
    assert dead_fraction(torch.tensor(shares)).item() == pytest.approx(dead)
    if effective is not None:
        assert effective_num_splats(torch.tensor(shares)).item() == pytest.approx(effective, rel=1e-5)
