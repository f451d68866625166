"""Splat attention of Gaussians that end: splats that are out of reach of a chunk of tokens are not worked on.

For the chunks of a block, `slots.py` says which groups of splats they need and how their tokens weigh them. Within a
chunk it is the mix of `chunked`, summed over the slots; what is carried from chunk to chunk has all splats, so that
those which are skipped forget like the others.

Which groups a token shares its chunk's arithmetic with depends on later tokens, but no bit of its output does.
"""

# B batch, T target token, S source token, L token of a block, H head, N chunk, X chunk of a head, C token in a chunk,
# M splat, G group, E splat in a group, D value width, P position width

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING

import torch

from .blocks import Output, block_sizes
from .chunked import chunked, read_block, running_state
from .decay import decayed_cumsum, decayed_scores, log_decay_after, pairwise_decay
from .routing import ROUTINGS, Router
from .slots import Groups, Slot, grouped, in_chunks, needed, of_slots, reordered, sent, slots_of, weights
from .splats import MIN_MASS, Sources, Splats, SplatState, Targets, Tokens, each, inner_dtype, split
from .transform import transformed

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

CHUNK = 64  # the fewer tokens, the fewer splats they need
BLOCK_ROWS = 4096  # tokens x heads worked on at once
# Where skipping has been measured to pay: shorter sequences and fewer splats are left to `chunked`, and so are blocks
# of which less than this share would be skipped.
SHORTEST, FEWEST_SPLATS, LEAST_SKIPPED = 512, 128, 0.5


def reach(
    sources: Sources, targets: Targets, router: Router, state: SplatState, *, causal: bool
) -> tuple[Float[Tensor, "B T H D"], SplatState]:
    """Output and final state, sequence by sequence: what one needs is no other's concern."""
    num_tokens = max(sources.values.shape[1], targets.positions.shape[1])
    if num_tokens < SHORTEST or router.splats.num_splats < FEWEST_SPLATS or len(sources.values) == 0:
        return chunked(sources, targets, router, state, causal=causal)
    groups = grouped(router, inner_dtype(sources.positions.dtype))
    outputs, masses, totals = [], [], []
    one_each = [1] * sources.values.shape[0]
    sequences = zip(*(split(part, one_each, 0) for part in (sources, targets, state)), strict=True)
    for senders, receivers, before in sequences:
        output, (mass, total) = one_sequence(senders, receivers, before, router, groups, causal)
        outputs.append(output)
        masses.append(mass)
        totals.append(total)
    return torch.cat(outputs), SplatState(torch.cat(masses), torch.cat(totals))


def one_sequence(
    sources: Sources, targets: Targets, state: SplatState, router: Router, groups: Groups, causal: bool
) -> tuple[Float[Tensor, "1 T H D"], SplatState]:
    """By blocks of chunks, each as `chunked` does it where skipping would not pay."""
    output = Output(targets.positions.shape[1])
    running_mean = router.routing.running_mean
    sending, receiving = probed_blocks(sources, causal), probed_blocks(targets, causal)
    if causal:
        for (here, length, before), (there, _, before_there) in zip(sending, receiving, strict=True):
            if pays(groups, before, before_there):
                block, state = mix_slots(here, there, groups, state, length, running_mean)
            else:
                whole, state = chunked(here, there, router, state, causal=True)
                block = whole.transpose(1, 2)
            output.append(block)
    else:
        for here, length, probe in sending:
            if pays(groups, probe):
                state = collect_slots(here, groups, state, length)
            else:
                nobody = each(lambda part: part[:, :0], targets)
                _, state = chunked(here, nobody, router, state, causal=False)
        means = transformed(state.contents(running_mean), router.transform)
        for there, length, its_probe in receiving:
            if pays(groups, its_probe):
                output.append(read_slots(there, means, groups, length))
            else:
                output.append(read_block(there, means, router))
    return output.join(state.total.new_empty(1, 0, state.mass.shape[1], state.total.shape[-1])), state


