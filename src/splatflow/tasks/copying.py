"""Copying: say again, in order, what was said before.

Copying, and selective copying, in which the tokens to copy lie scattered among blanks (`·`, token 0). `?` (token 1)
asks for the next token:

    copying     inputs   a b c d ? ? ? ?        selective   inputs   · a · · b · c d · ? ? ? ?
                labels   - - - - a b c d                    labels   - - - - - - - - - a b c d

Source: Arjovsky et al. 2016 (copying memory); Gu and Dao 2023 (selective copying).
"""

# B sequence, T token, K token to copy

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from splatflow.requirements import require_integers

from .recall import IGNORED

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

BLANK, ASK = 0, 1
NUM_MARKS = 2  # the tokens below are not copied


def copying(
    seed: int, *, batch_size: int, seq_len: int = 64, vocab_size: int = 64
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Inputs and labels: the first half of the sequence is to be said again in the second.

    Raises:
        TypeError: a size is no integer.
        ValueError: `seq_len` is odd or below 2, or the vocabulary has nothing but marks.

    Example:
        >>> inputs, labels = copying(0, batch_size=1, seq_len=6, vocab_size=9)
        >>> bool((inputs[:, :3] == labels[:, 3:]).all()), inputs[0, 3:].tolist(), labels[0, :3].tolist()
        (True, [1, 1, 1], [-100, -100, -100])
    """
    require_integers(2, seq_len=seq_len)
    if seq_len % 2:
        raise ValueError(f"seq_len is {seq_len}, expected an even number of at least 2")
    return selective_copying(
        seed, batch_size=batch_size, seq_len=seq_len, num_tokens=seq_len // 2, vocab_size=vocab_size
    )


def selective_copying(
    seed: int, *, batch_size: int, seq_len: int = 64, num_tokens: int = 8, vocab_size: int = 64
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Inputs and labels: `num_tokens` tokens lie among blanks, and are asked for at the end.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is below 1, the tokens do not fit twice into the sequence, or the vocabulary has nothing but
            marks.

    Example:
        >>> inputs, labels = selective_copying(0, batch_size=1, seq_len=9, num_tokens=2, vocab_size=9)
        >>> (inputs[0, :7] > 0).sum().item(), inputs[0, 7:].tolist(), (labels != IGNORED).sum().item()
        (2, [1, 1], 2)
    """
    require_integers(1, batch_size=batch_size, seq_len=seq_len, num_tokens=num_tokens, vocab_size=vocab_size)
    length = seq_len - num_tokens  # of the part to copy from
    if not 1 <= num_tokens <= length:
        raise ValueError(f"num_tokens is {num_tokens}, expected 1 to half of seq_len, which is {seq_len}")
    if vocab_size <= NUM_MARKS:
        raise ValueError(f"vocab_size is {vocab_size}, expected more than {NUM_MARKS} marks")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(NUM_MARKS, vocab_size, (batch_size, num_tokens), generator=generator)
    places = torch.multinomial(torch.ones(batch_size, length), num_tokens, generator=generator).sort(1).values
    inputs = torch.full((batch_size, seq_len), BLANK).scatter_(1, places, tokens)
    inputs[:, length:] = ASK
    labels = torch.full_like(inputs, IGNORED)
    labels[:, length:] = tokens
    return inputs, labels
