"""The labels of recall are what a reader of the inputs would answer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splatflow.tasks import IGNORED, multi_query_recall

VOCABULARY = 61
HALF = VOCABULARY // 2


def answers(inputs, num_items):
    """For each token of a sequence, the value last bound to it in the first `num_items` items."""
    bound = {}
    for key, value in zip(inputs[: 2 * num_items : 2], inputs[1 : 2 * num_items : 2], strict=True):
        bound[key] = value
    return bound


@given(
    seed=st.integers(0, 1000),
    num_pairs=st.integers(1, 7),
    num_rebound=st.integers(0, 7),
    num_noise=st.integers(0, 5),
    spare=st.integers(0, 11),
)
def test_the_last_value_of_a_key_is_its_label(seed, num_pairs, num_rebound, num_noise, spare):
    num_rebound = min(num_rebound, num_pairs)
    num_items = num_pairs + num_rebound + num_noise
    inputs, labels = multi_query_recall(
        seed,
        batch_size=3,
        seq_len=2 * (num_items + num_pairs) + spare,
        num_pairs=num_pairs,
        vocab_size=VOCABULARY,
        num_rebound=num_rebound,
        num_noise=num_noise,
    )
    for tokens, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        keys = tokens[: 2 * num_items : 2]
        assert sum(key < HALF for key in keys) == num_pairs + num_rebound  # noise holds no key
        assert len({key for key in keys if key < HALF}) == num_pairs
        asked = {place: label for place, label in enumerate(wanted) if label != IGNORED}
        assert sorted(tokens[place] for place in asked) == sorted({key for key in keys if key < HALF})
        assert min(asked) >= 2 * num_items
        bound = answers(tokens, num_items)
        assert all(bound[tokens[place]] == label for place, label in asked.items())


def test_a_second_value_may_come_before_the_first():
    options = {"batch_size": 64, "seq_len": 40, "num_pairs": 4, "vocab_size": VOCABULARY}
    inputs, _ = multi_query_recall(0, **options, num_rebound=4)
    assert len({tuple(row) for row in inputs[:, :16:2].argsort().tolist()}) > 1  # the order of the keys differs


def test_the_same_seed_gives_the_same_batch():
    options = {"batch_size": 2, "num_rebound": 2, "num_noise": 3}
    first, second, other = (multi_query_recall(seed, **options)[0] for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 31}, "seq_len 31.*num_pairs 8.*32"),
        ({"num_noise": 20}, "seq_len 64.*72"),
        ({"vocab_size": 16}, "vocab_size 16 has 7 keys.*8"),
        ({"vocab_size": 20, "num_rebound": 8}, "vocab_size 20 has 10 values.*8.*8"),
        ({"num_pairs": 0}, "num_pairs is 0"),
        ({"num_noise": -1}, "num_noise is -1"),
        ({"power": float("nan")}, "power is nan, expected 0 to 4"),
        ({"power": 400}, "power is 400"),
        ({"num_rebound": 9}, "num_rebound is 9.*8"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        multi_query_recall(0, batch_size=1, **options)
