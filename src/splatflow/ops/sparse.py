"""Splat attention of which a token touches p splats, however many there are: p rows written and p rows read.

Each splat is a row of a table, its total and its mass. A token writes to the rows that it sends to and reads those that
it receives from, which is a `scan`.

Operations a token: the search, p (D + 1) to write and p (D + 1) to read, and a sort of its p events. Memory: p (D + 1)
numbers a token, and one state a block of tokens, of which there are so few that they hold no more than that.
"""

# B batch, T target token, t token of a block, H head, N sequence and head, M splat, p splat touched, E event = t p,
# D value width, X = D + 1 row width

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import kernels
from .blocks import Output, block_sizes
from .chunked import chunked
from .routing import Router
from .scan import scan
from .splats import MIN_MASS, Sources, SplatState, Targets, split

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

BLOCK_TOKENS = 2048  # worked on at once, unless there are so many splats that states would take more than events
EVENTS_AT_ONCE = 2**20  # by kernels, of all sequences and heads: enough for a GPU, and 260 MiB of rows for D = 64
FORGOTTEN = -750.0  # as a log-decay: exp of it is 0 in fp64, and sums of it are still numbers


def sparse(
    sources: Sources, targets: Targets, router: Router, state: SplatState, *, causal: bool
) -> tuple[Float[Tensor, "B T H D"], SplatState]:
    """Output and final state, block by block."""
    batch, num_heads = state.mass.shape[:2]
    if batch == 0:
        return chunked(sources, targets, router, state, causal=causal)
    table = torch.cat([state.total.flatten(0, 1), state.mass.flatten(0, 1)[..., None]], -1)  # [N, M, X], and no view
    output, table = (_causal if causal else _both_ways)(sources, targets, router, table)
    total, mass = table.unflatten(0, (batch, num_heads)).split([table.shape[-1] - 1, 1], -1)
    return output.join(total.new_empty(batch, 0, num_heads, total.shape[-1])), SplatState(mass[..., 0], total)


def _causal(
    sources: Sources, targets: Targets, router: Router, table: Float[Tensor, "N M X"]
) -> tuple[Output, Float[Tensor, "N M X"]]:
    assert router.top_p is not None, "dispatch has seen to it"
    block = block_of(table, router.top_p)
    if sources.log_decay is not None:  # each block keeps a table: as many tokens as make its events no fewer
        block = max(block, -(-router.splats.num_splats // router.top_p))
    output, sizes = Output(targets.positions.shape[1]), block_sizes(sources.values.shape[1], block)
    for here, there in zip(split(sources, sizes), split(targets, sizes), strict=True):
        write_at, rows = written(here, router)
        read_at, weights = read(there, router)
        found, table = scan(table, rows, write_at, read_at, log_kept(here.log_decay), weights.shape[2])
        output.append(heard(found, read_at, weights, router, len(here.values)))
    return output, table


def _both_ways(
    sources: Sources, targets: Targets, router: Router, table: Float[Tensor, "N M X"]
) -> tuple[Output, Float[Tensor, "N M X"]]:
    assert router.top_p is not None, "dispatch has seen to it"
    block = block_of(table, router.top_p)
    for here in split(sources, block_sizes(sources.values.shape[1], block)):
        write_at, rows = written(here, router)
        table.flatten(0, 1).index_add_(0, flat(write_at, table), rows.flatten(0, 1))
    output = Output(targets.positions.shape[1])
    for there in split(targets, block_sizes(targets.positions.shape[1], block)):
        read_at, weights = read(there, router)
        output.append(heard(rows_at(table, read_at), read_at, weights, router, len(there.positions)))
    return output, table


def block_of(table: Float[Tensor, "N M X"], top_p: int) -> int:
    """How many tokens are worked on at once."""
    if kernels.scan_for(table) is None:
        return BLOCK_TOKENS
    return max(1, EVENTS_AT_ONCE // (len(table) * top_p))


def written(sources: Sources, router: Router) -> tuple[Int[Tensor, "N E"], Float[Tensor, "N E X"]]:
    """Where each event of these tokens writes, and what: its share of the value, and the share itself."""
    index, send = router.chosen(sources.positions, sources.bias)
    if (gate := sources.write_gate) is not None:
        send = send * (gate if gate.shape[-1] == 1 else gate.gather(-1, index))
    values = _by_head(sources.values.to(send.dtype))
    values = torch.cat([values, torch.ones_like(values[..., :1])], -1)  # [N, t, X]
    rows = _by_head(send)[..., None] * values[:, :, None]
    return _by_head(index).flatten(1), rows.flatten(1, 2)


def log_kept(log_decay: Float[Tensor, "B t H 1"] | None) -> Float[Tensor, "N t"] | None:
    """The logarithm of what is left, at each token, of what was there before the first."""
    if log_decay is None:
        return None
    return _by_head(log_decay).squeeze(-1).double().clamp_min(FORGOTTEN).cumsum(1)


def read(targets: Targets, router: Router) -> tuple[Int[Tensor, "N E"], Float[Tensor, "N t p"]]:
    """Where each event of these tokens reads, and with which weight."""
    index, receive = router.chosen(*targets)
    return _by_head(index).flatten(1), _by_head(receive)


def heard(
    found: Float[Tensor, "N E X"],
    read_at: Int[Tensor, "N E"],
    weights: Float[Tensor, "N t p"],
    router: Router,
    batch: int,
) -> Float[Tensor, "B H t D"]:
    """What tokens make of the rows that they found: weighted means, or sums."""
    total, mass = found.split([found.shape[-1] - 1, 1], -1)  # and not slices, whose gradients are as large as `found`
    if router.transform is not None:
        listen, say = (rows_at(part.expand(batch, *part.shape).flatten(0, 1), read_at) for part in router.transform)
        total = total + (total * listen).sum(-1, keepdim=True) * say
    if router.routing.running_mean:
        weights = weights / mass.view_as(weights).clamp_min(MIN_MASS)
    heard = (weights[..., None] * total.unflatten(1, weights.shape[1:])).sum(2)
    return heard.unflatten(0, (batch, -1))


def rows_at(rows: Float[Tensor, "N M X"], index: Int[Tensor, "N E"]) -> Float[Tensor, "N E X"]:
    """Some rows of a table."""
    return rows.flatten(0, 1).index_select(0, flat(index, rows)).unflatten(0, index.shape)


def flat(index: Int[Tensor, "N E"], rows: Float[Tensor, "N M X"]) -> Int[Tensor, " places"]:
    """The same rows in `rows.flatten(0, 1)`."""
    return (torch.arange(rows.shape[0], device=index.device)[:, None] * rows.shape[1] + index).flatten()


def _by_head(tokens: Tensor) -> Tensor:
    """[B, t, H, X] -> [N, t, X]."""
    return tokens.transpose(1, 2).flatten(0, 1)
