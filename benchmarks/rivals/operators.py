"""The operators of the rivals, in parallel over chunks of tokens: small, plain torch, forward and backward.

All take and give [B, T, H, X], begin with an empty memory and return the output alone. Scaling of queries is the
caller's. Exponents are sums of log-decays, never positive, so no decay is too strong.
"""

# B batch, T token, H head, N chunk, C token in a chunk, P key width, D value width, M slot

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from splatflow.ops.chunked import mix_chunks
from splatflow.ops.decay import log_decay_after, pairwise_decay, sums_within_blocks
from splatflow.ops.splats import SplatState

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

CHUNK = 32
LEAST = 1e-6  # added to normalisers


def gated_linear_attention(
    queries: Float[Tensor, "B T H P"],
    keys: Float[Tensor, "B T H P"],
    values: Float[Tensor, "B T H D"],
    log_decay: Float[Tensor, "B T H #P"] | None = None,
) -> Float[Tensor, "B T H D"]:
    """S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t.

    Splats without their mean are this operator, with send weights as keys and receive weights as queries. One decay for
    all of a key is the scalar gate of Mamba-2; one for each of its channels is GLA.

    Source: Yang et al. 2024 (GLA); Dao and Gu 2024 (Mamba-2, state-space duality).
    """
    length = queries.shape[1]
    batch, _, num_heads, width = keys.shape
    nothing = SplatState(
        keys.new_zeros(batch, num_heads, width), keys.new_zeros(batch, num_heads, width, values.shape[-1])
    )
    steps = None if log_decay is None else _in_chunks(log_decay)
    output, _ = mix_chunks(
        *(_in_chunks(keys), _in_chunks(queries)[:, :, :, None], _in_chunks(values), steps, nothing),
        running_mean=False,
    )
    return _whole(output[:, :, :, 0], length)


def normalised_linear_attention(
    queries: Float[Tensor, "B T H P"], keys: Float[Tensor, "B T H P"], values: Float[Tensor, "B T H D"]
) -> Float[Tensor, "B T H D"]:
    """o_t = sum_{j <= t} <q_t, k_j> v_j / sum_{j <= t} <q_t, k_j>, for features that are not negative."""
    weights = (queries * keys.cumsum(1)).sum(-1, keepdim=True)
    return gated_linear_attention(queries, keys, values) / (weights + LEAST)


def linear_attention(
    queries: Float[Tensor, "B T H P"], keys: Float[Tensor, "B T H P"], values: Float[Tensor, "B T H D"]
) -> Float[Tensor, "B T H D"]:
    """Linear attention with the features elu(x) + 1. Source: Katharopoulos et al. 2020."""
    return normalised_linear_attention(F.elu(queries) + 1, F.elu(keys) + 1, values)


def taylor_features(inputs: Float[Tensor, "B T H P"]) -> Float[Tensor, "B T H F"]:
    """F = 1 + P + P (P + 1) / 2 features whose products are 1 + s + s^2 / 2 of the product s: exp, to second order.

    Example:
        >>> x, y = torch.randn(2, 1, 1, 1, 5).unbind()
        >>> product = (x * y).sum()
        >>> bool(((taylor_features(x) * taylor_features(y)).sum() - (1 + product + product**2 / 2)).abs() < 1e-5)
        True
    """
    width = inputs.shape[-1]
    row, column = torch.triu_indices(width, width, device=inputs.device)
    # off the diagonal each product stands for two terms of the square
    factor = torch.where(row == column, 0.5, 1.0).to(inputs.dtype).sqrt()
    squares = inputs[..., row] * inputs[..., column] * factor
    return torch.cat([torch.ones_like(inputs[..., :1]), inputs, squares], -1)


def based(
    queries: Float[Tensor, "B T H P"], keys: Float[Tensor, "B T H P"], values: Float[Tensor, "B T H D"]
) -> Float[Tensor, "B T H D"]:
    """Linear attention with exp(<q, k>) to second order as its kernel. Source: Arora et al. 2024 (Based)."""
    return normalised_linear_attention(taylor_features(queries), taylor_features(keys), values)


