"""Labels are what a reader of the expression would answer."""

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splatflow.tasks import IGNORED, listops

NAMES = {**{1 + digit: digit for digit in range(10)}, 11: "MIN", 12: "MAX", 13: "MED", 14: "SM", 15: "]"}
FUNCTIONS = {
    "MIN": min,
    "MAX": max,
    "MED": lambda digits: int(statistics.median(digits)),
    "SM": lambda digits: sum(digits) % 10,
}


def read(tokens):
    """(value, depth, numbers of arguments) of an expression, by a stack."""
    stack, widths, deepest = [[]], [], 0
    for name in (NAMES[token] for token in tokens):
        if name == "]":
            operator, *digits = stack.pop()
            stack[-1].append(FUNCTIONS[operator](digits))
            widths.append(len(digits))
        elif isinstance(name, str):
            stack.append([name])
            deepest = max(deepest, len(stack) - 1)
        else:
            stack[-1].append(name)
    [[value]] = stack
    return value, deepest, widths


@settings(deadline=None)
@given(seed=st.integers(0, 1000), depth=st.integers(1, 5), args=st.integers(2, 7), min_len=st.integers(1, 9))
def test_the_label_is_the_value(seed, depth, args, min_len):
    inputs, labels = listops(
        seed, batch_size=3, seq_len=53, min_len=min_len, max_depth=depth, max_args=max(args, min_len)
    )
    for tokens, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        expression = [token for token in tokens if token]
        assert tokens == [0] * (53 - len(expression)) + expression  # padding stands before
        assert len(expression) >= min_len
        value, deepest, widths = read(expression)
        assert wanted == [IGNORED] * 52 + [1 + value]
        assert deepest <= depth
        assert min(widths) >= 2
        assert max(widths) <= max(args, min_len)


def test_the_lengths_of_the_long_range_arena():
    inputs, labels = listops(0, batch_size=4, seq_len=2000, min_len=500, max_depth=10, max_args=10)
    for tokens, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        expression = [token for token in tokens if token]
        assert 500 <= len(expression) <= 2000
        assert wanted[-1] == 1 + read(expression)[0]


def test_depth_and_all_operators_are_used():
    inputs, _ = listops(0, batch_size=64)
    expressions = [[token for token in tokens if token] for tokens in inputs.tolist()]
    assert max(read(expression)[1] for expression in expressions) == 4
    assert {token for expression in expressions for token in expression} == set(range(1, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_depth": 0}, "max_depth is 0"),
        ({"max_args": 1}, "max_args is 1"),
        ({"min_len": 65}, "min_len is 65, expected 1 to seq_len, which is 64"),
        ({"vocab_size": 15}, "vocab_size is 15, expected at least 16"),
        (
            {"max_depth": 1, "max_args": 3, "min_len": 40},
            "no expression of 40 to 64 tokens.*max_depth 1 and max_args 3",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        listops(0, batch_size=1, **options)
