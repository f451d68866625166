"""A model with fewer splats: the busiest are kept, the idle are not missed, and the search finds how few will do."""

import pytest
import torch

from splatflow.models import SplatFlowConfig, SplatFlowForCausalLM
from splatflow.nn import SplatAttention, fewest_splats, keep_splats, usage

B, T, C, H, M, K = 2, 23, 12, 3, 7, 5
LAYERS = {
    "plain": {},
    "everything": {"decay": "splat", "write_gate": True, "routing_bias": True, "window_size": 4},
    "nearest": {"top_p": 2, "decay": "head", "write_gate": True},
    "hops": {"hops": 1},
    "linear": {"transform": "linear", "window_size": 4},
    "lagged": {"transform": "lagged", "lag": 3, "decay": "splat"},
    "shared senders": {"num_heads": 2 * H, "num_key_value_heads": H, "decay": "splat", "window_size": 4},
    "shared senders, biased": {"num_heads": 2 * H, "num_key_value_heads": H, "write_gate": True, "routing_bias": True},
    "as many splats as channels": {"hidden_size": 3 * M, "decay": "splat", "value_skip": True},
}


def random_layer(num_splats=M, num_used=None, **options):
    """A layer far from its initial values; in each head all but some splats, others in each, are next to never used."""
    torch.manual_seed(3)
    layer = SplatAttention(**{"hidden_size": C, "num_heads": H, "num_splats": num_splats, **options}).double()
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    for head in range(H if num_used else 0):
        layer.log_amplitudes.data[head, torch.arange(head, num_splats - num_used + head) % num_splats] = -60.0
    return layer


def tokens_for(layer):
    return torch.randn(B, T, layer.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(("num_kept", "num_used"), [(M, None), (K, K)])
def test_what_the_kept_splats_did_they_do(options, num_kept, num_used):
    layer = random_layer(num_used=num_used, **options)
    tokens = tokens_for(layer)
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    fewer = keep_splats(layer, num_kept, tokens)
    assert fewer.centers.shape[1] == fewer.num_splats == num_kept
    torch.testing.assert_close(fewer(tokens)[0], layer(tokens)[0], rtol=0, atol=1e-10)
    _, state = fewer(tokens[:, : T // 2])
    rest, _ = fewer(tokens[:, T // 2 :], state=state)
    torch.testing.assert_close(rest, layer(tokens)[0][:, T // 2 :], rtol=0, atol=1e-10)
    assert all(torch.equal(parameter, before[name]) for name, parameter in layer.named_parameters())


def test_the_busiest_are_kept_in_order():
    layer = random_layer()
    tokens = tokens_for(layer)
    busiest = usage(layer, tokens)[""].sort(-1, descending=True)
    fewer = keep_splats(layer, 2, tokens)
    expected = layer.centers.gather(1, busiest.indices[:, :2, None].expand(-1, -1, layer.position_dim))
    assert torch.equal(fewer.centers, expected)
    assert (fewer(tokens)[0] != layer(tokens)[0]).any()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"token_bias": True, "position_bias": 13, "routing_bias": True, "decay": "splat"},
        {"hops": 1},
        {"num_key_value_heads": 1, "token_bias": True, "position_bias": 13, "decay": "splat"},
        {"num_key_value_heads": 1, "token_bias": True, "routing_bias": True},
    ],
    ids=str,
)
def test_a_model_with_fewer_splats_can_be_saved(options, tmp_path):
    torch.manual_seed(3)
    sizes = {"vocab_size": 31, "hidden_size": C, "num_hidden_layers": 2, "num_attention_heads": H, "num_splats": 11}
    model = SplatFlowForCausalLM(SplatFlowConfig(**sizes, **options, bos_token_id=0, eos_token_id=0, pad_token_id=0))
    for layer in model.model.layers:
        if layer.position_bias is not None:  # 0 at the start
            torch.nn.init.normal_(layer.position_bias.weight)
    tokens = torch.randint(31, (B, T))
    fewer = keep_splats(model.eval(), 4, tokens)
    assert (model.config.num_splats, fewer.config.num_splats) == (11, 4)
    fewer.save_pretrained(tmp_path)
    again = SplatFlowForCausalLM.from_pretrained(tmp_path).eval()
    assert again.model.layers[1].mixer.num_splats == 4
    assert torch.equal(again(tokens).logits, fewer(tokens).logits)
    assert (fewer(tokens).logits != model(tokens).logits).any()
    whole = keep_splats(model, 11, tokens)
    torch.testing.assert_close(whole(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(("num_used", "fewest"), [(1, 1), (3, 4), (4, 4), (5, 8), (9, 11)])
def test_the_search_finds_how_many_are_used(num_used, fewest):
    layer = random_layer(num_splats=11, num_used=num_used)
    tokens = tokens_for(layer)
    target = layer(tokens)[0]

    def distance(model):
        return (model(tokens)[0] - target).norm().item()

    assert fewest_splats(layer, tokens, distance, tolerance=1e-8) == fewest


@pytest.mark.parametrize(
    ("options", "num_splats", "message"),
    [
        ({"num_splats": 9, "routing": "lattice"}, 4, "routing is 'lattice'"),
        ({}, 8, "num_splats is 8, expected 1 to 7"),
        ({}, 0, "num_splats is 0"),
        ({"top_p": 3}, 2, "num_splats is 2, expected 3 to 7"),
    ],
)
def test_what_cannot_be_kept_is_refused(options, num_splats, message):
    with pytest.raises(ValueError, match=message):
        keep_splats(
            SplatAttention(**{"hidden_size": C, "num_heads": H, "num_splats": M, **options}),
            num_splats,
            torch.zeros(B, T, C),
        )


def test_a_model_without_splats_is_refused():
    with pytest.raises(ValueError, match="without splat attention"):
        keep_splats(torch.nn.Linear(C, C), 2, torch.zeros(B, T, C))
