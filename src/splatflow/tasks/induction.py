"""Induction: a mark was seen once, followed by some token; when the mark comes again, what follows?

    inputs   e b * c a d b *
    labels   - - - - - - - c

`*` is token 0, and comes nowhere else. Source: Olsson et al. 2022 (induction heads); Fu et al. 2023 (the task).
"""

# B sequence, T token

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from splatflow.requirements import require_integers

from .recall import IGNORED

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

MARK = 0


def induction(
    seed: int, *, batch_size: int, seq_len: int = 64, vocab_size: int = 64
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Inputs and labels, of which only the last counts.

    Raises:
        TypeError: a size is no integer.
        ValueError: fewer than 3 tokens, a vocabulary of fewer than 2, or no sequence.

    Example:
        >>> inputs, labels = induction(0, batch_size=1, seq_len=8, vocab_size=9)
        >>> (inputs == MARK).sum().item(), inputs[0, 7].item(), (labels != IGNORED).sum().item()
        (2, 0, 1)
    """
    require_integers(1, batch_size=batch_size)
    require_integers(2, vocab_size=vocab_size)
    require_integers(3, seq_len=seq_len)
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(1, vocab_size, (batch_size, seq_len), generator=generator)
    first = torch.randint(seq_len - 2, (batch_size, 1), generator=generator)
    answer = inputs.gather(1, first + 1)
    inputs.scatter_(1, first, MARK)
    inputs[:, -1] = MARK
    labels = torch.full_like(inputs, IGNORED)
    labels[:, -1:] = answer
    return inputs, labels
