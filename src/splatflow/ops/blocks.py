"""A sequence worked through in blocks: of a block nothing is kept but the state before it.

The backward pass goes from the last block to the first, computes each once more from its tokens and that state, and
writes its gradients where they belong. So the memory of both passes is that of the tokens and their gradients, and what
a block is made of never leaves the cache.
"""

# B batch, T token, t token of a block, H head, D value width

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .gradients import Pairs, differentiate, is_batch_of_gradients, is_traced
from .splats import inner_dtype

if TYPE_CHECKING:
    from jaxtyping import Float

State = TypeVar("State")
Whole = TypeVar("Whole", Tensor, None)
Tensors = Sequence[Tensor]
# (tokens of a block, what all blocks share, state) -> (output of the block [B, H, t, D] or None, state)
Work = Callable[[Any, Any, Any], tuple[Tensor | None, Any]]
# (tokens, shared, state, gradients by the output of the block and by the state after it) -> pairs that autograd goes on
# from, to the first three
Gradient = Callable[[Any, Any, Any, Tensor | None, Any], Pairs]


def over_blocks(
    work: Work, tokens: Any, shared: Any, state: State, sizes: Sequence[int], gradient: Gradient | None = None
) -> tuple[Float[Tensor, "B T H D"] | None, State]:
    """Blocks of the tokens in turn, each from the state that the one before has left.

    Args:
        work: is called once more for each block in the backward pass, so nothing in it is left to chance.
        tokens: tensors [B, T, ...] in tuples. One that stands in two places has one gradient for both.
        shared, state: tensors in tuples, beside which there may be anything else.
        sizes: T in parts.
        gradient: of work, if it is written down; else autograd finds it.

    Returns:
        The outputs end to end, None if there are none, and the last state.
    """
    if len(sizes) <= 1:  # what it keeps does not grow
        block, state = work(tokens, shared, state) if sizes else (None, state)
        return None if block is None else block.transpose(1, 2), state
    (cut, with_tokens), (common, with_common), (first, with_state) = map(_tensors_of, (tokens, shared, state))

    def on_tensors(cut: Tensors, common: Tensors, state: Tensors) -> tuple[Tensor | None, Tensors]:
        block, after = work(with_tokens(cut), with_common(common), with_state(state))
        return block, tree_flatten(after)[0]

    def pairs_of_tensors(
        cut: Tensors, common: Tensors, state: Tensors, d_block: Tensor | None, d_after: Sequence[Tensor | None]
    ) -> Pairs:
        if gradient is not None:
            return gradient(with_tokens(cut), with_common(common), with_state(state), d_block, with_state(d_after))
        block, after = on_tensors(cut, common, state)
        return [(block, d_block), *zip(after, d_after, strict=True)]

    plan = _Plan(on_tensors, pairs_of_tensors, [*sizes], len(cut), len(cut) + len(common))
    tensors = [*cut, *common, *first]
    if torch.is_grad_enabled() and not is_traced() and any(part.requires_grad for part in tensors):
        output, *after = _Blocks.apply(plan, *tensors)
    else:
        output, after, _ = plan.run(tensors, keeping=False)
    return output, with_state(after)


def _tensors_of(tree: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor | None]], Any]]:
    """The different tensors in it, and what puts others in their places."""
    leaves, structure = tree_flatten(tree)
    tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
    places = [[*tensors].index(id(leaf)) if isinstance(leaf, Tensor) else None for leaf in leaves]
    rest = [leaf if place is None else None for leaf, place in zip(leaves, places, strict=True)]

    def put(others: Sequence[Tensor | None]) -> Any:
        return tree_unflatten(
            [leaf if place is None else others[place] for leaf, place in zip(rest, places, strict=True)], structure
        )

    return [*tensors.values()], put


