"""The exact near memory beside the splats: softmax attention over the last few tokens, with rotary positions.

Tokens come with the `window_size` tokens before them (the window's memory). Token i of T hears the sources i + 1 to
i + window_size of those window_size + T, the last of which is itself.
"""

# B batch, T target token, S source token (window_size + T), H head, G head of keys, P position width, D value width
# N block, Q query in a block, K key of a block

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .splats import inner_dtype

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

THETA = 10000.0  # pairs of numbers turn at rates from 1 to nearly 1 / THETA a token
MIN_BLOCK = 32  # queries worked on together; fewer make the matrix products too small to be quick


def rotate(vectors: Float[Tensor, "... L H P"], start: int = 0, theta: float = THETA) -> Float[Tensor, "... L H P"]:
    """Rotary position embedding: turns each pair of components by the token's index, counted from `start`.

    The scalar product of two rotated vectors depends on the difference of their indices alone. Source: Su et al. 2021.
    """
    length, width = vectors.shape[-3], vectors.shape[-1]
    dtype = inner_dtype(vectors.dtype)  # in bf16 neighbouring indices beyond 256 are one number
    frequency = theta ** (-torch.arange(0, width, 2, device=vectors.device, dtype=dtype) / width)
    angle = torch.arange(start, start + length, device=vectors.device)[:, None, None] * frequency  # [L, 1, P / 2]
    cos, sin = angle.cos().to(vectors.dtype), angle.sin().to(vectors.dtype)
    first, second = vectors.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def for_each_head(part: Float[Tensor, "B S G X"], num_heads: int) -> Float[Tensor, "B S H X"]:
    """Keys or values that several heads share, for each of them.

    Not left to `scaled_dot_product_attention`, which on a CPU takes several times as long to share them.
    """
    return part if part.shape[2] == num_heads else part.repeat_interleave(num_heads // part.shape[2], 2)


def window_attention(
    queries: Float[Tensor, "B T H P"],
    keys: Float[Tensor, "B S G P"],
    values: Float[Tensor, "B S G D"],
    real: Bool[Tensor, "B S"],
) -> Float[Tensor, "B T H D"]:
    """Softmax attention of T tokens, each over the S - T tokens up to and including itself.

    `real` is False for sources that do not exist. Scores are <q, k> / sqrt(P). Blocks of queries meet only the keys
    within their reach, so time and memory are linear in T. Padding hears itself, so that no softmax is empty.
    """
    num_targets = queries.shape[1]
    window_size = keys.shape[1] - num_targets
    block_size = max(1, min(num_targets, max(MIN_BLOCK, window_size)))
    if num_targets == 0:
        return values.new_zeros(values.shape[0], 0, queries.shape[2], values.shape[3])
    overhang = -num_targets % block_size

    query = torch.arange(block_size, device=queries.device)[:, None]
    key = torch.arange(block_size + window_size, device=queries.device)
    near = (key > query) & (key <= query + window_size)  # [Q, K]
    itself = key == query + window_size

    def in_blocks(sources: Tensor) -> Tensor:
        """[B, S, ...] -> [B, N, ..., K]: the keys of neighbouring blocks overlap."""
        padded = F.pad(sources, (0, 0) * (sources.ndim - 2) + (0, overhang))
        return padded.unfold(1, block_size + window_size, block_size)

    mask = (near & in_blocks(real)[:, :, None]) | itself  # [B, N, Q, K]
    block_queries = F.pad(queries, (0, 0, 0, 0, 0, overhang)).unflatten(1, (-1, block_size))  # [B, N, Q, H, P]
    keys, values = (for_each_head(part, queries.shape[2]) for part in (keys, values))
    block_keys, block_values = (in_blocks(part).movedim(-1, 2) for part in (keys, values))  # [B, N, K, H, P]
    output = F.scaled_dot_product_attention(
        rotate(block_queries, start=window_size).transpose(2, 3).flatten(0, 1),
        rotate(block_keys).transpose(2, 3).flatten(0, 1),
        block_values.transpose(2, 3).flatten(0, 1),
        attn_mask=mask.flatten(0, 1)[:, None],
    )  # [B N, H, Q, D]
    return output.unflatten(0, mask.shape[:2]).transpose(2, 3).flatten(1, 2)[:, :num_targets]