def probed_blocks(tokens: Tokens, causal: bool) -> list[tuple[Tokens, int, Tokens]]:
    """Blocks of tokens, the chunk length in each, and the chunk that tells whether to skip there.

    If causal that is the chunk before, which all tokens of the block may know of; the first chunk has none before it.
    """
    num_tokens, num_heads = tokens[0].shape[1:3]
    size = max(1, BLOCK_ROWS // (num_heads * CHUNK)) * CHUNK
    first = [min(CHUNK, num_tokens)] if causal and num_tokens else []
    pieces = split(tokens, [*first, *block_sizes(num_tokens - sum(first), size, CHUNK)])
    lengths = [min(CHUNK, piece[0].shape[1]) for piece in pieces]
    if causal:
        probes = [
            each(lambda part: part[:, :0], tokens),
            *(each(lambda part: part[:, -CHUNK:], piece) for piece in pieces),
        ]
    else:
        probes = [each(lambda part: part[:, :CHUNK], piece) for piece in pieces]
    return list(zip(pieces, lengths, probes, strict=False))  # of what comes after the last block nothing is asked


def pays(groups: Groups, *probe: Sources | Targets) -> bool:
    """Whether the tokens of a chunk, on all sides, leave so many groups alone that skipping is worth its price."""
    length = probe[0].positions.shape[1]  # no gradient goes this way
    if length == 0:
        return False
    need = reduce(torch.logical_or, [needed(part, groups, length) for part in probe])
    return 1.0 - share_kept(need) >= LEAST_SKIPPED


def share_kept(need: Bool[Tensor, "X G"]) -> float:
    """The share of the groups that are worked on, which the chunk decides that needs the most."""
    return max(1, int(need.sum(-1).amax())) / need.shape[-1]


def skipped_share(
    send_positions: Float[Tensor, "B S H P"],
    receive_positions: Float[Tensor, "B T H P"],
    splats: Splats,
    *,
    causal: bool = True,
) -> Float[Tensor, " B"]:
    """What share of all pairs of a token that sends or receives and a splat the backend "reach" leaves out.

    Of each sequence, and whatever its length and the number of splats. Whole groups are left out, of all chunks of a
    block and all heads as many as where the fewest are.

    Raises:
        ValueError: not as many heads receive as send.

    Example:
        >>> centers = torch.tensor([0.0, 0.1, 100.0, 100.1]).view(1, 4, 1)  # two groups
        >>> splats = Splats(centers, *(torch.zeros(1, 4),) * 3)
        >>> skipped_share(torch.zeros(1, 128, 1, 1), torch.zeros(1, 128, 1, 1), splats).item()  # not in the first chunk
        0.25
    """
    if receive_positions.shape[2] != send_positions.shape[2]:
        raise ValueError(
            f"receive_positions has {receive_positions.shape[2]} heads, expected {send_positions.shape[2]} as in "
            "send_positions: give each receiving head its sending one"
        )
    groups = grouped(Router(ROUTINGS["compact"], splats, None), inner_dtype(send_positions.dtype))
    shares = []
    for send, receive in zip(send_positions.split(1), receive_positions.split(1), strict=True):
        blocks = [probed_blocks(Targets(side, None), causal) for side in (send, receive)]
        pairs = skipped = 0.0
        for together in zip(*blocks, strict=True) if causal else [(block,) for side in blocks for block in side]:
            rows = sum(tokens.positions.shape[1] for tokens, _, _ in together)
            pairs += rows
            if pays(groups, *(probe for _, _, probe in together)):
                need = [needed(tokens, groups, length) for tokens, length, _ in together]
                skipped += rows * (1.0 - share_kept(reduce(torch.logical_or, need)))
        shares.append(skipped / max(1.0, pairs))
    return torch.tensor(shares)


def mix_slots(
    sources: Sources, targets: Targets, groups: Groups, state: SplatState, length: int, running_mean: bool
) -> tuple[Float[Tensor, "B H L D"], SplatState]:
    """A block of whole chunks of `length` tokens, causal."""
    need = needed(sources, groups, length) | needed(targets, groups, length)
    slots = slots_of(need, groups, sources.positions.shape[1] // length)
    send = sent(sources, slots, length)
    receive = weights(targets.positions, targets.bias, slots, length)
    values = in_chunks(sources.values, length).to(state.total.dtype)
    decays: Sequence[Tensor | None] = [None] * len(slots)
    log_decay, left = None, send
    if sources.log_decay is not None:
        log_decay = in_chunks(sources.log_decay, length)  # [X, C, #M]
        decays = of_slots(log_decay, slots)
        left = [part * log_decay_after(decay).exp() for part, decay in zip(send, decays, strict=True)]
    masses, totals, state = carried(left, values, log_decay, slots, groups, reordered(state, groups.order))

    scores = values.new_zeros(values.shape[0], length, length)
    output = torch.zeros_like(values)
    by_head = log_decay is not None and log_decay.shape[-1] == 1  # then scores decay alike, and do so at the end
    for slot, out, into, decay, mass, total in zip(slots, receive, send, decays, masses, totals, strict=True):
        read, read_before = reading(out, into, decay, mass, running_mean)
        if decay is None or by_head:
            scores = torch.baddbmm(scores, read, into.mT)
        else:
            scores = scores + decayed_scores(read, into, decay)
        output = torch.baddbmm(output, read_before, total)
        if slot.transform is not None:
            heard = running(into * (values @ slot.transform.listen.mT), decay)
            heard_before = (total * slot.transform.listen).sum(-1)[:, None]
            output = torch.baddbmm(output, read * heard + read_before * heard_before, slot.transform.say)
    if log_decay is not None and by_head:
        scores = scores * pairwise_decay(log_decay[..., 0])
    output = torch.baddbmm(output, scores.tril(), values).unflatten(0, (*state.mass.shape[:2], -1)).flatten(2, 3)
    return output, reordered(state, groups.order.argsort(-1))


def reading(
    receive: Float[Tensor, "X C E"],
    send: Float[Tensor, "X C E"],
    log_decay: Float[Tensor, "X C #E"] | None,
    mass: Float[Tensor, "X E"],
    running_mean: bool,
) -> tuple[Float[Tensor, "X C E"], Float[Tensor, "X C E"]]:
    """With which weights tokens read what was sent to a slot in their chunk, and what was there before it."""
    kept = None if log_decay is None else log_decay.cumsum(1).exp()
    before = mass[:, None] if kept is None else kept * mass[:, None]
    read = receive / (before + running(send, log_decay)).clamp_min(MIN_MASS) if running_mean else receive
    return read, read if kept is None else read * kept


def running(terms: Float[Tensor, "X C E"], log_decay: Float[Tensor, "X C #E"] | None) -> Float[Tensor, "X C E"]:
    """Sums within a chunk so far."""
    return terms.cumsum(1) if log_decay is None else decayed_cumsum(terms, log_decay)


def collect_slots(sources: Sources, groups: Groups, state: SplatState, length: int) -> SplatState:
    """The state after a block, not causal."""
    slots = slots_of(needed(sources, groups, length), groups, sources.positions.shape[1] // length)
    values = in_chunks(sources.values, length).to(state.total.dtype)
    mass, total = spread(sent(sources, slots, length), values, slots, groups)
    shape = (*state.mass.shape[:2], -1, groups.numbers[0].numel())
    added = SplatState(mass.view(shape).sum(2), total.view(*shape, values.shape[-1]).sum(2))
    added = reordered(added, groups.order.argsort(-1))
    return SplatState(state.mass + added.mass, state.total + added.total)


def read_slots(
    targets: Targets, means: Float[Tensor, "B H M D"], groups: Groups, length: int
) -> Float[Tensor, "B H L D"]:
    """What a block of targets finds, not causal."""
    batch, num_heads, _, width = means.shape
    num_chunks = targets.positions.shape[1] // length
    slots = slots_of(needed(targets, groups, length), groups, num_chunks)
    found = means.gather(2, groups.order[..., None].expand_as(means))
    found = found.flatten(0, 1).unflatten(1, (groups.num_groups, -1)).flatten(0, 1)  # [B H G, E, D]
    output = means.new_zeros(batch * num_heads * num_chunks, length, width)
    for slot, receive in zip(slots, weights(targets.positions, targets.bias, slots, length), strict=True):
        chunk, group = slot.rows // groups.num_groups, slot.rows % groups.num_groups
        rows = (chunk // num_chunks) * groups.num_groups + group
        output = torch.baddbmm(output, receive, found.index_select(0, rows))
    return output.unflatten(0, (batch, num_heads, -1)).flatten(2, 3)


def carried(
    left: Sequence[Float[Tensor, "X C E"]],
    values: Float[Tensor, "X C D"],
    log_decay: Float[Tensor, "X C #M"] | None,
    slots: Sequence[Slot],
    groups: Groups,
    state: SplatState,
) -> tuple[Sequence[Float[Tensor, "X E"]], Sequence[Float[Tensor, "X E D"]], SplatState]:
    """From what each chunk adds: mass and total before it, for each slot, and the state after the last."""
    mass, total = spread(left, values, slots, groups)  # [X G, E], [X G, E, D]
    shape = (*state.mass.shape[:2], -1, groups.numbers[0].numel())
    steps = None
    if log_decay is not None:
        steps = log_decay.sum(1).unflatten(0, shape[:3])  # [B, H, N, #M]
        if steps.shape[-1] > 1:
            steps = steps.gather(-1, groups.order[:, None].expand_as(steps))
    masses, totals, state = running_state(mass.view(shape), total.view(*shape, values.shape[-1]), steps, state)

    def pick(part: Tensor) -> Sequence[Tensor]:
        rows = part.flatten(0, 2).unflatten(1, (groups.num_groups, -1)).flatten(0, 1)  # [X G, E, ...]
        return [rows.index_select(0, slot.rows) for slot in slots]

    return pick(masses), pick(totals), state


def spread(
    send: Sequence[Float[Tensor, "X C E"]], values: Float[Tensor, "X C D"], slots: Sequence[Slot], groups: Groups
) -> tuple[Float[Tensor, "XG E"], Float[Tensor, "XG E D"]]:
    """What each chunk adds to the mass and to the total of every splat: nothing to those it skips."""
    rows = torch.cat([slot.rows for slot in slots])
    mass = values.new_zeros(values.shape[0] * groups.num_groups, groups.numbers.shape[2])
    total = values.new_zeros(*mass.shape, values.shape[-1])
    return (
        mass.index_copy(0, rows, torch.cat([part.sum(1) for part in send])),
        total.index_copy(0, rows, torch.cat([part.mT @ values for part in send])),
    )
