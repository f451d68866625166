"""Splat attention in chunks: the portable fast path, on CPU and GPU, forward and backward.

A running mean is a rescaled receive weight (read = receive / mass), so the mix is linear attention with an M-wide
positive key: within a chunk of C tokens a C x C product, across chunks the state.

    y_i = sum_{j <= i, same chunk} <read_i, send_j> v_j + <read_i, total before the chunk>

The sequence is worked through in blocks of chunks that fit in the cache, the state carried from block to block. Nothing
of size T x T, T x M x D or T x M x P exists: the largest arrays are T x C and (T / C) x M x D, and C >= M.
"""

# B batch, T target token, S source token, H head, R receiving head of a sending one, N chunk, C token in a chunk,
# M splat, D value width, P position width

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .blocks import block_sizes, over_blocks
from .chunk_gradient import mix_chunks_gradient
from .decay import decayed_cumsum, decayed_scores, log_decay_after
from .gradients import Pairs, is_traced
from .heads import as_heads, as_tokens, in_receivers, in_rows
from .routing import Router
from .splats import MIN_MASS, Sources, SplatState, Targets, split
from .transform import Transform, transformed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

MIN_CHUNK = 64  # fewer tokens make the matrix products too small to be quick
BLOCK_ROWS = 4096  # tokens x heads x batch worked on at once, fewer if chunks are longer: 1 MiB an array, for the cache
ROWS_OF_A_GPU = 2**16  # a thousand products of chunks fill one; by count, not measured


