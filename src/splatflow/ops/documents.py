"""Padding, and packed sequences: documents end to end in one row, of which none may hear another.

The documents are cut out and laid side by side in batches of similar length. Lengths in a batch differ by less than a
factor of 2, so less than half of it is padding, and there are at most log2(T) + 1 batches.
"""

# N document, L token of a document, T token of the row, H head, M splat, P position width, D value width

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from .routing import Router
from .splats import Sources, SplatState, Targets, each, inner_dtype

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

# (sources, targets, router, state) -> (output, state)
Mix = Callable[..., "tuple[Tensor, SplatState]"]


class DocumentBatch(NamedTuple):
    """Documents of similar length: which they are, where each token stands in the row, and which tokens are real."""

    documents: Int[Tensor, " N"]
    places: Int[Tensor, "N L"]
    real: Bool[Tensor, "N L"]


def lay_out(boundaries: Sequence[int], device: torch.device) -> Iterator[DocumentBatch]:
    """Batches of the documents between the boundaries [0, ..., T], shortest first.

    Example:
        >>> for batch in lay_out([0, 2, 3, 6], torch.device("cpu")):
        ...     print(batch.documents.tolist(), batch.places.tolist(), batch.real.tolist())
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


def without_padding(real: Bool[Tensor, "B S"], sources: Sources) -> Sources:
    """The sources with padding that neither sends nor forgets; whatever stood there, NaN included, is gone."""
    padding = ~real[:, :, None, None]
    if sources.write_gate is None:
        open_gate = sources.values.new_ones(*sources.values.shape[:3], 1, dtype=inner_dtype(sources.values.dtype))
        sources = sources._replace(write_gate=open_gate)
    return each(lambda part: part.masked_fill(padding, 0.0), sources)


def over_documents(
    mix: Mix,
    boundaries: Sequence[int],
    sources: Sources,
    targets: Targets,
    router: Router,
    state: SplatState,
) -> tuple[Float[Tensor, "1 T H D"], SplatState]:
    """Every document by itself, those of similar length in one batch. The state has the documents as its batch."""
    batches = list(lay_out(boundaries, sources.values.device))
    outputs, masses, totals = [], [], []
    for batch in batches:
        padding = ~batch.real[:, :, None, None]

        def cut_out(part: Tensor, places: Tensor = batch.places, padding: Tensor = padding) -> Tensor:
            return part[0, places].masked_fill(padding, 0.0)

        before = SplatState(state.mass[batch.documents], state.total[batch.documents])
        here = without_padding(batch.real, each(cut_out, sources))
        output, after = mix(here, each(cut_out, targets), router, before)
        outputs.append(output[batch.real])
        masses.append(after.mass)
        totals.append(after.total)
    tokens = torch.cat([batch.places[batch.real] for batch in batches]).argsort()
    documents = torch.cat([batch.documents for batch in batches]).argsort()
    return torch.cat(outputs)[tokens][None], SplatState(torch.cat(masses)[documents], torch.cat(totals)[documents])
