"""What holds for every task, and the answers of the small ones."""

import doctest
import importlib
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splatflow.tasks import IGNORED, TASKS, TEXT_TASKS, copying, induction, selective_copying

EVERY_TASK = {**TASKS, **{name: partial(task, text=bytes(range(32, 96)) * 9) for name, task in TEXT_TASKS.items()}}
every_task = pytest.mark.parametrize("name", EVERY_TASK)
VOCABULARY = 31


@every_task
def test_a_seed_gives_one_batch_and_another_seed_another(name):
    first, again, other = (EVERY_TASK[name](seed, batch_size=3, seq_len=128) for seed in (5, 5, 6))
    inputs, labels = first
    assert inputs.shape == labels.shape == (3, 128)
    assert inputs.dtype == labels.dtype == torch.int64
    assert all(map(torch.equal, first, again))
    assert not torch.equal(inputs, other[0])


@pytest.mark.parametrize("name", TASKS)
def test_every_sequence_asks_and_no_label_is_given_away(name):
    """A label is neither its own input nor outside the vocabulary."""
    inputs, labels = TASKS[name](0, batch_size=16, seq_len=64, vocab_size=64)
    asked = labels != IGNORED
    assert asked.any(1).all()
    assert (labels[asked] != inputs[asked]).all()
    assert labels[asked].min() >= 0
    assert max(labels.max(), inputs.max()) < 64


@given(seed=st.integers(0, 1000), num_tokens=st.integers(1, 9), spare=st.integers(0, 13))
def test_selective_copying_asks_for_all_but_blanks_in_order(seed, num_tokens, spare):
    seq_len = 2 * num_tokens + spare
    options = {"seq_len": seq_len, "num_tokens": num_tokens, "vocab_size": VOCABULARY}
    inputs, labels = selective_copying(seed, batch_size=2, **options)
    for tokens, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        assert [token for token in tokens[:-num_tokens] if token != 0] == wanted[-num_tokens:]
        assert tokens[-num_tokens:] == [1] * num_tokens
        assert wanted[:-num_tokens] == [IGNORED] * (seq_len - num_tokens)


@given(seed=st.integers(0, 1000), seq_len=st.integers(3, 40))
def test_induction_asks_for_what_followed_the_mark(seed, seq_len):
    inputs, labels = induction(seed, batch_size=2, seq_len=seq_len, vocab_size=VOCABULARY)
    for tokens, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        first, second = (place for place, token in enumerate(tokens) if token == 0)
        assert second == seq_len - 1
        assert wanted == [*[IGNORED] * (seq_len - 1), tokens[first + 1]]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (copying, {"seq_len": 7}, "seq_len is 7.*even"),
        (selective_copying, {"seq_len": 9, "num_tokens": 5}, "num_tokens is 5.*9"),
        (selective_copying, {"num_tokens": 0}, "num_tokens is 0"),
        (copying, {"vocab_size": 2}, "vocab_size is 2.*2 marks"),
        (induction, {"seq_len": 2}, "seq_len is 2"),
    ],
)
def test_what_cannot_be_is_refused(task, options, message):
    with pytest.raises(ValueError, match=message):
        task(0, batch_size=1, **options)


@every_task
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size is 0, expected at least 1"),
        ({"batch_size": 2.0}, TypeError, "batch_size is 2.0, expected an integer"),
        ({"seq_len": -2}, ValueError, "seq_len is -2, expected at least"),
        ({"seq_len": 64.0}, TypeError, "seq_len is 64.0, expected an integer"),
    ],
)
def test_a_batch_has_a_size(name, options, error, message):
    with pytest.raises(error, match=message):
        EVERY_TASK[name](0, **{"batch_size": 1, "seq_len": 128, **options})


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_a_text_is_bytes(name):
    with pytest.raises(TypeError, match="text is of type str, expected bytes"):
        TEXT_TASKS[name](0, text="a" * 999, batch_size=1, seq_len=128)


@pytest.mark.parametrize("module", ["recall", "copying", "induction", "listops", "needle", "text"])
def test_examples_in_docstrings(module):
    results = doctest.testmod(importlib.import_module(f"splatflow.tasks.{module}"))
    assert results.attempted > 0
    assert results.failed == 0
