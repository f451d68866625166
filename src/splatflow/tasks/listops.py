"""ListOps: what does a nested expression of small lists come to?

    inputs   ·  ·  [MAX  4  3  [MIN  2  6  ]  1  0  ]
    labels   -  -   -    -  -   -    -  -  -  -  -  4

Digits 0 to 9; MIN, MAX, MED (the median, rounded down) and SM (the sum modulo 10) of lists of digits and lists. Padding
(`·`, token 0) stands before the expression, so that the answer is asked for at the last token.

Source: Nangia and Bowman 2018; lengths and depths of the Long Range Arena, Tay et al. 2021.
"""

# B sequence, T token

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from splatflow.requirements import require_integers

from .recall import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Int
    from torch import Tensor

PADDING, FIRST_DIGIT = 0, 1  # digit d is token 1 + d
OPERATORS: dict[int, Callable[[list[int]], int]] = {
    11: min,
    12: max,
    13: lambda digits: (sorted(digits)[(len(digits) - 1) // 2] + sorted(digits)[len(digits) // 2]) // 2,
    14: lambda digits: sum(digits) % 10,
}
CLOSE = 15
DIGIT_SHARE = 0.75  # of arguments; the others are lists, while depth allows


def listops(
    seed: int,
    *,
    batch_size: int,
    seq_len: int = 64,
    min_len: int = 8,
    max_depth: int = 4,
    max_args: int = 5,
    vocab_size: int = 16,
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Inputs and labels: expressions of `min_len` to `seq_len` tokens, whose value is the label of the last token.

    The Long Range Arena has `seq_len=2000, min_len=500, max_depth=10, max_args=10`. There an expression may be a single
    digit at the root and is then thrown away for its length; here the root is always a list.

    Args:
        max_depth: lists within lists, the outermost counted.
        max_args: arguments of a list, drawn evenly from 2 on.
        vocab_size: at least 16; further tokens do not occur.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is out of its range, or there is no such expression, or one so rare that none was found in
            100,000 draws.

    Example:
        >>> inputs, labels = listops(0, batch_size=1, seq_len=12)
        >>> inputs[0].tolist(), labels[0, -1].item()
        ([0, 0, 13, 14, 6, 10, 10, 4, 15, 5, 4, 15], 5)
    """
    require_integers(1, batch_size=batch_size, seq_len=seq_len, min_len=min_len, max_depth=max_depth)
    require_integers(2, max_args=max_args)
    require_integers(CLOSE + 1, vocab_size=vocab_size)
    if min_len > seq_len:
        raise ValueError(f"min_len is {min_len}, expected 1 to seq_len, which is {seq_len}")
    generator = random.Random(seed)
    inputs = torch.full((batch_size, seq_len), PADDING)
    labels = torch.full((batch_size, seq_len), IGNORED)
    for row in range(batch_size):
        tokens, value = _of_length(generator, min_len, seq_len, max_depth, max_args)
        inputs[row, seq_len - len(tokens) :] = torch.tensor(tokens)
        labels[row, -1] = FIRST_DIGIT + value
    return inputs, labels


def _of_length(
    generator: random.Random, min_len: int, max_len: int, max_depth: int, max_args: int
) -> tuple[list[int], int]:
    for _ in range(100_000):
        tokens: list[int] = []
        value = _expression(generator, tokens, max_len, max_depth, max_args)
        if value is not None and min_len <= len(tokens):
            return tokens, value
    raise ValueError(
        f"no expression of {min_len} to {max_len} tokens was found with max_depth {max_depth} and max_args {max_args}"
    )


def _expression(generator: random.Random, tokens: list[int], max_len: int, max_depth: int, max_args: int) -> int | None:
    """Appends a list to `tokens` and returns its value, or None as soon as there are more than `max_len` tokens."""
    operator = generator.randint(11, 14)
    tokens.append(operator)
    arguments = []
    for _ in range(generator.randint(2, max_args)):
        if max_depth > 1 and generator.random() > DIGIT_SHARE:
            value = _expression(generator, tokens, max_len, max_depth - 1, max_args)
            if value is None:
                return None
        else:
            value = generator.randint(0, 9)
            tokens.append(FIRST_DIGIT + value)
        arguments.append(value)
    tokens.append(CLOSE)
    return OPERATORS[operator](arguments) if len(tokens) <= max_len else None
