"""Splat attention in chunks: the portable fast path, on CPU and GPU, forward and backward.

A running mean is a rescaled receive weight (read = receive / mass), so the mix is linear attention with an M-wide
positive key: within a chunk of C tokens a C x C product, across chunks the state.

    y_i = sum_{j <= i, same chunk} <read_i, send_j> v_j + <read_i, total before the chunk>

The sequence is worked through in blocks of chunks that fit in the cache, the state carried from block to block. Nothing
of size T x T, T x M x D or T x M x P exists: the largest arrays are T x C and (T / C) x M x D, and C >= M.
"""

# B batch, T target token, S source token, H head, N chunk, C token in a chunk, M splat, D value width, P position width

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from .decay import decayed_cumsum, decayed_scores, log_decay_after
from .routing import Router
from .splats import MIN_MASS, Sources, SplatState, Targets, split
from .transform import Transform, transformed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

MIN_CHUNK = 64  # fewer tokens make the matrix products too small to be quick
BLOCK_ROWS = 8192  # tokens x heads x batch worked on at once: a few MiB an array, so that it stays in the cache


class _Checkpointing(local):
    """Set by `checkpointed_blocks`, for each thread. Not a `ContextVar`, which a compiler cannot trace."""

    active = False


_checkpointing = _Checkpointing()


