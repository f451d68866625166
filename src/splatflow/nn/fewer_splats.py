"""Fewer splats for a trained model: those that a batch uses most, and how few of them are enough."""

# H head, M splat, K kept splat

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from splatflow.requirements import require_at_least, require_integers

from .splat_attention import SplatAttention
from .splat_rows import parameters_of_splats
from .usage import Batch, splat_layers, usage

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def keep_splats(model: Model, num_splats: int, batch: Batch) -> Model:
    """A copy of `model` with the `num_splats` splats of each head to which a batch sends most, the busiest first.

    Its parameters are smaller, and so is its state; a configuration, if the model has one, says so, so that the copy
    can be saved and loaded.

    Raises:
        ValueError, TypeError: a lattice, whose splats have no parameters each of its own; more splats than there are,
            or fewer than a token touches; a model without splat attention.

    Example:
        >>> layer = SplatAttention(hidden_size=8, num_heads=2, num_splats=5)
        >>> fewer = keep_splats(layer, 3, torch.randn(5, 7, 8))
        >>> list(fewer.centers.shape), list(layer.centers.shape)
        ([2, 3, 4], [2, 5, 4])
    """
    for name, layer in splat_layers(model).items():
        require_size(num_splats, layer, name)
    shares = usage(model, batch)
    model = deepcopy(model)
    for name, layer in splat_layers(model).items():
        kept = shares[name].argsort(dim=-1, descending=True, stable=True)[:, :num_splats]
        _cut_tables(model.get_submodule(name.rpartition(".")[0]), kept, layer.num_splats)
        _cut_layer(layer, kept)
        config = getattr(model, "config", None)
        if config is not None:
            config.num_splats = num_splats
            config.num_super_splats = layer.num_super_splats  # else they would follow the number of splats
    return model


def fewest_splats(model: nn.Module, batch: Batch, evaluate: Callable[[nn.Module], float], tolerance: float) -> int:
    """The least power of 2 that is enough splats: whose loss is at most `tolerance` above that of the whole model.

    `evaluate` gives the loss of a model, for instance on held-out text. All powers of 2 are tried, fewest first; if
    none will do, it is the number of splats that there are.

    Example:
        >>> layer = SplatAttention(hidden_size=8, num_heads=2, num_splats=16)
        >>> fewest_splats(layer, torch.randn(5, 7, 8), lambda fewer: 3.0 / fewer.num_splats, tolerance=0.6)
        4
    """
    require_at_least(0, tolerance=tolerance)
    most = min((layer.num_splats for layer in splat_layers(model).values()), default=1)
    fewest = max((layer.top_p or 1 for layer in splat_layers(model).values()), default=1)
    limit = evaluate(model) + tolerance
    sizes = (2**power for power in range((fewest - 1).bit_length(), (most - 1).bit_length()))
    return next((size for size in sizes if evaluate(keep_splats(model, size, batch)) <= limit), most)


def require_size(num_splats: int, layer: SplatAttention, name: str) -> None:
    """Raises ValueError or TypeError unless a layer can keep so many of its splats."""
    require_integers(1, num_splats=num_splats)
    layer.free_splats()
    fewest = layer.top_p or 1
    if not fewest <= num_splats <= layer.num_splats:
        raise ValueError(
            f"num_splats is {num_splats}, expected {fewest} to {layer.num_splats}, all that {name or 'the layer'} has"
        )


def _cut_layer(layer: SplatAttention, kept: Int[Tensor, "H K"]) -> None:
    rows = _rows(kept, layer.num_splats)
    projections = [part for part in (layer.decay_proj, layer.write_gate_proj) if part is not None]
    of_projections = {id(parameter) for projection in projections for parameter in projection.parameters()}
    for parameter in parameters_of_splats(layer):
        if id(parameter) in of_projections:
            _put(parameter, parameter[rows])
        else:
            _put(parameter, parameter.flatten(0, 1)[rows].unflatten(0, kept.shape))
    if layer.routing_bias_proj is not None:  # biases of heads that send, then of those that receive
        of_all = torch.cat([kept, kept.repeat_interleave(layer.num_receivers, 0)])
        for parameter in layer.routing_bias_proj.parameters():
            _put(parameter, parameter[_rows(of_all, layer.num_splats)])
    layer.num_splats = layer.num_biases = kept.shape[1]
    for linear in (layer.decay_proj, layer.write_gate_proj, layer.routing_bias_proj):
        if linear is not None:
            linear.out_features = linear.weight.shape[0]


def _cut_tables(block: nn.Module, kept: Int[Tensor, "H K"], num_splats: int) -> None:
    """The tables of biases that a block may hold for its layer, as in the models of this package."""
    for name in ("token_bias", "position_bias"):
        table = getattr(block, name, None)
        if isinstance(table, nn.Embedding):
            _put(table.weight, table.weight[:, _rows(kept, num_splats)])
            table.embedding_dim = table.weight.shape[1]


def _rows(kept: Int[Tensor, "H K"], num_splats: int) -> Int[Tensor, " HK"]:
    """Where the kept splats stand when those of all heads stand in one row."""
    return (torch.arange(kept.shape[0], device=kept.device)[:, None] * num_splats + kept).flatten()


def _put(parameter: Tensor, kept: Tensor) -> None:
    parameter.data, parameter.grad = kept.clone(), None
