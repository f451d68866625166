"""What the operators speak about: Gaussian splats, tokens, and what the splats remember."""

# B batch, T target token, S source token, H head, M splat, K point of half a lattice, P position width, D value width

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Tokens = TypeVar("Tokens", bound=tuple)  # Sources or Targets

# A running mean divides by the mass that a splat was sent. Below this mass the quotient is scaled down towards 0, so
# that a splat of mass 0 says nothing, and 1 / mass^2, which stands in the gradient, is far from the end of fp32.
MIN_MASS = 1e-16


class Splats(NamedTuple):
    """M Gaussians a head: where they lie, how wide and how strong they are.

    `log_scales` is the logarithm of the standard deviation sigma, in the units of the positions; `log_reaches` that of
    the distance tau from which on a splat is out of reach, for the routing "compact" alone.
    """

    centers: Float[Tensor, "H M P"]
    log_scales: Float[Tensor, "H M"]
    log_amplitudes: Float[Tensor, "H M"]
    log_reaches: Float[Tensor, "H M"] | None = None

    @property
    def num_splats(self) -> int:
        return self.centers.shape[1]

    @property
    def position_dim(self) -> int:
        return self.centers.shape[-1]


class Lattice(NamedTuple):
    """M = K x K splats a head, whose centers are all pairs of K points of each half of the space.

    A Gaussian factorises over the halves: the log-affinity of splat (a, b), which has the number a K + b, is that of
    point a to the first half of a position plus that of point b to the second.
    """

    centers: Float[Tensor, "H 2 K P/2"]
    log_scales: Float[Tensor, "H 2 K"]
    log_amplitudes: Float[Tensor, "H 2 K"]

    @property
    def num_splats(self) -> int:
        return self.centers.shape[2] ** 2

    @property
    def position_dim(self) -> int:
        return 2 * self.centers.shape[-1]


class Sources(NamedTuple):
    """Tokens that send: where from, what, and how. What is None does nothing.

    `bias` is added to their log-affinities, one number a splat (a lattice: one a point, those of the first half first).
    """

    positions: Float[Tensor, "B S H P"]
    values: Float[Tensor, "B S H D"]
    bias: Float[Tensor, "B S H R"] | None
    log_decay: Float[Tensor, "B S H #M"] | None
    write_gate: Float[Tensor, "B S H #M"] | None


class Targets(NamedTuple):
    """Tokens that receive. They may have several times as many heads, of which so many in turn share a sending one."""

    positions: Float[Tensor, "B T heads P"]
    bias: Float[Tensor, "B T heads R"] | None


class SplatState(NamedTuple):
    """All that is remembered of the tokens so far; its size does not depend on how many they were.

    `mass` is the sum of what was sent to each splat, `total` the sum of the values weighted by it, both decayed. What
    a splat says is their quotient. Kept in fp32 (fp64 if the values are fp64), so that long counts go on growing.
    """

    mass: Float[Tensor, "B H M"]
    total: Float[Tensor, "B H M D"]

    @classmethod
    def empty(cls, values: Float[Tensor, "#B S H D"], batch: int, num_splats: int) -> SplatState:
        """The state of B sequences that have not begun, fit for such values. All of it is one and the same 0."""
        _, _, num_heads, width = values.shape
        zero = values.new_zeros((), dtype=inner_dtype(values.dtype))
        return cls(zero.expand(batch, num_heads, num_splats), zero.expand(batch, num_heads, num_splats, width))

    def contents(self, running_mean: bool) -> Float[Tensor, "B H M D"]:
        """What each splat says: the mean of what it was sent, or the sum."""
        return self.total / self.mass.clamp_min(MIN_MASS)[..., None] if running_mean else self.total

    @property
    def nbytes(self) -> int:
        return self.mass.nbytes + self.total.nbytes


def inner_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in: fp64 stays itself, everything narrower is summed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_splat(
    factor: Float[Tensor, "B S H"] | Float[Tensor, "B S H M"] | None, dtype: torch.dtype
) -> Float[Tensor, "B S H #M"] | None:
    """One layout for what may be given per head or per splat."""
    if factor is None:
        return None
    return (factor if factor.ndim == 4 else factor[..., None]).to(dtype)


def each(function: Callable[[Tensor], Tensor], tokens: Tokens) -> Tokens:
    """`function` of every part of some tokens that is there."""
    parts = [None if part is None else function(part) for part in tokens]
    return type(tokens)(*parts)  # type: ignore[arg-type]  # the named tuples, each of its own parts


def split(tokens: Tokens, sizes: Sequence[int], dim: int = 1) -> list[Tokens]:
    """The tokens in pieces of these sizes; or, with `dim` 0, the sequences.

    A split, and no slices: the gradient of a slice is as large as the whole, which makes that of all slices quadratic.
    """
    parts = [None if part is None else part.split(list(sizes), dim) for part in tokens]
    return [
        type(tokens)(*(None if part is None else part[piece] for part in parts))  # type: ignore[arg-type]
        for piece in range(len(sizes))
    ]
