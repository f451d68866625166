"""The needle is told once, at the depth that was asked for, and the labels are its digits."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splatflow.tasks import IGNORED, needle

TEXT = b"It was the best of times, it was the worst of times. " * 40
TOLD = re.compile(r" The special number of (\w+) is (\d+)\. ")


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    seq_len=st.integers(307, 601),
    num_digits=st.integers(1, 7),
    num_distractors=st.integers(0, 4),
)
def test_the_labels_are_the_digits_that_were_told(seed, seq_len, num_digits, num_distractors):
    options = {"seq_len": seq_len, "num_digits": num_digits, "num_distractors": num_distractors}
    inputs, labels = needle(seed, text=TEXT, batch_size=2, **options)
    assert inputs.shape == labels.shape == (2, seq_len)
    for tokens, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        sequence = bytes(tokens).decode()
        told = dict(TOLD.findall(sequence))
        assert len(told) == num_distractors + 1
        noun = re.search(r" What is the special number of (\w+)\? \d*$", sequence)[1]
        answer = bytes(label for label in wanted if label != IGNORED).decode()
        assert answer == told[noun]
        assert wanted[:-num_digits] == [IGNORED] * (seq_len - num_digits)
        # a label is the byte after its own: the answer but for its last digit stands among the inputs
        assert sequence.endswith("? " + answer[:-1])
        haystack = TOLD.sub("", sequence[: sequence.rindex(" What is")])
        assert haystack.encode() in TEXT


@pytest.mark.parametrize(("depth", "share"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_depth(depth, share):
    inputs, _ = needle(0, text=TEXT, batch_size=8, seq_len=500, depth=depth)
    for tokens in inputs.tolist():
        sequence = bytes(tokens).decode()
        before, after = TOLD.search(sequence).start(), sequence.rindex(" What is") - TOLD.search(sequence).end()
        assert before / (before + after) == pytest.approx(share, abs=0.01)


def test_any_depth_comes_and_every_sequence_differs():
    inputs, labels = needle(0, text=TEXT, batch_size=64, seq_len=500)
    starts = [TOLD.search(bytes(tokens).decode()).start() for tokens in inputs.tolist()]
    assert min(starts) < 60
    assert max(starts) > 320
    assert len({tuple(row) for row in labels.tolist()}) > 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 60}, "seq_len is 60, expected at least"),
        ({"num_digits": 0}, "num_digits is 0"),
        ({"num_distractors": 99}, "num_distractors is 99, expected 0 to"),
        ({"depth": 1.5}, "depth is 1.5, expected 0 to 1"),
        ({"text": b"short"}, "text has 5 bytes, expected at least"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        needle(0, **{"text": TEXT, "batch_size": 1, **options})
