"""The table of biases by place: what it adds, and that a token's place is the same however its text is read."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from splatflow.models import (
    SplatFlowCache,
    SplatFlowConfig,
    SplatFlowForCausalLM,
    SplatFlowForMaskedLM,
    SplatFlowForSequenceClassification,
)
from splatflow.training.prompt import in_pieces, prefill

VOCAB_SIZE, PAD, SIZE = 31, 0, 7  # the table is shorter than the texts
LENGTHS = [2, 19, 11]  # of texts that are read together
NEXT = 5  # tokens that follow them

GIVEN_MASKS = {  # of everything, of the new tokens, none
    "whole": lambda mask: torch.cat([mask, mask.new_ones(len(mask), NEXT)], 1),
    "new": lambda mask: mask.new_ones(len(mask), NEXT),
    "none": lambda mask: None,
}


def tiny_model(model_class=SplatFlowForCausalLM, *, position_bias=SIZE, **options):
    torch.manual_seed(11)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": PAD, "eos_token_id": None, "pad_token_id": PAD}
    options = {**sizes, "num_splats": 5, "window_size": 3, "initializer_range": 0.3, **options}
    model = model_class(SplatFlowConfig(**marks, position_bias=position_bias, **options)).eval()
    for table in tables_of(model):  # 0 at the start
        torch.nn.init.normal_(table.weight, std=2.0)
    return model


def tables_of(model):
    return [layer.position_bias for layer in model.model.layers if layer.position_bias is not None]


def random_tokens(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(1, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def padded_texts(side: str = "left") -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Texts of all LENGTHS, each alone [1, length], and as one batch with its mask."""
    texts = [random_tokens(1, length, seed=length) for length in LENGTHS]
    tokens = pad_sequence([text[0] for text in texts], batch_first=True, padding_value=PAD, padding_side=side)
    return texts, tokens, (tokens != PAD).long()


@pytest.mark.parametrize("token_bias", [False, True])
@pytest.mark.parametrize("sizes", [{"num_splats": 5}, {"routing": "lattice", "num_splats": 9}], ids=str)
@torch.no_grad()
def test_it_adds_the_row_of_its_place_to_what_a_layer_is_given(sizes, token_bias):
    model, tokens = tiny_model(num_hidden_layers=1, token_bias=token_bias, **sizes).double(), random_tokens(2, 23)
    block = model.model.layers[0]
    bias = torch.stack([block.position_bias.weight[place % SIZE] for place in range(23)]).expand(2, -1, -1)
    if token_bias:
        bias = bias + block.token_bias(tokens)
    hidden_states = model.model.embed_tokens(tokens)
    mixed, _ = block.mixer(
        block.mixer_norm(hidden_states), token_bias=bias.reshape(2, 23, 2, {5: 5, 9: 6}[sizes["num_splats"]])
    )
    hidden_states = hidden_states + mixed
    expected = model.model.norm(hidden_states + block.mlp(block.mlp_norm(hidden_states)))
    torch.testing.assert_close(model.model(tokens).last_hidden_state, expected)


def test_it_begins_without_preferences_and_then_learns_some():
    plain = tiny_model(position_bias=0)
    model = SplatFlowForCausalLM(SplatFlowConfig(**{**plain.config.to_diff_dict(), "position_bias": SIZE}))
    report = model.load_state_dict(plain.state_dict(), strict=False)
    assert report.missing_keys == [f"model.layers.{layer}.position_bias.weight" for layer in range(2)]
    tokens = random_tokens(2, 23)
    assert model(tokens).logits.equal(plain(tokens).logits)
    optimizer = torch.optim.SGD([table.weight for table in tables_of(model)], lr=1.0)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert all(table.weight.any(1).all() for table in tables_of(model))  # each row
    assert (model(tokens).logits != plain(tokens).logits).any()


def test_a_model_that_is_given_a_table_later_begins_without_preferences(tmp_path):
    tiny_model(position_bias=0).save_pretrained(tmp_path)
    for table in tables_of(SplatFlowForCausalLM.from_pretrained(tmp_path, position_bias=SIZE)):
        assert table.weight.shape == (SIZE, 2 * 5)
        assert not table.weight.any()


@torch.no_grad()
def test_behind_the_last_row_the_first_comes_again():
    model, longer, tokens = tiny_model(), tiny_model(position_bias=3 * SIZE), random_tokens(2, 3 * SIZE)
    for table, other in zip(tables_of(model), tables_of(longer), strict=True):
        other.weight.copy_(table.weight.repeat(3, 1))
    assert longer(tokens).logits.equal(model(tokens).logits)
    tables_of(longer)[0].weight[-1, 0] += 1.0
    assert longer(tokens).logits[:, :-1].equal(model(tokens).logits[:, :-1])
    assert (longer(tokens).logits[:, -1] != model(tokens).logits[:, -1]).any()


@torch.no_grad()
def test_the_future_reaches_no_earlier_logit():
    model, tokens = tiny_model(), random_tokens(2, 23)
    changed = torch.cat([tokens[:, :13], random_tokens(2, 10, seed=4)], 1)
    assert model(changed).logits[:, :13].equal(model(tokens).logits[:, :13])
    assert (model(changed).logits[:, 13] != model(tokens).logits[:, 13]).any()


