"""The model: outputs, memory, gradients, saving and compiling, with every mixer."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from splatflow.models import (
    SplatFlowCache,
    SplatFlowConfig,
    SplatFlowForCausalLM,
    SplatFlowModel,
)
from splatflow.nn import MIXERS

VOCAB_SIZE, SEQ_LEN = 31, 37

every_mixer = pytest.mark.parametrize("mixer", MIXERS)
every_window = pytest.mark.parametrize("window_size", [0, 5])


def tiny_model(mixer: str, **options) -> SplatFlowForCausalLM:
    torch.manual_seed(11)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    # Wide initial weights, so that a wrong memory shows in the logits.
    options = {"num_splats": 5, "initializer_range": 0.3, **options}
    return SplatFlowForCausalLM(SplatFlowConfig(mixer=mixer, **sizes, **marks, **options)).eval()


def random_tokens(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(1, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


@every_mixer
@every_window
@settings(max_examples=60)
@given(cuts=st.sets(st.integers(1, SEQ_LEN - 1), max_size=6))
def test_any_split_with_a_cache_equals_one_pass(mixer, window_size, cuts):
    model = tiny_model(mixer, window_size=window_size).double()
    tokens = random_tokens(2, SEQ_LEN)
    cache = SplatFlowCache(num_layers=2)
    with torch.no_grad():
        whole = model(tokens).logits
        pieces = [model(piece, past_key_values=cache).logits for piece in tokens.tensor_split(sorted(cuts), dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)
    assert cache.get_seq_length() == SEQ_LEN


@every_mixer
@every_window
@settings(max_examples=60)
@given(position=st.integers(1, SEQ_LEN - 1), seed=st.integers(0, 1000))
def test_the_future_reaches_no_earlier_logit(mixer, window_size, position, seed):
    model = tiny_model(mixer, window_size=window_size)
    tokens = random_tokens(2, SEQ_LEN)
    changed = torch.cat([tokens[:, :position], random_tokens(2, SEQ_LEN - position, seed=seed)], 1)
    with torch.no_grad():
        assert model(tokens).logits[:, :position].equal(model(changed).logits[:, :position])


@every_mixer
def test_nan_in_one_sequence_reaches_no_other(mixer):
    model = tiny_model(mixer)
    embeddings = model.get_input_embeddings()(random_tokens(3, SEQ_LEN)).detach()
    poisoned = embeddings.clone()
    poisoned[1, 4] = float("nan")
    with torch.no_grad():
        clean, dirty = model(inputs_embeds=embeddings).logits, model(inputs_embeds=poisoned).logits
    assert dirty[[0, 2]].equal(clean[[0, 2]])
    assert dirty[1, 4:].isnan().all()


@every_mixer
def test_what_padding_holds_does_not_matter(mixer):
    model = tiny_model(mixer)
    tokens = random_tokens(2, SEQ_LEN)
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    other = tokens.where(mask.bool(), 17)
    with torch.no_grad():
        assert model(tokens, mask).logits[0, 6:].equal(model(other, mask).logits[0, 6:])


@every_mixer
@every_window
def test_shared_senders_hold_less_and_go_on_from_a_cache(mixer, window_size):
    options = {"decay": None, "window_size": window_size, "conv_size": 0}
    if mixer == "splat":
        options |= {"token_bias": True, "position_bias": 3}
    shared, own = (tiny_model(mixer, num_key_value_heads=count, **options) for count in (1, None))
    tokens = random_tokens(2, SEQ_LEN)
    expected = shared(tokens).logits
    first = shared(tokens[:, :20])
    second = shared(tokens[:, 20:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected)
    kept = sum(part.nbytes for part in second.past_key_values.tensors() if part.is_floating_point())
    of_own = sum(part.nbytes for part in own(tokens).past_key_values.tensors() if part.is_floating_point())
    assert 2 * kept == of_own


def test_splats_remember_in_constant_space():
    model = tiny_model("splat", window_size=7)
    cache = SplatFlowCache(num_layers=2)
    sizes = []
    with torch.no_grad():
        for length in (1_000, 9_000, 90_000):
            model(random_tokens(1, length), past_key_values=cache, logits_to_keep=1)
            sizes.append(cache.nbytes)
    assert cache.get_seq_length() == 100_000
    assert sizes[0] == sizes[1] == sizes[2] > 0


def test_the_memory_of_softmax_grows():
    model = tiny_model("softmax")
    short, long = (model(random_tokens(1, length), use_cache=True).past_key_values for length in (100, 200))
    assert long.nbytes > 1.8 * short.nbytes


def test_cache_operations_act_on_sequences():
    model = tiny_model("splat")
    with torch.no_grad():
        cache = model(random_tokens(3, 11), use_cache=True).past_key_values

    def next_logits(cache: SplatFlowCache) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.full((cache.batch_size, 1), 5), past_key_values=copy.deepcopy(cache)).logits

    before = next_logits(cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    torch.testing.assert_close(next_logits(cache), before[[2, 0, 0]])
    cache.batch_select_indices(torch.tensor([True, False, True]))
    torch.testing.assert_close(next_logits(cache), before[[2, 0]])
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(next_logits(cache), before[[2, 2, 0, 0]])
    with pytest.raises(NotImplementedError, match=r"crop\(-1\) on a cache of 11 tokens"):
        cache.crop(-1)
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.nbytes) == (0, -1, 0)


def test_a_cache_is_made_only_where_it_is_wanted():
    model = tiny_model("splat")
    tokens = random_tokens(1, 5)
    assert model(tokens).past_key_values.get_seq_length() == 5
    assert model(tokens, use_cache=False).past_key_values is None
    assert model.train()(tokens).past_key_values is None


def test_outputs_agree_with_each_other():
    model = tiny_model("splat")
    tokens = random_tokens(2, 13)
    outputs = model(tokens, labels=tokens, output_hidden_states=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == 3 * [(2, 13, 32)]
    assert model.lm_head(outputs.hidden_states[-1]).equal(outputs.logits)
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, outputs.logits[:, -2:])
    embeddings = model.get_input_embeddings()(tokens)
    assert model(inputs_embeds=embeddings).logits.equal(outputs.logits)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)
    shared = model(tokens, labels=tokens, num_items_in_batch=torch.tensor(240)).loss
    torch.testing.assert_close(shared, expected * 24 / 240)


@every_mixer
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(mixer, use_reentrant):
    plain = tiny_model(mixer).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert all(layer.gradient_checkpointing for layer in checkpointed.model.layers)
    tokens = random_tokens(2, SEQ_LEN)
    for model in (plain, checkpointed):
        model(tokens, labels=tokens).loss.backward()
    for (name, expected), found in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert expected.grad is not None, name
        torch.testing.assert_close(found.grad, expected.grad, msg=name)


@every_mixer
def test_saved_and_loaded_models_are_equal(mixer, tmp_path):
    model = tiny_model(mixer, window_size=5, head_norm=True, output_gate=True, value_skip=True)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    tokens = random_tokens(2, SEQ_LEN)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, SplatFlowForCausalLM)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert loaded(tokens).logits.equal(model(tokens).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, SplatFlowModel)
    assert base(tokens).last_hidden_state.equal(model.model(tokens).last_hidden_state)


def test_parameters_that_a_checkpoint_lacks_start_afresh(tmp_path):
    model = tiny_model("splat")
    model.save_pretrained(tmp_path)
    loaded, report = SplatFlowForCausalLM.from_pretrained(tmp_path, write_gate=True, output_loading_info=True)
    assert report["missing_keys"]
    for name, parameter in model.named_parameters():
        assert loaded.get_parameter(name).equal(parameter), name
    fresh = tiny_model("splat", write_gate=True)
    for name in report["missing_keys"]:
        found, expected = loaded.get_parameter(name), fresh.get_parameter(name)
        torch.testing.assert_close(found.mean(), expected.mean(), rtol=0, atol=0.1)
        torch.testing.assert_close(found.square().mean(), expected.square().mean(), rtol=0.5, atol=1e-6)


@every_mixer
def test_what_a_mixer_initialises_itself_stays(mixer):
    model = tiny_model(mixer, initializer_range=1e-3)
    torch.manual_seed(11)
    own = MIXERS[mixer](32, 2, **({"num_splats": 5, "decay": "head"} if mixer == "splat" else {}), conv_size=4)
    weights_of_linear_maps = {
        f"{name}.weight" for name, module in own.named_modules() if isinstance(module, torch.nn.Linear)
    }
    for name, expected in own.named_parameters():
        if name not in weights_of_linear_maps:
            found = model.model.layers[0].mixer.get_parameter(name)
            torch.testing.assert_close(found.mean(), expected.mean(), rtol=0, atol=0.5, msg=name)
            torch.testing.assert_close(found.square().mean(), expected.square().mean(), rtol=0.5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "neither of input_ids and inputs_embeds"),
        (
            {"input_ids": torch.ones(2, 5, dtype=torch.long), "inputs_embeds": torch.ones(2, 5, 32)},
            ValueError,
            "both of input_ids and inputs_embeds",
        ),
        ({"attention_mask": torch.ones(2, 4)}, ValueError, r"attention_mask has shape \(2, 4\), expected \(2, 5"),
        ({"attention_mask": torch.ones(3, 5)}, ValueError, r"attention_mask has shape \(3, 5\), expected \(2, 5"),
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, ValueError, r"attention_mask has shape \(2, 1, 5, 5\)"),
        ({"past_key_values": DynamicCache()}, TypeError, "past_key_values is a DynamicCache"),
        ({"past_key_values": SplatFlowCache(3)}, ValueError, "past_key_values has 3 layers, the model has 2"),
        ({"position_ids": torch.arange(5)}, TypeError, "position_ids given"),
    ],
)
def test_wrong_calls(arguments, error, message):
    model = tiny_model("splat")
    if arguments and "input_ids" not in arguments:
        arguments = {"input_ids": torch.ones(2, 5, dtype=torch.long), **arguments}
    with pytest.raises(error, match=message):
        model(**arguments)


def test_a_cache_of_another_batch_is_refused_and_left_alone():
    model = tiny_model("splat")
    cache = model(random_tokens(3, 5)).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds 3 sequences, the inputs have 2"):
        model(random_tokens(2, 5), past_key_values=cache)
    assert cache.get_seq_length() == 5