class _Plan(NamedTuple):
    """What is done, to how many tokens at once, of tensors that are cut, those that are common, and the state."""

    work: Work
    gradient: Callable[..., Pairs]
    sizes: list[int]
    first_common: int
    first_state: int

    def parts(self, of_all: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        return (
            of_all[: self.first_common],
            of_all[self.first_common : self.first_state],
            of_all[self.first_state :],
        )

    def pieces(self, cut: Tensors) -> Iterator[tuple[Tensor, ...]]:
        """A split, and no slices: the gradient of a slice is as large as the whole."""
        return zip(*(part.split(self.sizes, 1) for part in cut), strict=True)

    def run(self, tensors: Tensors, *, keeping: bool) -> tuple[Tensor | None, Tensors, list[Tensor]]:
        """The output, the state after the last block and, if they are kept, those before all but the first."""
        cut, common, state = self.parts(tensors)
        output = Output(sum(self.sizes))
        kept: list[Tensor] = []
        for number, piece in enumerate(self.pieces(cut)):
            if keeping and number:
                kept.extend(state)
            block, state = self.work(piece, common, state)
            if block is not None:
                output.append(block)
        return output.join(None), state, kept


class _Blocks(torch.autograd.Function):
    """`_Plan.run`, of which the arguments and the states between blocks are kept."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        output, after, kept = plan.run(tensors, keeping=True)
        ctx.plan = plan
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        return output, *after

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted, saved = ctx.needs_input_grad[1:], ctx.saved_tensors  # a checkpoint lets them be read once
        tensors, later = saved[: len(wanted)], saved[len(wanted) :]
        with torch.autocast(tensors[0].device.type, enabled=False):
            if torch.is_grad_enabled() or is_traced() or any(map(is_batch_of_gradients, gradients)):
                return None, *_at_once(ctx.plan, tensors, wanted, gradients, create_graph=torch.is_grad_enabled())
            return None, *_from_the_end(ctx.plan, tensors, later, wanted, gradients)


def _at_once(
    plan: _Plan, tensors: Tensors, wanted: Sequence[bool], gradients: Sequence[Tensor | None], *, create_graph: bool
) -> list[Tensor | None]:
    """As autograd finds them: gradients that have gradients themselves, or many at once."""
    with torch.enable_grad():
        # a tensor may have been made of another one; of a view of it no other is
        views = [part.view_as(part) for part in tensors]
        output, after, _ = plan.run(views, keeping=False)
    return differentiate([*zip((output, *after), gradients, strict=True)], views, wanted, create_graph=create_graph)


def _from_the_end(
    plan: _Plan,
    tensors: Tensors,
    later: Tensors,
    wanted: Sequence[bool],
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Block after block, backwards. `later` are the states before all blocks but the first."""
    cut, common, first = plan.parts(tensors)
    wants_cut, wants_common, wants_first = plan.parts(wanted)
    d_output, d_after = gradients[0], gradients[1:]
    d_cut = [torch.empty_like(part) if wants else None for part, wants in zip(cut, wants_cut, strict=True)]
    d_common: list[Tensor | None] = [None] * len(common)
    pieces, num_blocks = [*plan.pieces(cut)], len(plan.sizes)
    d_pieces = [None if part is None else part.split(plan.sizes, 1) for part in d_cut]
    d_blocks = [None] * num_blocks if d_output is None else d_output.transpose(1, 2).split(plan.sizes, 2)
    for block in reversed(range(num_blocks)):
        start = (block - 1) * len(first)
        state = first if block == 0 else later[start : start + len(first)]
        wants = (*wants_cut, *wants_common, *(wants_first if block == 0 else [True] * len(first)))
        given = (*pieces[block], *common, *state)
        here = [part.detach().requires_grad_(one) for part, one in zip(given, wants, strict=True)]
        with torch.enable_grad():
            pairs = plan.gradient(*plan.parts(here), d_blocks[block], d_after)
        of_cut, of_common, d_after = plan.parts(differentiate(pairs, here, wants))
        for whole, part in zip(d_pieces, of_cut, strict=True):
            if whole is not None:
                whole[block].zero_() if part is None else whole[block].copy_(part)
        d_common = [_sum(before, part) for before, part in zip(d_common, of_common, strict=True)]
    rounded = [None if part is None else part.to(like.dtype) for part, like in zip(d_common, common, strict=True)]
    return [*d_cut, *rounded, *d_after]


def _sum(before: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Of many small terms, in a type that is wide enough for it."""
    if part is None:
        return before
    part = part.to(inner_dtype(part.dtype))
    return part if before is None else before + part


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

    def join(self, nothing: Whole) -> Float[Tensor, "B T H D"] | Whole:
        """All blocks; `nothing` if there were none."""
        if self.blocks:
            return torch.cat(self.blocks, 2).transpose(1, 2)
        return nothing if self.whole is None else self.whole


def block_sizes(num_tokens: int, block_size: int, chunk_size: int = 1) -> list[int]:
    """Whole blocks, what whole chunks remain, and the rest.

    >>> block_sizes(17, block_size=6, chunk_size=3)
    [6, 6, 3, 2]
    """
    whole = num_tokens - num_tokens % chunk_size
    rest = whole % block_size
    return [block_size] * (whole // block_size) + [size for size in (rest, num_tokens - whole) if size]