@pytest.mark.parametrize("given", GIVEN_MASKS)
@torch.no_grad()
def test_padding_has_no_place_whatever_mask_is_given_with_a_cache(given):
    model = tiny_model().double()
    texts, tokens, mask = padded_texts()
    following = random_tokens(len(texts), NEXT, seed=1)
    cache = SplatFlowCache(num_layers=2)
    first = model(tokens, mask, past_key_values=cache).logits
    assert cache.num_real_tokens.tolist() == LENGTHS
    second = model(following, GIVEN_MASKS[given](mask), past_key_values=cache).logits
    assert cache.num_real_tokens.tolist() == [length + NEXT for length in LENGTHS]
    for index, text in enumerate(texts):
        alone = model(torch.cat([text, following[index : index + 1]], 1)).logits[0]
        together = torch.cat([first[index, -text.shape[1] :], second[index]])
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_padding_between_two_pieces_has_no_place():
    # in a window and in a convolution padding fills a slot, and the decay goes on
    model = tiny_model(window_size=0, conv_size=0, decay=None).double()
    texts, tokens, mask = padded_texts("right")
    cache = SplatFlowCache(num_layers=2)
    model(tokens, mask, past_key_values=cache)
    following = random_tokens(len(texts), NEXT, seed=1)
    second = model(following, past_key_values=cache).logits
    for index, text in enumerate(texts):
        alone = model(torch.cat([text, following[index : index + 1]], 1)).logits[0, -NEXT:]
        torch.testing.assert_close(second[index], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generates_from_padded_prompts_what_it_says_of_each_alone_without_a_cache(num_beams):
    model = tiny_model()
    texts, tokens, mask = padded_texts()
    options = {"max_new_tokens": 11, "do_sample": False, "num_beams": num_beams}
    together = [
        model.generate(tokens, attention_mask=mask, prefill_chunk_size=size, **options)[:, tokens.shape[1] :]
        for size in (None, 4)
    ]
    alone = [model.generate(text, use_cache=False, **options)[0, text.shape[1] :] for text in texts]
    assert together[0].equal(torch.stack(alone))
    assert together[1].equal(together[0])


def test_embeddings_will_do():
    model, tokens = tiny_model(), random_tokens(2, 23)
    embeddings = model.get_input_embeddings()(tokens)
    assert model(inputs_embeds=embeddings).logits.equal(model(tokens).logits)
    from_tokens = model.generate(tokens, max_new_tokens=7, do_sample=False)
    assert model.generate(inputs_embeds=embeddings, max_new_tokens=7, do_sample=False).equal(from_tokens[:, 23:])


def test_a_prompt_in_pieces_leaves_the_count_of_the_whole():
    model, tokens = tiny_model(), random_tokens(1, 53)
    cache, last = prefill(model, in_pieces([tokens[0].numpy()], size=11))
    assert cache.num_real_tokens.tolist() == [52]
    options = {"max_new_tokens": 7, "do_sample": False}
    # as the command line does, with a mask that knows nothing of the prompt
    rest = model.generate(last[-1:][None], past_key_values=cache, attention_mask=torch.ones(1, 2), **options)
    assert rest[:, 1:].equal(model.generate(tokens, **options)[:, 53:])


def test_the_count_goes_where_its_sequence_goes():
    model = tiny_model()
    _, tokens, mask = padded_texts()
    with torch.no_grad():
        cache = model(tokens, mask, use_cache=True).past_key_values
    size = cache.nbytes
    before = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert cache.num_real_tokens.tolist() == [11, 2, 2]
    assert before.num_real_tokens.tolist() == LENGTHS
    cache.batch_select_indices(torch.tensor([True, False, True]))
    assert cache.num_real_tokens.tolist() == [11, 2]
    cache.batch_repeat_interleave(2)
    assert cache.num_real_tokens.tolist() == [11, 11, 2, 2]
    assert before.nbytes == size == sum(tensor.nbytes for tensor in before.tensors())
    cache.reset()
    assert (cache.num_real_tokens, cache.nbytes) == (None, 0)


def test_a_cache_that_counted_nothing_is_refused():
    cache = tiny_model(position_bias=0)(random_tokens(1, 13)).past_key_values
    with pytest.raises(ValueError, match=r"holds 13 tokens that a model without position_bias has read, expected"):
        tiny_model()(random_tokens(1, 5), past_key_values=cache)


@pytest.mark.parametrize("model_class", [SplatFlowForMaskedLM, SplatFlowForSequenceClassification])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_without_a_causal_mask_padding_has_no_place_either(model_class, side):
    model = tiny_model(model_class, causal=False, decay=None, window_size=0).double()
    texts, tokens, mask = padded_texts(side)
    together = model(tokens, mask).logits
    for index, text in enumerate(texts):
        found = together[index, mask[index].bool()] if model_class is SplatFlowForMaskedLM else together[index]
        torch.testing.assert_close(found, model(text).logits[0], rtol=0, atol=1e-10)
    for table in tables_of(model):
        table.weight.zero_()
    assert (model(tokens, mask).logits != together).any()


def test_gradient_checkpointing_changes_no_gradient():
    plain = tiny_model(window_size=0).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    tokens = random_tokens(2, 23)
    for model in (plain, checkpointed):
        model(tokens, labels=tokens).loss.backward()
    for expected, found in zip(tables_of(plain), tables_of(checkpointed), strict=True):
        assert expected.weight.grad.any()
        torch.testing.assert_close(found.weight.grad, expected.weight.grad)
