"""Packed sequences: documents end to end in one row, of which none may hear another.

The documents are cut out and laid side by side in batches of similar length. Lengths in a batch differ by less than a
factor of 2, so less than half of it is padding, and there are at most log2(T) + 1 batches.
"""

# N document, L token of a document

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor


class DocumentBatch(NamedTuple):
    """Documents of similar length: which they are, where each token stands in the row, and which tokens are real."""

    documents: Int[Tensor, " N"]
    index: Int[Tensor, "N L"]
    real: Bool[Tensor, "N L"]


def lay_out(boundaries: Sequence[int], device: torch.device) -> Iterator[DocumentBatch]:
    """Batches of the documents between the boundaries [0, ..., T], shortest first.

    Example:
        >>> for batch in lay_out([0, 2, 3, 6], torch.device("cpu")):
        ...     print(batch.documents.tolist(), batch.index.tolist(), batch.real.tolist())
        [1] [[2]] [[True]]
        [0, 2] [[0, 1, 0], [3, 4, 5]] [[True, True, False], [True, True, True]]
    """
    starts = torch.tensor(boundaries[:-1], device=device)
    lengths = torch.tensor(boundaries, device=device).diff()
    size_classes = torch.tensor([length.bit_length() for length in lengths.tolist()], device=device)
    for size_class in size_classes.unique().tolist():
        documents = (size_classes == size_class).nonzero()[:, 0]
        offsets = torch.arange(int(lengths[documents].max()), device=device)
        real = offsets < lengths[documents, None]
        yield DocumentBatch(documents, torch.where(real, starts[documents, None] + offsets, 0), real)
