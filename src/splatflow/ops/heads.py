"""Receiving heads that share a sending one, as query heads share keys and values in grouped-query attention.

Of R G receiving heads, each R in turn read the splats of one of the G that send, so what splats hold is as little as if
there were G heads. Some backends treat the R as R times as many tokens of their sending head (`as_tokens`); the others
get that head copied R times (`with_copies`).

Source: Ainslie et al. 2023, for softmax attention.
"""

# B batch, T target token, G head that sends, R head that receives from it, N chunk, C token in a chunk, D value width

from __future__ import annotations

from typing import TYPE_CHECKING

from .documents import Mix
from .routing import Router
from .splats import Sources, SplatState, Targets, each

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def as_tokens(targets: Targets, num_heads: int, length: int) -> Targets:
    """[B, T, G R, X] -> [B, N R C, G, X]: of each chunk of `length` tokens all for the first receiving head, and so on.

    Example:
        >>> import torch
        >>> of_two_heads = torch.tensor([[10, 20], [11, 21], [12, 22], [13, 23]]).view(1, 4, 2, 1)
        >>> as_tokens(Targets(of_two_heads, None), num_heads=1, length=2).positions.flatten().tolist()
        [10, 11, 20, 21, 12, 13, 22, 23]
    """
    if targets.positions.shape[2] == num_heads:
        return targets

    def turn(part: Tensor) -> Tensor:
        chunks = part.unflatten(2, (num_heads, -1)).unflatten(1, (-1, length))  # [B, N, C, G, R, X]
        return chunks.permute(0, 1, 4, 2, 3, 5).flatten(1, 3)

    return each(turn, targets)


def as_heads(output: Float[Tensor, "B G N R C D"]) -> Float[Tensor, "B GR NC D"]:
    """What such tokens have heard, back in receiving heads."""
    return output.transpose(2, 3).flatten(1, 2).flatten(2, 3)


def in_receivers(output: Float[Tensor, "B GR NC D"], num_heads: int, length: int) -> Float[Tensor, "B G N R C D"]:
    """The other way."""
    return output.unflatten(1, (num_heads, -1)).unflatten(3, (-1, length)).transpose(2, 3)


def in_rows(part: Float[Tensor, "*B R C X"], matrix: Float[Tensor, "*#B X Y"]) -> Float[Tensor, "*B R C Y"]:
    """part @ matrix, which all receiving heads have in common: one product."""
    return (part.flatten(-3, -2) @ matrix).unflatten(-2, part.shape[-3:-1])


def with_copies(mix: Mix) -> Mix:
    """`mix` by what knows one receiving head for each sending one: it has a copy of its sending head to itself."""

    def mix_copies(
        sources: Sources, targets: Targets, router: Router, state: SplatState, *, causal: bool
    ) -> tuple[Float[Tensor, "B T GR D"], SplatState]:
        count = targets.positions.shape[2] // sources.values.shape[2]
        if count == 1:
            return mix(sources, targets, router, state, causal=causal)
        copies = SplatState(*(part.repeat_interleave(count, 1) for part in state))
        sources = each(lambda part: part.repeat_interleave(count, 2), sources)
        output, after = mix(sources, targets, router.repeated(count), copies, causal=causal)
        return output, SplatState(*(part[:, ::count].clone() for part in after))  # a view would keep the others alive

    return mix_copies
