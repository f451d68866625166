"""Which splats are nearest, without looking at all of them where that can be helped.

One rule decides between equals everywhere: the lower number comes first. In a lattice it holds of each half, and pairs
of equal sums stand in the order of their places in the first half, then in the second.
"""

# B batch, T token, H head, M splat, N candidate, G group, K point of half a lattice, P position width

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


RUN, MANY = 32, 128  # scores of which the largest is looked for at once, and from how many on that pays


def best(scores: Float[Tensor, "... N"], count: int) -> Int[Tensor, "... count"]:
    """Places of the `count` largest scores, the largest first; of equals the first. All, if there are fewer.

    Example:
        >>> best(torch.tensor([1.0, 3.0, 3.0, 2.0]), 3).tolist()
        [1, 2, 3]
    """
    scores = scores.detach().clamp_min(torch.finfo(scores.dtype).min)  # -inf is for what was taken
    if scores.shape[-1] >= MANY and scores.shape[-1] % RUN == 0:
        return _best_of_runs(scores, count)
    places = []
    for _ in range(min(count, scores.shape[-1])):  # `topk` leaves it open which of equals it takes, `max` does not
        places.append(scores.max(-1, keepdim=True).indices)
        scores.scatter_(-1, places[-1], -torch.inf)
    return torch.cat(places, -1)


def _best_of_runs(scores: Float[Tensor, "... N"], count: int) -> Int[Tensor, "... count"]:
    """`best` of many, in `scores` itself: the largest of each run is known, and looked for again where it was taken."""
    runs = scores.reshape(-1, RUN)
    tops = runs.amax(-1).view(-1, scores.shape[-1] // RUN)
    first = torch.arange(0, len(runs), tops.shape[-1], device=runs.device)[:, None]
    places = []
    for _ in range(count):
        run = tops.max(-1, keepdim=True).indices
        at = (first + run).flatten()
        members = runs.index_select(0, at)
        place = members.max(-1, keepdim=True).indices
        places.append(run * RUN + place)
        members.scatter_(-1, place, -torch.inf)
        runs.index_copy_(0, at, members)
        tops.scatter_(-1, run, members.amax(-1, keepdim=True))
    return torch.cat(places, -1).view(*scores.shape[:-1], count)


def best_pairs(
    first: Float[Tensor, "... K"], second: Float[Tensor, "... K"], count: int
) -> tuple[Int[Tensor, "... count"], Int[Tensor, "... count"]]:
    """The `count` largest of all K x K sums first[a] + second[b], as the places a and b.

    A pair that has i better points in its first half and j in its second has (i + 1) (j + 1) - 1 pairs before it, so
    only those with (i + 1) (j + 1) <= count are looked at: exact, rounding and equals included.

    Example:
        >>> first, second = torch.tensor([0.0, 2.0, 1.0]), torch.tensor([5.0, 1.0, 4.5])
        >>> [places.tolist() for places in best_pairs(first, second, 3)]
        [[1, 1, 2], [0, 2, 0]]
    """
    in_first, in_second = best(first, count), best(second, count)
    num_points = in_first.shape[-1]
    pairs = [(i, j) for i in range(num_points) for j in range(num_points) if (i + 1) * (j + 1) <= count]
    i, j = torch.tensor(pairs, device=first.device).unbind(1)
    sums = first.gather(-1, in_first)[..., i] + second.gather(-1, in_second)[..., j]
    chosen = best(sums, count)
    return in_first.gather(-1, i[chosen]), in_second.gather(-1, j[chosen])


def groups_of(centers: Float[Tensor, "H M P"]) -> tuple[Int[Tensor, "H G N"], Float[Tensor, "H G P"]]:
    """About sqrt(M) groups of equal size whose centers lie together: their members, and the means of their centers.

    Every group is cut in two at the median of the coordinate in which it is widest, as long as that comes out even.

    Example:
        >>> members, means = groups_of(torch.tensor([0.0, 5.0, 1.0, 6.0]).view(1, 4, 1))
        >>> members.tolist(), means.flatten().tolist()
        ([[[0, 2], [1, 3]]], [0.5, 5.5])
    """
    num_heads, num_splats, _ = centers.shape
    members = torch.arange(num_splats, device=centers.device).expand(num_heads, 1, num_splats)
    heads = torch.arange(num_heads, device=centers.device)[:, None, None]
    for _ in range(int(math.log2(math.sqrt(num_splats)))):
        if members.shape[-1] % 2:
            break
        lying = centers[heads, members]  # [H, G, N, P]
        widest = lying.var(2).argmax(-1)[..., None, None].expand(-1, -1, members.shape[-1], 1)
        order = lying.gather(-1, widest)[..., 0].argsort(dim=-1, stable=True)
        members = members.gather(-1, order).unflatten(-1, (2, -1)).flatten(1, 2)
    return members, centers[heads, members].mean(2)
