"""A model with each way to route: its memory, its gradients, its folder; each option changes what it should."""

from copy import deepcopy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from splatflow.models import SplatFlowCache, SplatFlowConfig, SplatFlowForCausalLM

VOCAB_SIZE, SEQ_LEN = 31, 23
WINDOW = {"window_size": 5}
OPTIONS = {
    "nearest": {"splat_top_p": 2},
    "compact": {"routing": "compact", **WINDOW},
    "lattice": {"routing": "lattice", "num_splats": 9, "splat_top_p": 2, "decay": None, **WINDOW},
    "lattice that forgets": {"routing": "lattice", "num_splats": 9, "splat_top_p": 2},
    "grouped": {"routing": "grouped", "num_splats": 64, "splat_top_p": 2, "decay": None},
    "routing bias": {"routing_bias": True, **WINDOW},
    "token bias": {"token_bias": True, **WINDOW},
    "position bias": {"position_bias": 7, **WINDOW},
    "all three, of a lattice": {
        **{"routing": "lattice", "num_splats": 9},
        **{"token_bias": True, "routing_bias": True, "position_bias": 7},
    },
    "hops": {"hops": 2, "num_super_splats": 3, **WINDOW},
    "linear": {"transform": "linear", "value_dim": 19, **WINDOW},
    "linear, of a lattice": {
        **{"routing": "lattice", "num_splats": 9, "splat_top_p": 2, "decay": None},
        "transform": "linear",
    },
    "lagged": {"transform": "lagged", "lag": 3, **WINDOW},
    "lagged, of a lattice": {
        **{"routing": "lattice", "num_splats": 9, "splat_top_p": 2, "decay": None},
        **{"transform": "lagged", "lag": 3},
    },
    "wide": {"value_dim": 19, "position_dim": 10, "head_norm": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def tiny_model(**options):
    torch.manual_seed(11)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    options = {"num_splats": 5, "initializer_range": 0.3, **options}
    model = SplatFlowForCausalLM(SplatFlowConfig(**sizes, **marks, **options)).eval()
    at_first_zero = ("position_bias.weight", ".say", "content_mlp.mlp.down_proj.weight")
    for name, parameter in model.named_parameters():
        if name.endswith(at_first_zero):  # and then nothing is heard of it
            torch.nn.init.normal_(parameter, std=2.0 if "bias" in name else 1.0)
    return model


def random_tokens(*shape):
    return torch.randint(1, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(3))


@every_option
@torch.no_grad()
def test_any_split_with_a_cache_equals_one_pass(options):
    model, tokens = tiny_model(**options).double(), random_tokens(2, SEQ_LEN)
    whole = model(tokens).logits
    for cuts in ([1, 2, 17], [7], [*range(1, SEQ_LEN)]):
        cache = SplatFlowCache(num_layers=2)
        pieces = [model(piece, past_key_values=cache).logits for piece in tokens.tensor_split(cuts, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)


@every_option
def test_generates_what_it_would_say_without_a_memory(options):
    model, tokens = tiny_model(**options), random_tokens(2, 7)
    with_memory = model.generate(tokens, max_new_tokens=5, do_sample=False)
    without = model.generate(tokens, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(with_memory, without)


@every_option
@torch.no_grad()
def test_a_cache_goes_on_with_other_sequences_and_does_not_grow(options):
    model, tokens = tiny_model(**options), random_tokens(3, SEQ_LEN)
    mask = torch.arange(SEQ_LEN) >= torch.tensor([[0], [5], [7]])
    cache = model(tokens, mask, use_cache=True).past_key_values
    size = cache.nbytes

    def next_logits():
        return model(random_tokens(1, 4).expand(3, -1), past_key_values=deepcopy(cache)).logits

    before = next_logits()
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    torch.testing.assert_close(next_logits(), before[[2, 0, 1]])
    assert (next_logits() - before).abs().amax((1, 2)).min() > 1e-3
    for _ in range(3):
        model(tokens, past_key_values=cache)
    assert cache.nbytes == size


@every_option
def test_every_parameter_learns(options):
    model, tokens = tiny_model(**options).train(), random_tokens(3, SEQ_LEN)
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@every_option
def test_a_saved_model_is_the_same(options, tmp_path):
    model, tokens = tiny_model(**options), random_tokens(2, 7)
    model.save_pretrained(tmp_path)
    again = SplatFlowForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_token_bias_needs_the_tokens():
    model = tiny_model(token_bias=True)
    with pytest.raises(ValueError, match="inputs_embeds given, expected input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing": "lattice", "num_splats": 10}, "num_splats is 10, expected a square"),
        ({"routing": "grouped"}, "top_p is None"),
        ({"routing": "compact", "splat_top_p": 2}, "top_p is 2, expected None"),
        ({"splat_top_p": 6}, "top_p is 6, expected 1 to the number of splats, 5"),
        ({"routing": "lattice", "num_splats": 9, "hops": 1}, "hops is 1, expected 0 for routing 'lattice'"),
        ({"num_super_splats": 3}, "num_super_splats is 3 with hops=0"),
        ({"transform": "cubic"}, "transform is 'cubic', expected one of None, 'linear', 'mlp', 'lagged'"),
        ({"transform": "mlp"}, "transform is 'mlp', expected None, 'linear' or 'lagged' with causal=True"),
        ({"transform": "lagged", "lag": 0}, "lag is 0, expected at least 1"),
        ({"value_dim": 0}, "value_dim is 0"),
        ({"mixer": "softmax", "token_bias": True}, "token_bias is True, expected False for the mixer 'softmax'"),
        ({"mixer": "softmax", "position_bias": 7}, "position_bias is 7, expected 0 for the mixer 'softmax'"),
        ({"position_bias": -1}, "position_bias is -1, expected at least 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_model(**options)