def gated_delta_rule(
    queries: Float[Tensor, "B T H P"],
    keys: Float[Tensor, "B T H P"],
    values: Float[Tensor, "B T H D"],
    log_decay: Float[Tensor, "B T H"],
    strength: Float[Tensor, "B T H"],
) -> Float[Tensor, "B T H D"]:
    """S_t = exp(g_t) (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, o_t = S_t^T q_t.

    Within a chunk what each token writes depends on what the tokens before it wrote: a unit triangular system, solved
    once for values and for what is taken off the state before the chunk.

    Source: Yang et al. 2024 (gated delta networks), in the form of Yang et al. 2024 (parallel delta rule).
    """
    length = queries.shape[1]
    queries, keys, values = map(_in_chunks, (queries, keys, values))  # [B, H, N, C, X]
    log_decay, strength = (_in_chunks(part[..., None])[..., 0] for part in (log_decay, strength))  # [B, H, N, C]
    decay = pairwise_decay(log_decay).tril()  # [B, H, N, C, C]
    kept = log_decay.cumsum(-1).exp()[..., None]  # of the state before the chunk
    left = keys * log_decay_after(log_decay[..., None]).exp()  # of a key at the end of its chunk
    scores = (queries @ keys.mT) * decay
    weak = keys * strength[..., None]
    system = ((weak @ keys.mT) * decay).tril(-1)
    sides = torch.cat([values * strength[..., None], weak * kept], -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    written, erased = solved.split([values.shape[-1], keys.shape[-1]], -1)

    state = keys.new_zeros(*keys.shape[:2], keys.shape[-1], values.shape[-1])
    outputs = []
    for chunk in range(keys.shape[2]):
        new = written[:, :, chunk] - erased[:, :, chunk] @ state
        outputs.append((queries * kept)[:, :, chunk] @ state + scores[:, :, chunk] @ new)
        state = state * kept[:, :, chunk, -1, :, None] + left[:, :, chunk].mT @ new
    return _whole(torch.stack(outputs, 2), length)


def slot_attention(
    queries: Float[Tensor, "B T H P"],
    keys: Float[Tensor, "B T H P"],
    values: Float[Tensor, "B T H D"],
    write: Float[Tensor, "B T H M"],
    log_decay: Float[Tensor, "B T H M"],
) -> Float[Tensor, "B T H D"]:
    """Slots m hold a key and a value; both forget and take in what is written; softmax over slots reads.

        K_tm = exp(g_tm) K_{t-1, m} + w_tm k_t,   V_tm = exp(g_tm) V_{t-1, m} + w_tm v_t
        o_t = sum_m softmax_m(<q_t, K_tm>) V_tm

    Source: Zhang et al. 2024 (Gated Slot Attention); ABC (Peng et al. 2022) and Raven write and forget otherwise.
    """
    return gated_linear_attention(_slot_scores(queries, keys, write, log_decay).softmax(-1), write, values, log_decay)


def _slot_scores(
    queries: Float[Tensor, "B T H P"],
    keys: Float[Tensor, "B T H P"],
    write: Float[Tensor, "B T H M"],
    log_decay: Float[Tensor, "B T H M"],
) -> Float[Tensor, "B T H M"]:
    """<q_t, K_tm>: linear attention whose decay stands on the side of the values, here the writes.

    Pairs of tokens in a chunk are sorted by the level of a binary tree at which they part, as in `decayed_scores`.
    """
    length = queries.shape[1]
    queries, keys, write, log_decay = map(_in_chunks, (queries, keys, write, log_decay))  # [B, H, N, C, X]
    scores = queries @ keys.mT
    output = scores.diagonal(dim1=-2, dim2=-1)[..., None] * write
    index = torch.arange(queries.shape[3], device=queries.device)
    half = 1
    while half < len(index):
        since, until = sums_within_blocks(log_decay, half)
        block = index // half
        parts_here = (block[:, None] % 2 == 1) & (block == block[:, None] - 1)
        output = output + since.exp() * ((scores * parts_here) @ (write * until.exp()))
        half *= 2

    added = (write * log_decay_after(log_decay).exp()).mT @ keys  # [B, H, N, M, P]
    kept = log_decay.sum(3).exp()[..., None]
    state, before = torch.zeros_like(added[:, :, 0]), []
    for chunk in range(added.shape[2]):
        before.append(state)
        state = state * kept[:, :, chunk] + added[:, :, chunk]
    earlier = queries @ torch.stack(before, 2).mT
    return _whole(output + log_decay.cumsum(3).exp() * earlier, length)


def _in_chunks(part: Float[Tensor, "B T H X"]) -> Float[Tensor, "B H N C X"]:
    """Padded with zeros at the end: tokens that write nothing and forget nothing."""
    size = min(CHUNK, part.shape[1])
    padded = F.pad(part, (0, 0, 0, 0, 0, -part.shape[1] % size))
    return padded.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4)


def _whole(part: Float[Tensor, "B H N C X"], length: int) -> Float[Tensor, "B T H X"]:
    return part.flatten(2, 3).transpose(1, 2)[:, :length]
