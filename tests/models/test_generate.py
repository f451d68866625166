"""`generate()`: what the cache remembers is what a full pass would have seen, in every way of generating."""

from __future__ import annotations

import copy

import pytest
import torch

from splatflow.models import SplatFlowConfig, SplatFlowForCausalLM
from splatflow.nn import MIXERS

VOCAB_SIZE, PAD = 31, 0

every_mixer = pytest.mark.parametrize("mixer", MIXERS)


def tiny_model(mixer: str, **options) -> SplatFlowForCausalLM:
    torch.manual_seed(11)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": PAD, "eos_token_id": None, "pad_token_id": PAD}
    # Wide initial weights: the texts then depend on the prompt, instead of repeating one token.
    options = {"num_splats": 5, "initializer_range": 0.3, **options}
    return SplatFlowForCausalLM(SplatFlowConfig(mixer=mixer, **sizes, **marks, **options)).eval()


def random_tokens(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(1, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [1, length] of different lengths, as one batch [prompts, longest] and its mask."""
    tokens = torch.nn.utils.rnn.pad_sequence(
        [prompt[0] for prompt in prompts], batch_first=True, padding_value=PAD, padding_side="left"
    )
    return tokens, (tokens != PAD).long()


@every_mixer
@pytest.mark.parametrize("window_size", [0, 5])
def test_greedy_with_the_cache_equals_without_on_fifty_prompts(mixer, window_size):
    model = tiny_model(mixer, window_size=window_size)
    texts = set()
    for length in range(1, 26):
        prompts = random_tokens(2, length, seed=length)
        fast, slow = (
            model.generate(prompts, max_new_tokens=7, do_sample=False, use_cache=use_cache)
            for use_cache in (True, False)
        )
        assert fast.equal(slow), f"prompt length {length}"
        texts.update(tuple(text) for text in fast[:, length:].tolist())
    assert len(texts) > 25


@every_mixer
@pytest.mark.parametrize("num_beams", [1, 3])
def test_left_padding_changes_nothing(mixer, num_beams):
    left_padding_changes_nothing(tiny_model(mixer, window_size=5), num_beams)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_left_padding_changes_nothing_where_each_sequence_is_at_another_place_of_its_chunk(num_beams):
    model = tiny_model("splat", transform="lagged", lag=3)
    for block in model.model.layers:
        torch.nn.init.normal_(block.mixer.content_mlp.mlp.down_proj.weight)
    left_padding_changes_nothing(model, num_beams)


def left_padding_changes_nothing(model: SplatFlowForCausalLM, num_beams: int) -> None:
    prompts = [random_tokens(1, length, seed=length) for length in (2, 9, 13)]
    options = {"max_new_tokens": 11, "do_sample": False, "num_beams": num_beams}
    tokens, mask = left_padded(prompts)
    together = model.generate(tokens, attention_mask=mask, **options)[:, tokens.shape[1] :]
    alone = [model.generate(prompt, **options)[0, prompt.shape[1] :] for prompt in prompts]
    assert together.equal(torch.stack(alone))


@every_mixer
def test_beams_with_the_cache_equal_beams_without(mixer):
    model = tiny_model(mixer)
    options = {"max_new_tokens": 11, "num_beams": 4, "num_return_sequences": 2, "do_sample": False}
    fast, slow = (model.generate(random_tokens(3, 8), use_cache=use_cache, **options) for use_cache in (True, False))
    assert fast.equal(slow)


@every_mixer
def test_sampling_with_the_cache_equals_sampling_without(mixer):
    model = tiny_model(mixer)
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        texts.append(model.generate(random_tokens(3, 8), max_new_tokens=11, do_sample=True, use_cache=use_cache))
    assert texts[0].equal(texts[1])


@every_mixer
@pytest.mark.parametrize("prefill_chunk_size", [1, 4, 13])
def test_prefill_in_chunks_changes_nothing(mixer, prefill_chunk_size):
    model = tiny_model(mixer, window_size=5)
    tokens, mask = left_padded([random_tokens(1, length, seed=length) for length in (5, 13)])
    whole, chunked = (
        model.generate(
            tokens, attention_mask=mask, max_new_tokens=7, do_sample=False, prefill_chunk_size=prefill_chunk_size
        )
        for prefill_chunk_size in (None, prefill_chunk_size)
    )
    assert chunked.equal(whole)


@every_mixer
def test_a_text_goes_on_from_its_cache(mixer):
    model = tiny_model(mixer)
    prompt = random_tokens(2, 8)
    whole = model.generate(prompt, max_new_tokens=12, do_sample=False)
    first = model.generate(prompt, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    # All but the last token, which has been chosen but not yet read.
    assert first.past_key_values.get_seq_length() == 8 + 5 - 1
    for cache in (copy.deepcopy(first.past_key_values), first.past_key_values):
        rest = model.generate(first.sequences, past_key_values=cache, max_new_tokens=7, do_sample=False)
        assert rest.equal(whole)


@every_mixer
def test_generation_starts_from_embeddings_too(mixer):
    model = tiny_model(mixer)
    prompt = random_tokens(2, 8)
    embeddings = model.get_input_embeddings()(prompt)
    from_tokens = model.generate(prompt, max_new_tokens=7, do_sample=False)
    from_embeddings = model.generate(inputs_embeds=embeddings, max_new_tokens=7, do_sample=False)
    assert from_embeddings.equal(from_tokens[:, 8:])


@pytest.mark.parametrize("cache_implementation", ["static", "offloaded", "quantized"])
def test_other_caches_are_refused(cache_implementation):
    with pytest.raises(ValueError, match=f"cache_implementation is '{cache_implementation}'"):
        tiny_model("splat").generate(random_tokens(1, 5), cache_implementation=cache_implementation, max_new_tokens=2)


def test_prefill_in_chunks_after_a_cache_is_refused():
    model = tiny_model("splat")
    first = model.generate(random_tokens(1, 5), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    with pytest.raises(ValueError, match=r"prefill_chunk_size is 3.*holds 6 tokens"):
        model.generate(first.sequences, past_key_values=first.past_key_values, prefill_chunk_size=3, max_new_tokens=2)


def test_assisted_generation_is_refused():
    model = tiny_model("splat")
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(random_tokens(1, 5), assistant_model=tiny_model("splat"), max_new_tokens=2)
