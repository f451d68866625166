"""What the operators speak about: Gaussian splats, and what the splats remember."""

# B batch, H head, M splat, P position width, D value width

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


# A running mean divides by the mass that a splat was sent. Below this mass the quotient is scaled down towards 0, so
# that a splat of mass 0 says nothing, and 1 / mass^2, which stands in the gradient, is far from the end of fp32.
MIN_MASS = 1e-16


class Splats(NamedTuple):
    """M Gaussians a head: where they lie, how wide and how strong they are.

    `log_scales` is the logarithm of the standard deviation sigma, in the units of the positions.
    """

    centers: Float[Tensor, "H M P"]
    log_scales: Float[Tensor, "H M"]
    log_amplitudes: Float[Tensor, "H M"]


class SplatState(NamedTuple):
    """All that is remembered of the tokens so far; its size does not depend on how many they were.

    `mass` is the sum of what was sent to each splat, `total` the sum of the values weighted by it, both decayed. What
    a splat says is their quotient. Kept in fp32 (fp64 if the values are fp64), so that long counts go on growing.
    """

    mass: Float[Tensor, "B H M"]
    total: Float[Tensor, "B H M D"]

    @classmethod
    def empty(cls, values: Float[Tensor, "#B S H D"], batch: int, num_splats: int) -> SplatState:
        """The state of B sequences that have not begun, fit for such values."""
        _, _, num_heads, width = values.shape
        dtype = inner_dtype(values.dtype)
        return cls(
            values.new_zeros(batch, num_heads, num_splats, dtype=dtype),
            values.new_zeros(batch, num_heads, num_splats, width, dtype=dtype),
        )

    @property
    def nbytes(self) -> int:
        return self.mass.nbytes + self.total.nbytes


def inner_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in: fp64 stays itself, everything narrower is summed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
