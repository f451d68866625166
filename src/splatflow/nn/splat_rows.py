"""The part that each splat has in a layer's parameters, and in what an optimizer remembers of them."""

# H head, M splat

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.optim import Optimizer

from .splat_attention import SplatAttention

if TYPE_CHECKING:
    from jaxtyping import Float


def require_interchangeable(layer: SplatAttention) -> None:
    """Raises ValueError if no splat can take another's place: a lattice, or tokens that prefer some by a bias."""
    layer.free_splats()
    if layer.routing_bias_proj is not None:
        raise ValueError("routing_bias is True, expected False where splats take each other's place")


def parameters_of_splats(layer: SplatAttention) -> list[nn.Parameter]:
    """The parameters in which every splat has a part of its own, but for those that make biases."""
    owned = [part for part in layer.parameters(recurse=False) if part.shape[:2] == layer.log_scales.shape]
    if layer.decay == "splat" and layer.decay_proj is not None:
        owned += layer.decay_proj.parameters()
    if layer.write_gate_proj is not None and layer.top_p is None:
        owned += layer.write_gate_proj.parameters()
    return owned


def moments_of(optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """What an optimizer remembers of every number of a parameter, such as Adam's two moments; none before a step."""
    state = optimizer.state.get(parameter, {})
    return [part for part in state.values() if isinstance(part, Tensor) and part.shape == parameter.shape]


def by_splat(tensor: Tensor, layer: SplatAttention) -> Float[Tensor, "H M _"]:
    """A view of a parameter in which every splat has a part, or of its moments."""
    return tensor.view(layer.num_sets, layer.num_splats, -1)
