"""How kernels are cut: tiles and segments, of sequences and of packed documents, by rules that look at sizes alone.

What there is once a segment is numbered as the programs are (`tokens_of` in tiles.py): W = B H Q numbers, of packed
documents Q H.
"""

# B batch, H head, Q segment, W program

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PROGRAMS = 264  # wanted, and not more: two for each of the 132 processors of a Hopper GPU
FEWEST_TILES = 32  # of a segment, so that its state is few bytes beside its tokens
KEPT_TILES = 4  # of which the backward pass keeps one state
WIDE = 64  # beyond that a tile has half the tokens, so that what is made of it fits into registers
# tokens of a tile, by what decays, if nothing is wider than WIDE; with a decay a splat each of its pairs has M factors
TILES = {"none": 32, "head": 32, "splat": 16}


class Cut(NamedTuple):
    """How tokens are cut: into segments of at most `num_tiles` tiles of `tile` tokens.

    Each sequence has `num_segments`. Packed documents have so many together, and a table of them (`segments_of`).
    """

    tile: int
    num_tiles: int
    num_segments: int
    alone: bool  # whether each sequence, or document, is one segment
    num_kept: int  # states that the backward pass keeps of each head: of a segment, or of all packed documents
    table: Tensor | None = None  # [Q, 6], int32

    def num_programs(self, batch: int, num_heads: int) -> int:
        return batch * num_heads * self.num_segments

    def by_head(self, rows: Tensor, batch: int, num_heads: int) -> Tensor:
        """Of [W, ...] a view with an axis of its own for heads, [B, H, Q, ...] or [Q, H, 1, ...].

        Of fewer heads than there are it has their groups, and all of a group in the third axis.
        """
        return rows.unflatten(0, (batch if self.table is None else self.num_segments, num_heads, -1))


def tile_of(widths: tuple[int, int, int], decay: str) -> int:
    return TILES[decay] if max(widths) <= WIDE else max(16, TILES[decay] // 2)


def longest_segment(num_tiles: int, num_sequences: int) -> int:
    """How many tiles a segment may have, if there are `num_tiles` of each of these."""
    return max(FEWEST_TILES, math.ceil(num_tiles / max(1, PROGRAMS // num_sequences)))


def cut(num_tokens: int, num_sequences: int, widths: tuple[int, int, int], decay: str = "none") -> Cut:
    """Few segments, but enough to occupy a GPU: what is one segment is read only once.

    >>> cut(1000, 1024, (64, 64, 64))[:3], cut(100_000, 16, (64, 64, 64))[:3]
    ((32, 32, 1), (32, 196, 16))
    """
    tile = tile_of(widths, decay)
    tiles = math.ceil(num_tokens / tile)
    num_tiles = min(tiles, longest_segment(tiles, num_sequences))
    num_segments = math.ceil(tiles / num_tiles)
    return Cut(tile, num_tiles, num_segments, num_segments == 1, math.ceil(num_tiles / KEPT_TILES))


@functools.lru_cache(maxsize=32)  # layers of a model have the same documents
def segments_of(boundaries: tuple[int, ...], tile: int, enough: int, kept_tiles: int) -> tuple[tuple[int, ...], ...]:
    """For each segment its first token, how many it has, the document, its number in that, the number of the last one
    there, and how many states were kept before it; documents are cut into pieces of at least `enough` tiles, the last
    of which may have fewer.

    >>> segments_of((0, 5, 5, 42), tile=4, enough=3, kept_tiles=2)
    ((0, 5, 0, 0, 0, 0), (5, 0, 1, 0, 0, 1), (5, 16, 2, 0, 2, 1), (21, 16, 2, 1, 2, 3), (37, 5, 2, 2, 2, 5))
    """
    table, kept = [], 0
    for document, (start, stop) in enumerate(itertools.pairwise(boundaries)):
        tiles = math.ceil((stop - start) / tile)
        length = max(1, math.ceil(tiles / max(1, tiles // enough))) * tile
        starts = range(start, stop, length) or [start]  # an empty document hands its state on
        for number, first in enumerate(starts):
            num_here = min(length, stop - first)
            table.append((first, num_here, document, number, len(starts) - 1, kept))
            kept += math.ceil(num_here / (tile * kept_tiles))
    return tuple(table)


def cut_documents(
    boundaries: Sequence[int],
    num_heads: int,
    widths: tuple[int, int, int],
    decay: str = "none",
    device: torch.device | None = None,
) -> Cut:
    """The same of documents packed end to end: those of them that are long are cut, by what all of them would be.

    >>> cut_documents([0, 100, 100_000, 100_000], 16, (64, 64, 64)).table[[0, 1, 2, -1]].tolist()
    [[0, 100, 0, 0, 0, 0], [100, 6688, 1, 0, 14, 1], [6788, 6688, 1, 1, 14, 54], [100000, 0, 2, 0, 0, 792]]
    """
    tile = tile_of(widths, decay)
    documents = [stop - start for start, stop in itertools.pairwise(boundaries)]
    enough = longest_segment(sum(math.ceil(length / tile) for length in documents), num_heads)
    table = segments_of(tuple(boundaries), tile, enough, KEPT_TILES)
    _, num_tokens, *_ = zip(*table, strict=True)
    num_kept = table[-1][-1] + math.ceil(num_tokens[-1] / (tile * KEPT_TILES))
    return Cut(
        tile,
        math.ceil(max(num_tokens) / tile),
        len(table),
        len(table) == len(documents),
        num_kept,
        _on(device, torch.tensor(table, dtype=torch.int32)),
    )


def _on(device: torch.device | None, table: Tensor) -> Tensor:
    """A copy there, for which nobody waits."""
    if device is None or device.type != "cuda":
        return table if device is None else table.to(device)
    return table.pin_memory().to(device, non_blocking=True)
