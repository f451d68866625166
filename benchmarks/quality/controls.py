"""Foils of splat attention: what is left of it when one part of the idea is taken away."""

# H head, M splat, P position width

from __future__ import annotations

from typing import Any

import torch

from splatflow.nn import SplatAttention
from splatflow.ops import Splats


class LinearRouter(SplatAttention):
    """Routes by a softmax of scores <w_m, p> + b_m in place of Gaussians; all else is the same.

    `centers` are the weights w, `log_amplitudes` the biases b. A Gaussian of scale 1, center w and log-amplitude
    b + |w|^2 / 2 has the log-affinity <w, p> + b - |p|^2 / 2, whose last part is common to all splats and cancels in
    the softmax. Weights start at c / sigma^2 of the Gaussians that they replace.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_splats: int, **options: Any) -> None:
        super().__init__(hidden_size, num_heads, num_splats, **options)
        self.log_scales.requires_grad_(False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.centers.mul_(torch.exp(-2.0 * self.log_scales)[..., None])
        self.log_scales.zero_()

    @property
    def splats(self) -> Splats:
        return Splats(self.centers, self.log_scales, self.log_amplitudes + 0.5 * self.centers.square().sum(-1))


class FrozenCenters(SplatAttention):
    """Splats stay where they were drawn, of one width and strength: only the projections learn to find them."""

    def __init__(self, hidden_size: int, num_heads: int, num_splats: int, **options: Any) -> None:
        super().__init__(hidden_size, num_heads, num_splats, **options)
        for parameter in (self.centers, self.log_scales, self.log_amplitudes):
            parameter.requires_grad_(False)