def chunked(
    sources: Sources, targets: Targets, router: Router, state: SplatState, *, causal: bool
) -> tuple[Float[Tensor, "B T HR D"], SplatState]:
    """Output and final state, by blocks of chunks; some sequences at a time if they are many."""
    batch, num_heads = len(sources.values), targets.positions.shape[2]
    rows = BLOCK_ROWS if sources.values.device.type == "cpu" else ROWS_OF_A_GPU
    at_once = max(1, rows // max(1, num_heads * max(MIN_CHUNK, router.splats.num_splats)))
    if batch <= 2 * at_once or is_traced():
        return _by_blocks(sources, targets, router, state, causal, rows)
    sizes = block_sizes(batch, at_once)
    senders, receivers = split(sources, sizes, 0), split(targets, sizes, 0)
    if sources.positions is targets.positions:  # they stay one tensor, with one gradient
        receivers = [there._replace(positions=here.positions) for here, there in zip(senders, receivers, strict=True)]
    groups = zip(senders, receivers, split(state, sizes, 0), strict=True)
    found = [_by_blocks(here, there, router, before, causal, rows) for here, there, before in groups]
    mass, total = (torch.cat([after[part] for _, after in found]) for part in (0, 1))
    return torch.cat([output for output, _ in found]), SplatState(mass, total)


def _by_blocks(
    sources: Sources, targets: Targets, router: Router, state: SplatState, causal: bool, rows: int
) -> tuple[Float[Tensor, "B T HR D"], SplatState]:
    """Blocks of about so many rows, a row being a token of a sequence and head."""
    batch, num_sources, _, width = sources.values.shape
    num_targets, num_heads = targets.positions.shape[1:3]
    chunk_size = max(MIN_CHUNK, router.splats.num_splats)
    block_size = max(1, rows * MIN_CHUNK // chunk_size // max(1, batch * num_heads * chunk_size)) * chunk_size

    if causal:
        mix, sizes = partial(_mix_block, chunk_size=chunk_size), block_sizes(num_sources, block_size, chunk_size)
        gradient = None
        if router.transform is None and (sources.log_decay is None or sources.log_decay.shape[-1] == 1):
            gradient = partial(_mix_block_gradient, chunk_size=chunk_size)
        output, state = over_blocks(mix, (sources, targets), router, state, sizes, gradient)
    else:
        _, state = over_blocks(
            _collect_block, sources, router, state, block_sizes(num_sources, block_size), _collect_block_gradient
        )
        means = transformed(state.contents(router.routing.running_mean), router.transform)
        output, _ = over_blocks(
            _read_block, targets, (means, router), (), block_sizes(num_targets, block_size), _read_block_gradient
        )
    return state.total.new_empty(batch, 0, num_heads, width) if output is None else output, state


def _mix_block(
    tokens: tuple[Sources, Targets], router: Router, state: SplatState, chunk_size: int
) -> tuple[Float[Tensor, "B HR S D"], SplatState]:
    """A block of whole chunks, or of fewer tokens than one has, causal."""
    sources, targets = tokens
    length = min(chunk_size, sources.values.shape[1])
    output, state = mix_chunks(
        in_chunks(router.send(sources).transpose(1, 2), length),
        _receive(router, targets, sources.values.shape[2], length),
        in_chunks(sources.values.transpose(1, 2).to(state.total.dtype), length).contiguous(),  # for several products
        None if sources.log_decay is None else in_chunks(sources.log_decay.transpose(1, 2), length),
        state,
        router.routing.running_mean,
        router.transform,
    )
    return as_heads(output), state


def _receive(router: Router, targets: Targets, num_heads: int, length: int) -> Float[Tensor, "B H N R C M"]:
    """How much targets receive, in chunks, by the receiving heads of each of so many that send."""
    count = targets.positions.shape[2] // num_heads
    weights = router.receive(as_tokens(targets, num_heads, length))
    return weights.transpose(1, 2).unflatten(2, (-1, count, length))


def _mix_block_gradient(
    tokens: tuple[Sources, Targets],
    router: Router,
    state: SplatState,
    d_output: Float[Tensor, "B HR S D"] | None,
    d_state: SplatState,
    chunk_size: int,
) -> Pairs:
    """What `_mix_block` mixes, and the gradients by it. From weights to positions and splats autograd finds them."""
    sources, targets = tokens
    length = min(chunk_size, sources.values.shape[1])
    send = in_chunks(router.send(sources).transpose(1, 2), length)
    receive = _receive(router, targets, sources.values.shape[2], length)
    values = in_chunks(sources.values.transpose(1, 2).to(state.total.dtype), length)
    log_decay = None if sources.log_decay is None else in_chunks(sources.log_decay.transpose(1, 2), length)
    if d_output is None:
        d_output = torch.zeros_like(values).repeat_interleave(receive.shape[3], 1).flatten(2, 3)
    given = (send, receive, values, log_decay)
    found = mix_chunks_gradient(
        send.detach(),
        receive.detach(),
        values.detach().contiguous(),
        None if log_decay is None else log_decay.detach(),
        SplatState(*(part.detach() for part in state)),
        router.routing.running_mean,
        in_receivers(d_output.to(values.dtype), values.shape[1], length).contiguous(),
        _known(d_state, state),
    )
    return [*zip(given, found[:4], strict=True), *zip(state, found.state, strict=True)]


def _collect_block(sources: Sources, router: Router, state: SplatState) -> tuple[None, SplatState]:
    """The state after a block, not causal."""
    weights = router.send(sources).transpose(1, 2)
    values = sources.values.transpose(1, 2).to(state.total.dtype)
    return None, SplatState(state.mass + weights.sum(2), state.total + weights.mT @ values)


def read_block(targets: Targets, means: Float[Tensor, "B H M D"], router: Router) -> Float[Tensor, "B HR T D"]:
    """What a block of targets finds, not causal."""
    receive = _receive(router, targets, means.shape[1], targets.positions.shape[1])
    return as_heads(in_rows(receive, means[:, :, None]))


def _read_block(
    targets: Targets, means_and_router: tuple[Float[Tensor, "B H M D"], Router], state: tuple[()]
) -> tuple[Float[Tensor, "B HR T D"], tuple[()]]:
    """`read_block`, for which there is no state to hand on."""
    return read_block(targets, *means_and_router), state


def _collect_block_gradient(
    sources: Sources, router: Router, state: SplatState, d_output: Tensor | None, d_state: SplatState
) -> Pairs:
    """As in `_mix_block_gradient`."""
    weights = router.send(sources).transpose(1, 2)
    values = sources.values.transpose(1, 2).to(weights.dtype)
    d_mass, d_total = _known(d_state, state)
    d_weights = torch.matmul(values.detach(), d_total.mT).add_(d_mass[:, :, None])
    return [(weights, d_weights), (values, weights.detach() @ d_total), (state.mass, d_mass), (state.total, d_total)]


def _read_block_gradient(
    targets: Targets,
    means_and_router: tuple[Float[Tensor, "B H M D"], Router],
    state: tuple[()],
    d_output: Float[Tensor, "B HR T D"] | None,
    d_state: tuple[()],
) -> Pairs:
    """As in `_mix_block_gradient`."""
    means, router = means_and_router
    if d_output is None:
        return []
    receive = _receive(router, targets, means.shape[1], targets.positions.shape[1])
    d_output = in_receivers(d_output.to(means.dtype), means.shape[1], receive.shape[4])
    d_means = receive.detach().flatten(2, 4).mT @ d_output.flatten(2, 4)
    return [(receive, in_rows(d_output, means.detach().mT[:, :, None])), (means, d_means)]


def _known(gradients: SplatState, like: SplatState) -> SplatState:
    """0 for those that are None."""
    pairs = zip(gradients, like, strict=True)
    return SplatState(*(torch.zeros_like(part) if gradient is None else gradient for gradient, part in pairs))


def mix_chunks(
    send: Float[Tensor, "B H N C M"],
    receive: Float[Tensor, "B H N R C M"],
    values: Float[Tensor, "B H N C D"],
    log_decay: Float[Tensor, "B H N C #M"] | None,
    state: SplatState,
    running_mean: bool,
    transform: Transform | None = None,
) -> tuple[Float[Tensor, "B H N R C D"], SplatState]:
    """All chunks of a block at once: what each sends on, what each finds, what each token reads."""
    if log_decay is None:
        mass, total, state = running_state(send.sum(3), send.mT @ values, None, state)
        read = _means(receive, mass[..., None, :] + send.cumsum(3)) if running_mean else receive
        output = _plus(in_rows(in_rows(read, send.mT).tril_(), values), read, total)
        if transform is not None:
            heard = _heard(total, transform) + (send * _listened(values, transform)).cumsum(3)
            output = output + in_rows(read * heard[:, :, :, None], transform.say[:, None])
        return output, state

    left = send * log_decay_after(log_decay).exp()  # what is left of a token at the end of its chunk
    mass, total, state = running_state(left.sum(3), left.mT @ values, log_decay.sum(3), state)
    kept = log_decay.cumsum(3).exp()  # what is left, at a token, of the state before its chunk
    mass_here = kept * mass[..., None, :] + decayed_cumsum(send, log_decay)
    read = _means(receive, mass_here) if running_mean else receive
    scores = decayed_scores(read, send[:, :, :, None], log_decay[:, :, :, None])
    output = _plus(in_rows(scores, values), read * kept[:, :, :, None], total)
    if transform is not None:
        sent = decayed_cumsum(send * _listened(values, transform), log_decay)
        heard = kept * _heard(total, transform) + sent
        output = output + in_rows(read * heard[:, :, :, None], transform.say[:, None])
    return output, state


def _means(receive: Float[Tensor, "B H N R C M"], mass: Float[Tensor, "B H N C M"]) -> Float[Tensor, "B H N R C M"]:
    """The weights that totals are read with so that they are means."""
    return receive / mass[:, :, :, None].clamp_min(MIN_MASS)


def _plus(
    terms: Float[Tensor, "B H N R C D"], read: Float[Tensor, "B H N R C M"], total: Float[Tensor, "B H N M D"]
) -> Float[Tensor, "B H N R C D"]:
    """terms + read @ total, in the place of the terms."""
    rows = terms.flatten(3, 4).flatten(0, 2)
    return rows.baddbmm_(read.flatten(3, 4).flatten(0, 2), total.flatten(0, 2)).view_as(terms)


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
