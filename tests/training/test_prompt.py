"""A prompt in pieces is the prompt as a whole: the same tokens, logits and continuation, in memory that stays."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from splatflow.diagnostics import peak_memory
from splatflow.models import SplatFlowConfig, SplatFlowForCausalLM
from splatflow.nn import MIXERS
from splatflow.training.prompt import SHOWN_TOKENS, in_pieces, num_prompt_tokens, prefill, prompt_tokens
from splatflow.training.text import BLOCK_BYTES, TextError, byte_tokenizer, encode, text_blocks

BYTES = byte_tokenizer()
LENGTH = 1009  # tokens: many pieces, several chunks of the operator, and more than are shown

every_mixer = pytest.mark.parametrize("mixer", MIXERS)


def tiny_model(mixer: str, window_size: int = 11) -> SplatFlowForCausalLM:
    torch.manual_seed(5)
    sizes = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_splats": 5}
    options = {"window_size": window_size, "initializer_range": 0.3, "eos_token_id": None, "pad_token_id": 0}
    return SplatFlowForCausalLM(SplatFlowConfig(mixer=mixer, **sizes, **options)).eval()


def random_tokens(length: int) -> torch.Tensor:
    return torch.randint(1, 31, (length,), generator=torch.Generator().manual_seed(7))


def filled(model: SplatFlowForCausalLM, tokens: torch.Tensor, size: int):
    return prefill(model, in_pieces([tokens.numpy()], size))


@given(st.lists(st.integers(0, 9), max_size=5), st.integers(1, 11))
def test_pieces_hold_all_tokens_and_are_full_but_for_the_last(lengths, size):
    tokens = np.arange(sum(lengths))
    *full, last = in_pieces(np.split(tokens, np.cumsum(lengths)[:-1]) if lengths else [], size)
    assert np.array_equal(torch.cat([*full, last]), tokens)
    assert all(len(piece) == size for piece in full)
    assert len(last) <= size
    assert len(last) > 0 or not len(tokens)


@given(st.lists(st.binary(max_size=7), max_size=5))
def test_bytes_in_blocks_are_the_tokens_of_the_whole(blocks):
    tokens = np.concatenate(list(prompt_tokens(blocks, BYTES)))
    assert tokens.tolist() == [256, *b"".join(blocks)]
    assert tokens[1:].tolist() == encode([b"".join(blocks)], BYTES)[:-1].tolist()


def test_tokens_of_several_bytes_do_not_see_the_borders_of_blocks():
    vocabulary = {"a": 0, "b": 1, "ab": 2, "<end>": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")])), eos_token="<end>"
    )
    assert np.concatenate(list(prompt_tokens([b"ba", b"ba"], tokenizer))).tolist() == [3, 1, 2, 0]


def test_a_file_is_read_in_blocks(tmp_path: Path):
    text = bytes(range(1, 251)) * (2 * BLOCK_BYTES // 250 + 1)
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text))
    for name, num_tokens in (("a.txt", 1 + len(text)), ("a.txt.gz", None)):
        blocks = list(text_blocks(str(tmp_path / name)))
        assert b"".join(blocks) == text
        assert max(map(len, blocks)) <= BLOCK_BYTES
        assert num_prompt_tokens(str(tmp_path / name), BYTES) == num_tokens
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(np.random.default_rng(0).bytes(3 * BLOCK_BYTES))[:-100])
    with pytest.raises(TextError, match=r"cut\.txt\.gz (cannot be unpacked|is binary)"):
        list(text_blocks(str(tmp_path / "cut.txt.gz")))


@every_mixer
@pytest.mark.parametrize("size", [1, 13, 67, LENGTH - 1, LENGTH, LENGTH + 1])
def test_prefill_in_pieces_equals_one_pass(mixer, size):
    length = 101 if size == 1 else LENGTH
    model, tokens = tiny_model(mixer), random_tokens(length)
    cache, last = filled(model, tokens, size)
    assert cache.get_seq_length() == length - 1
    assert last.equal(tokens[-SHOWN_TOKENS:])
    whole = model.generate(tokens[None], max_new_tokens=17, do_sample=False)[:, length:]
    with torch.no_grad():
        expected = model(tokens[None], logits_to_keep=1).logits
    written = model.generate(
        last[None, -1:],
        past_key_values=cache,
        attention_mask=torch.ones(1, 2),
        max_new_tokens=17,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert written.sequences[:, 1:].equal(whole)
    assert len(set(whole[0].tolist())) > 3
    torch.testing.assert_close(written.logits[0], expected[:, -1], rtol=0, atol=1e-5)


def test_a_prompt_of_one_token_is_left_to_the_model():
    cache, last = filled(tiny_model("splat"), torch.tensor([29]), 7)
    assert (cache.get_seq_length(), last.tolist()) == (0, [29])


def test_memory_of_prefill_does_not_grow_with_the_prompt():
    splat, twin = tiny_model("splat"), tiny_model("softmax", window_size=0)  # the twin remembers every token

    def peak(model: SplatFlowForCausalLM, num_pieces: int) -> int:
        tokens = random_tokens(251 * num_pieces)
        return peak_memory(lambda: filled(model, tokens, 251))

    assert peak(splat, 7) == peak(splat, 4)
    assert peak(twin, 7) > 1.3 * peak(twin, 4)
