"""Multi-query associative recall: pairs of keys and values, then the keys again, each asking for its value.

    inputs   k1 v1 k2 v2 k3 v3  ·  k2  ·  ·  k1  ·  k3
    labels    -  -  -  -  -  -  -  v2  -  -  v1  -  v3

Keys come from the first half of the vocabulary, values from the second; a dot is a token drawn from the whole
vocabulary, and `-` is `IGNORED`. Every key is asked for once, at a distance after the pairs drawn from a power law.

Re-bound keys come twice among the pairs, and the value that came last counts. Noise is made of values without a key:

    inputs   k1 v1 v5 v4 k2 v2 k1 v3  ·  k2  k1
    labels    -  -  -  -  -  -  -  -  -  v2  v3

Source: Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models".
"""

# B sequence, T token, K pair, N item (a pair, or two tokens of noise)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from splatflow.requirements import require_integers

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

IGNORED = -100  # the label that cross_entropy leaves out
MOST_POWER = 4.0  # of the law of the gaps: 1 is even, more puts questions far from their pairs


def multi_query_recall(
    seed: int,
    *,
    batch_size: int,
    seq_len: int = 64,
    num_pairs: int = 8,
    vocab_size: int = 256,
    power: float = 0.01,
    num_rebound: int = 0,
    num_noise: int = 0,
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Inputs and labels; the label at a query is the value itself, not the next token.

    Args:
        seed: the same seed gives the same batch.
        num_pairs: different keys, each asked for once.
        power: exponent a of the gaps, drawn with probability proportional to (slot + 1)^(a - 1).
        num_rebound: keys among them that are given a second value, anywhere among the pairs.
        num_noise: items of two tokens of noise among the pairs.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is below 1 or `power` not within 0 and 4, the sequence cannot hold the pairs and their
            queries, the vocabulary has too few keys or values, or more keys are to be bound again than there are.

    Example:
        >>> inputs, labels = multi_query_recall(0, batch_size=2, seq_len=12, num_pairs=3, vocab_size=20)
        >>> list(inputs.shape), (labels != IGNORED).sum(1).tolist()
        ([2, 12], [3, 3])
    """
    require_integers(1, batch_size=batch_size, seq_len=seq_len, num_pairs=num_pairs, vocab_size=vocab_size)
    require_integers(0, num_rebound=num_rebound, num_noise=num_noise)
    if not 0 <= power <= MOST_POWER:
        raise ValueError(f"power is {power}, expected 0 to {MOST_POWER}")
    num_items = num_pairs + num_rebound + num_noise
    num_slots = (seq_len - 2 * num_items) // 2
    half = vocab_size // 2
    if num_rebound > num_pairs:
        raise ValueError(f"num_rebound is {num_rebound}, expected 0 to num_pairs, which is {num_pairs}")
    if num_slots < num_pairs:
        least = 2 * (num_items + num_pairs)
        raise ValueError(
            f"seq_len {seq_len} is too short for num_pairs {num_pairs}, num_rebound {num_rebound} and num_noise "
            f"{num_noise}: at least {least} are needed"
        )
    if half - 1 < num_pairs:
        raise ValueError(f"vocab_size {vocab_size} has {half - 1} keys, fewer than num_pairs {num_pairs}")
    if vocab_size - half < num_pairs + num_rebound:
        raise ValueError(
            f"vocab_size {vocab_size} has {vocab_size - half} values, fewer than num_pairs {num_pairs} and num_rebound "
            f"{num_rebound} together"
        )
    generator = torch.Generator().manual_seed(seed)

    def distinct(count: int, weights: Tensor) -> Int[Tensor, "B K"]:
        return torch.multinomial(weights.expand(batch_size, -1), count, generator=generator)

    keys = 1 + distinct(num_pairs, torch.ones(half - 1))
    values = half + distinct(num_pairs + num_rebound, torch.ones(vocab_size - half))
    slots = distinct(num_pairs, (torch.arange(num_slots) + 1.0) ** (power - 1))
    queries = 2 * num_items + 2 * slots  # every second token may be a query
    inputs = torch.randint(vocab_size, (batch_size, seq_len), generator=generator)

    noise = torch.randint(half, vocab_size, (batch_size, num_noise, 2), generator=generator)
    bound = torch.cat([keys, keys[:, :num_rebound]], 1)
    items = torch.cat([torch.stack([bound, values], -1), noise], 1)  # [B, N, 2]
    places = distinct(num_items, torch.ones(num_items)) if num_rebound or num_noise else torch.arange(num_items)
    places = places.expand(batch_size, -1)
    inputs[:, : 2 * num_items].unflatten(1, (-1, 2)).scatter_(1, places[..., None].expand_as(items), items)
    inputs.scatter_(1, queries, keys)

    again = slice(num_pairs, num_pairs + num_rebound)
    last = values[:, :num_pairs].clone()
    is_later = places[:, again] > places[:, :num_rebound]
    last[:, :num_rebound] = torch.where(is_later, values[:, again], last[:, :num_rebound])
    labels = torch.full_like(inputs, IGNORED).scatter_(1, queries, last)
    return inputs, labels
