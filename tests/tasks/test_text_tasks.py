"""Bytes and the bytes after them; and which of them the sequence itself gave away."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splatflow.tasks import consecutive_bytes, next_bytes, seen_before

TEXT = bytes(range(256)) * 3


@given(seed=st.integers(0, 1000), seq_len=st.integers(1, 101))
def test_the_label_is_the_next_byte(seed, seq_len):
    inputs, labels = next_bytes(seed, text=TEXT, batch_size=3, seq_len=seq_len)
    for tokens, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        assert bytes([*tokens, wanted[-1]]) in TEXT
        assert tokens[1:] == wanted[:-1]


def test_the_first_and_the_last_byte_can_be_drawn():
    text = b"abcd"
    starts = {bytes(row) for row in next_bytes(0, text=text, batch_size=50, seq_len=2)[0].tolist()}
    assert starts == {b"ab", b"bc"}


@given(length=st.integers(2, 200), seq_len=st.integers(1, 41), batch_size=st.integers(1, 7))
def test_every_byte_is_a_label_once(length, seq_len, batch_size):
    text = bytes(range(256))[:length]
    if length <= seq_len:
        with pytest.raises(ValueError, match=f"text has {length} bytes, expected at least {seq_len + 1}"):
            list(consecutive_bytes(text, batch_size=batch_size, seq_len=seq_len))
        return
    batches = list(consecutive_bytes(text, batch_size=batch_size, seq_len=seq_len))
    labels = torch.cat([labels for _, labels in batches]).flatten().tolist()
    inputs = torch.cat([inputs for inputs, _ in batches]).flatten().tolist()
    assert bytes(labels) == text[1 : 1 + len(labels)]
    assert bytes(inputs) == text[: len(labels)]
    assert length - 1 - len(labels) < seq_len  # what is left out is too short for a sequence


@given(tokens=st.lists(st.sampled_from([0, 1, 255]), min_size=2, max_size=60), length=st.integers(1, 7))
def test_seen_before_is_what_a_search_finds(tokens, length):
    inputs, labels = torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]])
    strings = [tuple(tokens[end - length + 1 : end + 1]) for end in range(length - 1, len(tokens))]
    wanted = [False] * max(0, length - 2) + [string in strings[:place] for place, string in enumerate(strings)]
    assert seen_before(inputs, labels, length)[0].tolist() == wanted[length == 1 :][: len(tokens) - 1]


@pytest.mark.parametrize("length", [0, 8])
def test_strings_of_no_length_or_more_than_an_integer_holds_are_refused(length):
    with pytest.raises(ValueError, match=f"length is {length}, expected at"):
        seen_before(torch.zeros(1, 9), torch.zeros(1, 9), length)


def test_sequences_of_a_batch_do_not_see_each_other():
    inputs = torch.tensor([list(b"abcde"), list(b"abcde")])
    assert not seen_before(inputs[:, :-1], inputs[:, 1:]).any()
