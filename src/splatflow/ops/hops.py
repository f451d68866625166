"""Splats of splats: content goes on from splat to splat by way of a few super-splats, Gaussians over their centers.

    share_mk  = softmax over k of l(c_m, k)                              splat m belongs to super-splat k
    held_kn   = share_nk alpha_n / sum_n' share_n'k alpha_n'             of which k holds the mean, strong ones first
    mixing_mn = (1 - g) [m = n] + g sum_k share_mk held_kn

All of it is made of parameters, so it is causal, exact, and folds into the weights with which tokens receive.
"""

# H head, M splat, N splat that is heard, K super-splat, P position width

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .affinity import log_affinity
from .splats import Splats, inner_dtype

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def mixing_of_hop(splats: Splats, super_splats: Splats, strength: Float[Tensor, " H"]) -> Float[Tensor, "H M M"]:
    """What each splat hands on of every splat, for the `receive_mixing` of `splat_attention`; rows sum to 1.

    Splats count in the mean of a super-splat as their amplitudes do among tokens: two halves of a splat like the
    whole, and one that sleeps not at all. `strength` g, in [0, 1], is how much of what a splat hands on comes by the
    hop. Of several hops, the first to be taken stands rightmost in the product of their matrices.

    Example:
        >>> one = torch.zeros(1, 1)
        >>> splats = Splats(torch.zeros(1, 2, 3), torch.zeros(1, 2), torch.zeros(1, 2))
        >>> mixing_of_hop(splats, Splats(torch.zeros(1, 1, 3), one, one), torch.tensor([0.5])).tolist()
        [[[0.75, 0.25], [0.25, 0.75]]]
    """
    dtype = inner_dtype(splats.centers.dtype)
    with torch.autocast(splats.centers.device.type, enabled=False):
        log_shares = log_affinity(splats.centers.transpose(0, 1)[None], super_splats)[0].log_softmax(-1)  # [M, H, K]
        shares = log_shares.transpose(0, 1).exp()
        held = (log_shares + splats.log_amplitudes.to(dtype).T[..., None]).softmax(0)  # over the splats
        by_hop = torch.einsum("HMK,NHK->HMN", shares, held)
        return torch.lerp(
            torch.eye(splats.num_splats, dtype=dtype, device=by_hop.device), by_hop, strength.to(dtype)[:, None, None]
        )