def chunked(
    sources: Sources, targets: Targets, router: Router, state: SplatState, *, causal: bool
) -> tuple[Float[Tensor, "B T H D"], SplatState]:
    """Output and final state, by blocks of chunks."""
    batch, num_sources, num_heads, width = sources.values.shape
    num_targets = targets.positions.shape[1]
    chunk_size = max(MIN_CHUNK, router.splats.num_splats)
    block_size = max(1, BLOCK_ROWS // max(1, batch * num_heads * chunk_size)) * chunk_size

    output = Output(num_targets)
    if causal:
        sizes = block_sizes(num_sources, block_size, chunk_size)
        for here, there in zip(split(sources, sizes), split(targets, sizes), strict=True):
            length = min(chunk_size, here.values.shape[1])
            block, state = work_through(_mix_block, here, there, router, state, length)
            output.append(block)
    else:
        for here in split(sources, block_sizes(num_sources, block_size)):
            state = work_through(_collect_block, here, router, state)
        means = transformed(state.contents(router.routing.running_mean), router.transform)
        for there in split(targets, block_sizes(num_targets, block_size)):
            output.append(work_through(read_block, there, means, router))
    return output.join(state.total.new_empty(batch, num_heads, 0, width)), state


@contextmanager
def checkpointed_blocks(active: bool = True) -> Iterator[None]:
    """Within it, the backward pass of `chunked` computes each block once more instead of keeping what it computed.

    What is kept of a block is its inputs and the state before it, for the price of a second forward pass. Over many
    blocks that is less than half of the memory (`python -m benchmarks.training_memory`). No number changes.

    Example:
        >>> from splatflow.ops import Splats, splat_attention
        >>> positions, values = torch.zeros(1, 3, 1, 2), torch.ones(1, 3, 1, 1, requires_grad=True)
        >>> splats = Splats(torch.zeros(1, 1, 2), torch.zeros(1, 1), torch.zeros(1, 1))
        >>> with checkpointed_blocks():
        ...     output, _ = splat_attention(positions, positions, values, splats)
        >>> output.sum().backward()
    """
    outer, _checkpointing.active = _checkpointing.active, active
    try:
        yield
    finally:
        _checkpointing.active = outer


def work_through(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, computed again in the backward pass if blocks are checkpointed."""
    if not (_checkpointing.active and torch.is_grad_enabled()):
        return function(*arguments)
    # tensors inside of tuples would be kept alive unseen by a checkpoint around this one
    leaves, structure = tree_flatten(arguments)
    return checkpoint(
        lambda *leaves: function(*tree_unflatten(leaves, structure)),
        *leaves,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing is random
    )


def _mix_block(
    sources: Sources, targets: Targets, router: Router, state: SplatState, length: int
) -> tuple[Float[Tensor, "B H S D"], SplatState]:
    """A block of whole chunks of `length` tokens, causal."""
    output, state = mix_chunks(
        in_chunks(router.send(sources).transpose(1, 2), length),
        in_chunks(router.receive(targets).transpose(1, 2), length),
        in_chunks(sources.values.transpose(1, 2).to(state.total.dtype), length).contiguous(),  # for several products
        None if sources.log_decay is None else in_chunks(sources.log_decay.transpose(1, 2), length),
        state,
        router.routing.running_mean,
        router.transform,
    )
    return output.flatten(2, 3), state


def _collect_block(sources: Sources, router: Router, state: SplatState) -> SplatState:
    """The state after a block, not causal."""
    weights = router.send(sources).transpose(1, 2)
    values = sources.values.transpose(1, 2).to(state.total.dtype)
    return SplatState(state.mass + weights.sum(2), state.total + weights.mT @ values)


def read_block(targets: Targets, means: Float[Tensor, "B H M D"], router: Router) -> Float[Tensor, "B H T D"]:
    """What a block of targets finds, not causal."""
    return router.receive(targets).transpose(1, 2) @ means


class Output:
    """Blocks of an output, put end to end.

    Without gradients each is written where it belongs at once. To keep them all and copy them at the end would touch
    new memory twice, which for a long sequence costs more than the arithmetic.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens, self.num_written = num_tokens, 0
        self.blocks: list[Float[Tensor, "B H t D"]] = []
        self.whole: Float[Tensor, "B T H D"] | None = None

    def append(self, block: Float[Tensor, "B H t D"]) -> None:
        if block.requires_grad:
            self.blocks.append(block)
            return
        if self.whole is None:
            batch, num_heads, _, width = block.shape
            self.whole = block.new_empty(batch, self.num_tokens, num_heads, width)
        start, self.num_written = self.num_written, self.num_written + block.shape[2]
        self.whole[:, start : self.num_written] = block.transpose(1, 2)

    def join(self, nothing: Float[Tensor, "B H 0 D"]) -> Float[Tensor, "B T H D"]:
        """All blocks; `nothing` if there were none."""
        return torch.cat(self.blocks or [nothing], 2).transpose(1, 2) if self.whole is None else self.whole


def mix_chunks(
    send: Float[Tensor, "B H N C M"],
    receive: Float[Tensor, "B H N C M"],
    values: Float[Tensor, "B H N C D"],
    log_decay: Float[Tensor, "B H N C #M"] | None,
    state: SplatState,
    running_mean: bool,
    transform: Transform | None = None,
) -> tuple[Float[Tensor, "B H N C D"], SplatState]:
    """All chunks of a block at once: what each sends on, what each finds, what each token reads."""
    if log_decay is None:
        mass, total, state = running_state(send.sum(3), send.mT @ values, None, state)
        mass_here = mass[..., None, :] + send.cumsum(3)
        read = receive / mass_here.clamp_min(MIN_MASS) if running_mean else receive
        output = _plus((read @ send.mT).tril_() @ values, read, total)
        if transform is not None:
            heard = _heard(total, transform) + (send * _listened(values, transform)).cumsum(3)
            output = output + (read * heard) @ transform.say[:, None]
        return output, state

    left = send * log_decay_after(log_decay).exp()  # what is left of a token at the end of its chunk
    mass, total, state = running_state(left.sum(3), left.mT @ values, log_decay.sum(3), state)
    kept = log_decay.cumsum(3).exp()  # what is left, at a token, of the state before its chunk
    mass_here = kept * mass[..., None, :] + decayed_cumsum(send, log_decay)
    read = receive / mass_here.clamp_min(MIN_MASS) if running_mean else receive
    output = _plus(decayed_scores(read, send, log_decay) @ values, read * kept, total)
    if transform is not None:
        sent = decayed_cumsum(send * _listened(values, transform), log_decay)
        output = output + (read * (kept * _heard(total, transform) + sent)) @ transform.say[:, None]
    return output, state


def _plus(
    terms: Float[Tensor, "B H N C D"], read: Float[Tensor, "B H N C M"], total: Float[Tensor, "B H N M D"]
) -> Float[Tensor, "B H N C D"]:
    """terms + read @ total, in the place of the terms."""
    return terms.flatten(0, 2).baddbmm_(read.flatten(0, 2), total.flatten(0, 2)).view_as(terms)


def _listened(values: Float[Tensor, "B H N C D"], transform: Transform) -> Float[Tensor, "B H N C M"]:
    """How much there is in each value of what each splat listens for: its sum runs on as a mass does."""
    return values @ transform.listen.mT[:, None]


def _heard(total: Float[Tensor, "B H N M D"], transform: Transform) -> Float[Tensor, "B H N 1 M"]:
    """How much there is of it in each total, before each chunk."""
    return (total * transform.listen[:, None]).sum(-1)[..., None, :]


def running_state(
    mass: Float[Tensor, "B H N M"],
    total: Float[Tensor, "B H N M D"],
    log_decay: Float[Tensor, "B H N #M"] | None,
    state: SplatState,
) -> tuple[Float[Tensor, "B H N M"], Float[Tensor, "B H N M D"], SplatState]:
    """From what each chunk adds: the state before each chunk, and the state after the last."""
    masses = running(mass[..., None], state.mass[..., None], log_decay)[..., 0]
    totals = running(total, state.total, log_decay)
    # a view would keep the states of all chunks alive for as long as the last one
    last = SplatState(masses[:, :, -1].clone(), totals[:, :, -1].clone())
    return masses[:, :, :-1], totals[:, :, :-1], last


def running(
    terms: Float[Tensor, "B H N M X"], start: Float[Tensor, "B H M X"], log_decay: Float[Tensor, "B H N #M"] | None
) -> Float[Tensor, "B H N+1 M X"]:
    """At the start and after each term, what is left of the start and of the terms so far."""
    terms = torch.cat([start[:, :, None], terms], 2)
    if log_decay is None:
        return terms.cumsum(2)
    steps = F.pad(log_decay, (0, 0, 1, 0)).mT[..., None]  # [B, H, M, N + 1, 1]; the start has nothing to forget
    return decayed_cumsum(terms.transpose(2, 3), steps).transpose(2, 3)


def in_chunks(part: Float[Tensor, "B H S X"], length: int) -> Float[Tensor, "B H N C X"]:
    return part.unflatten(2, (-1, length))


def block_sizes(num_tokens: int, block_size: int, chunk_size: int = 1) -> list[int]:
    """Whole blocks, what whole chunks remain, and the rest.

    >>> block_sizes(17, block_size=6, chunk_size=3)
    [6, 6, 3, 2]
    """
    whole = num_tokens - num_tokens % chunk_size
    rest = whole % block_size
    return [block_size] * (whole // block_size) + [size for size in (rest, num_tokens - whole) if size]
