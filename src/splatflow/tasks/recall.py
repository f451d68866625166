"""Multi-query associative recall: pairs of keys and values, then the keys again, each asking for its value.

    inputs   k1 v1 k2 v2 k3 v3  ·  k2  ·  ·  k1  ·  k3
    labels    -  -  -  -  -  -  -  v2  -  -  v1  -  v3

Keys come from the first half of the vocabulary, values from the second; a dot is a token drawn from the whole
vocabulary, and `-` is `IGNORED`. Every key is asked for once, at a distance after the pairs drawn from a power law.

Source: Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models".
"""

# B sequence, T token, K pair

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

IGNORED = -100  # the label that cross_entropy leaves out


def multi_query_recall(
    seed: int, *, batch_size: int, seq_len: int = 64, num_pairs: int = 8, vocab_size: int = 256, power: float = 0.01
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Inputs and labels; the label at a query is the value itself, not the next token.

    Args:
        seed: the same seed gives the same batch.
        power: exponent a of the gaps, drawn with probability proportional to (slot + 1)^(a - 1).

    Raises:
        ValueError: the sequence cannot hold the pairs and their queries, or the vocabulary has too few keys.

    Example:
        >>> inputs, labels = multi_query_recall(0, batch_size=2, seq_len=12, num_pairs=3, vocab_size=20)
        >>> list(inputs.shape), (labels != IGNORED).sum(1).tolist()
        ([2, 12], [3, 3])
    """
    num_slots = (seq_len - 2 * num_pairs) // 2
    if num_slots < num_pairs:
        raise ValueError(
            f"seq_len {seq_len} is too short for num_pairs {num_pairs}: at least {4 * num_pairs} are needed"
        )
    half = vocab_size // 2
    if half - 1 < num_pairs:
        raise ValueError(f"vocab_size {vocab_size} has {half - 1} keys, fewer than num_pairs {num_pairs}")
    generator = torch.Generator().manual_seed(seed)

    def distinct(count: int, weights: Tensor) -> Int[Tensor, "B K"]:
        return torch.multinomial(weights.expand(batch_size, -1), count, generator=generator)

    keys = 1 + distinct(num_pairs, torch.ones(half - 1))
    values = half + distinct(num_pairs, torch.ones(vocab_size - half))
    slots = distinct(num_pairs, (torch.arange(num_slots) + 1.0) ** (power - 1))
    queries = 2 * num_pairs + 2 * slots  # every second token may be a query

    inputs = torch.randint(vocab_size, (batch_size, seq_len), generator=generator)
    inputs[:, : 2 * num_pairs] = torch.stack([keys, values], -1).flatten(1)
    inputs.scatter_(1, queries, keys)
    labels = torch.full_like(inputs, IGNORED).scatter_(1, queries, values)
    return inputs, labels
