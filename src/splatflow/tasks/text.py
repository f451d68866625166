"""Byte language modelling: which byte comes next in a text?

    text     b"to be or"
    inputs   t o _ b e _ o
    labels   o _ b e _ o r

The text is the caller's; a token is a byte.
"""

# B sequence, T token

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from splatflow.requirements import require_integers

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor

MOST_BYTES = 7  # of a string that is looked for: its bytes are one integer of 63 bits


def next_bytes(
    seed: int, *, text: bytes, batch_size: int, seq_len: int = 256
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Inputs and labels: pieces of the text from random places, and at each byte the byte after it.

    Raises:
        TypeError: a size is no integer, or the text is not bytes.
        ValueError: the text has no `seq_len + 1` bytes, or a size is below 1.

    Example:
        >>> inputs, labels = next_bytes(0, text=b"to be or not to be", batch_size=2, seq_len=5)
        >>> list(inputs.shape), bool((inputs[:, 1:] == labels[:, :-1]).all())
        ([2, 5], True)
    """
    require_integers(1, batch_size=batch_size, seq_len=seq_len)
    pieces = random_pieces(text, batch_size, seq_len + 1, torch.Generator().manual_seed(seed))
    return pieces[:, :-1], pieces[:, 1:]


def consecutive_bytes(
    text: bytes, *, batch_size: int, seq_len: int = 256
) -> Iterator[tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]]:
    """The whole text in its order, each byte but the first a label once; a rest too short for a sequence is left out.

    Raises:
        TypeError: a size is no integer, or the text is not bytes.
        ValueError: the text has no `seq_len + 1` bytes, or a size is below 1.

    Example:
        >>> [labels.tolist() for _, labels in consecutive_bytes(bytes(range(8)), batch_size=2, seq_len=3)]
        [[[1, 2, 3], [4, 5, 6]]]
    """
    require_integers(1, batch_size=batch_size, seq_len=seq_len)
    _check_length(text, seq_len + 1)
    tokens = _tokens(text)
    length = (len(tokens) - 1) // seq_len * seq_len
    inputs, labels = (tokens[start : start + length].view(-1, seq_len) for start in (0, 1))
    batches = zip(inputs.split(batch_size), labels.split(batch_size), strict=True)
    return ((batch.long(), label.long()) for batch, label in batches)


def seen_before(inputs: Int[Tensor, "B T"], labels: Int[Tensor, "B T"], length: int = 4) -> Bool[Tensor, "B T"]:
    """Where the label ends a string of `length` bytes that stood in the same sequence before.

    Such a byte can be recalled; the others have to be guessed. Strings may overlap. The first `length - 1` labels end
    no whole string, and count as not seen.

    Raises:
        ValueError: `length` is not within 1 and 7.

    Example:
        >>> tokens = torch.tensor([list(b"abcabc")])
        >>> seen_before(tokens[:, :-1], tokens[:, 1:], length=2).int().tolist()
        [[0, 0, 0, 1, 1]]
    """
    require_integers(1, length=length)
    if length > MOST_BYTES:
        raise ValueError(f"length is {length}, expected at most {MOST_BYTES}")
    tokens = torch.cat([inputs[:, :1], labels], 1)
    if tokens.shape[1] < length:
        return torch.zeros_like(labels, dtype=torch.bool)
    codes = sum(256**place * part for place, part in enumerate(tokens.unfold(1, length, 1).unbind(-1)))
    # equal codes come to stand side by side, in their order of time: all but the first of each have been seen
    ordered, order = torch.sort(codes, dim=1, stable=True)
    again = torch.zeros_like(codes, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    ends = torch.zeros_like(again).scatter(1, order, again)
    return torch.nn.functional.pad(ends, (length - 2, 0))


def random_pieces(text: bytes, count: int, length: int, generator: torch.Generator) -> Int[Tensor, "B T"]:
    """Strings of `length` bytes from random places of a text, as tokens.

    Raises:
        TypeError: the text is not bytes.
        ValueError: the text is shorter.
    """
    _check_length(text, length)
    starts = torch.randint(len(text) - length + 1, (count,), generator=generator).tolist()
    return torch.tensor([list(text[start : start + length]) for start in starts])


def _tokens(text: bytes) -> Int[Tensor, " T"]:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _check_length(text: bytes, length: int) -> None:
    if not isinstance(text, bytes):
        raise TypeError(f"text is of type {type(text).__name__}, expected bytes")
    if len(text) < length:
        raise ValueError(f"text has {len(text)} bytes, expected at least {length}")
