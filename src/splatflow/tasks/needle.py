"""A needle in a haystack: a number was told once, somewhere in a long text. What was it?

    inputs   ...late. The special number of river is 4071. They went... What is the special number of river? 407
    labels   ----------------------------------------------------------------------------------------------4071

Tokens are bytes. The haystack is a piece of a text of the caller's. The label at a byte is the byte after it; only the
digits of the answer count. Distractors are further needles about other nouns, so that the noun has to be matched.

Source: Kamradt 2023 (needle in a haystack); Hsieh et al. 2024 (RULER), whose wording of a special number is followed.
"""

# B sequence, T token

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from splatflow.requirements import require_integers

from .recall import IGNORED
from .text import random_pieces

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

NOUNS = (
    *("apple", "bridge", "candle", "desert", "engine", "forest", "garden", "hammer", "island", "jacket", "kettle"),
    *("ladder", "market", "needle", "orange", "pencil", "quarry", "river", "saddle", "temple", "umbrella", "valley"),
    *("window", "yacht", "anchor", "basket", "castle", "dragon"),
)


def needle(
    seed: int,
    *,
    text: bytes,
    batch_size: int,
    seq_len: int = 256,
    num_digits: int = 4,
    num_distractors: int = 0,
    depth: float | None = None,
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Inputs and labels: a haystack with one needle, the question, and the answer but for its last digit.

    Args:
        text: where haystacks are cut from.
        num_digits: of the number.
        num_distractors: further needles with other nouns and numbers.
        depth: where the needle stands, from 0 (the beginning) to 1 (just before the question); None: anywhere.

    Raises:
        TypeError: a size is no integer, or the text is not bytes.
        ValueError: the sentences do not fit into `seq_len`, or the text is shorter than the haystack, or another number
            is out of its range.

    Example:
        >>> inputs, labels = needle(1, text=b"so it goes, " * 30, batch_size=1, seq_len=110)
        >>> bytes(inputs[0, -50:].tolist()).decode(), bytes(labels[0, -4:].tolist()).decode()
        ('2948. oe What is the special number of valley? 294', '2948')
    """
    require_integers(1, batch_size=batch_size, seq_len=seq_len, num_digits=num_digits)
    require_integers(0, num_distractors=num_distractors)
    if not 0 <= num_distractors < len(NOUNS):
        raise ValueError(f"num_distractors is {num_distractors}, expected 0 to {len(NOUNS) - 1}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}, expected 0 to 1")
    generator = torch.Generator().manual_seed(seed)
    sequences = [_one(text, seq_len + 1, num_digits, num_distractors, depth, generator) for _ in range(batch_size)]
    tokens = torch.tensor([list(sequence) for sequence in sequences])
    labels = torch.full_like(tokens[:, 1:], IGNORED)
    labels[:, -num_digits:] = tokens[:, -num_digits:]
    return tokens[:, :-1], labels


def _one(
    text: bytes, length: int, num_digits: int, num_distractors: int, depth: float | None, generator: torch.Generator
) -> bytes:
    """A haystack with its needles, the question, and the whole answer: `length` bytes."""

    def digits() -> str:
        return "".join(map(str, torch.randint(10, (num_digits,), generator=generator).tolist()))

    nouns = [NOUNS[index] for index in torch.randperm(len(NOUNS), generator=generator)[: num_distractors + 1].tolist()]
    numbers = [digits() for _ in nouns]
    told = zip(nouns, numbers, strict=True)
    needles = [f" The special number of {noun} is {number}. ".encode() for noun, number in told]
    question = f" What is the special number of {nouns[0]}? {numbers[0]}".encode()
    room = length - len(question) - sum(map(len, needles))
    if room < 0:
        raise ValueError(
            f"seq_len is {length - 1}, expected at least {length - 1 - room} for the needles and the question"
        )
    haystack = bytes(random_pieces(text, 1, room, generator)[0].tolist()) if room > 1 else b" " * room

    places = torch.randint(room + 1, (len(needles),), generator=generator).tolist()
    if depth is not None:
        places[0] = round(depth * room)
    parts, start = [], 0
    for place, index in sorted(zip(places, range(len(needles)), strict=True)):
        parts += [haystack[start:place], needles[index]]
        start = place
    return b"".join([*parts, haystack[start:], question])
