"""How a batch uses the splats of a model, seen from outside `forward`."""

# N real token of a batch, H head, M splat, P position width

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from splatflow.ops.routing import route

from .splat_attention import SplatAttention

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

Batch = Tensor | Mapping[str, Any]  # a model is called as model(tensor) or model(**mapping)
# name, layer, send positions [N, H, P] and receive positions [N R, H, P], for the R heads that receive from each
Visit = Callable[[str, SplatAttention, Tensor, Tensor], None]

DEAD = 0.01  # a splat with less than this part of an equal share, 1 / M, is dead


def splat_layers(model: nn.Module) -> dict[str, SplatAttention]:
    """Every splat attention in `model`, the model itself included, by its name there."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, SplatAttention)}


def usage(model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, "H M"]]:
    """The mean share of each splat in what the tokens of a batch send, by layer; the shares of a head sum to 1.

    Write gates and biases are not counted, padding is left out. The model is in evaluation mode for the time of the
    call.

    Example:
        >>> layer = SplatAttention(hidden_size=8, num_heads=2, num_splats=3)
        >>> shares = usage(layer, torch.randn(5, 7, 8))[""]
        >>> list(shares.shape), round(shares.sum().item(), 4)
        ([2, 3], 2.0)
    """
    shares = {}

    def count(name: str, layer: SplatAttention, send_positions: Tensor, _: Tensor) -> None:
        sent = route(send_positions[None], layer.splats, layer.routing, layer.top_p)[0].mean(0)  # [H, M]
        shares[name] = sent / sent.sum(-1, keepdim=True).clamp_min(torch.finfo(sent.dtype).tiny)

    run_watched(model, batch, count)
    return shares


def effective_num_splats(shares: Float[Tensor, "*heads M"]) -> Float[Tensor, "*heads"]:
    """exp of the entropy of usage: M if all splats are used alike, 1 if one takes everything.

    Splats that lie in one place are counted apart; `overlap_loss` sees those.

    >>> effective_num_splats(torch.tensor([0.5, 0.5, 0.0])).item()
    2.0
    """
    return torch.special.entr(shares).sum(-1).exp()


def is_dead(shares: Float[Tensor, "*heads M"]) -> Bool[Tensor, "*heads M"]:
    """Which splats have a usage below DEAD / M."""
    return shares < DEAD / shares.shape[-1]


def dead_fraction(shares: Float[Tensor, "*heads M"]) -> Float[Tensor, "*heads"]:
    """The part of the splats that is dead: with a usage below 1 % of an equal share. Sleeping ones count.

    >>> dead_fraction(torch.tensor([0.7, 0.299, 0.001, 0.0])).item()
    0.5
    """
    return is_dead(shares).to(shares.dtype).mean(-1)


@torch.no_grad()
def run_watched(model: nn.Module, batch: Batch, visit: Visit) -> None:
    """Run a batch through `model` and call `visit` in each splat attention, when it knows where its tokens lie.

    What `visit` changes in the layer counts from there on. Compiled models run uncompiled, or hooks would be passed by.

    Raises:
        ValueError: the model has no splat attention.
    """
    layers = splat_layers(model)
    if not layers:
        raise ValueError(f"model is a {type(model).__name__} without splat attention, expected at least one layer")
    masks: dict[str, Tensor | None] = {}

    def remember_mask(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            masks[name] = options.get("attention_mask")

        return hook

    def hand_over(name: str, layer: SplatAttention) -> Callable[..., None]:
        def hook(projections: nn.Module, arguments: tuple[Any, ...], projected: tuple[Tensor, ...]) -> None:
            mask = masks[name]
            send, receive = (part.flatten(0, 1) if mask is None else part[mask.bool()] for part in projected[:2])
            # those of receiving heads that share a sending one are all positions of that
            visit(name, layer, send, receive.unflatten(1, (layer.num_sets, -1)).transpose(1, 2).flatten(0, 1))

        return hook

    hooks = [layer.register_forward_pre_hook(remember_mask(name), with_kwargs=True) for name, layer in layers.items()]
    hooks += [layer.projections.register_forward_hook(hand_over(name, layer)) for name, layer in layers.items()]
    try:
        with evaluation_mode(model), torch.compiler.set_stance("force_eager"):
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within the block no module trains; after it every module has its own flag back, frozen parts theirs."""
    training_flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in training_flags:
            module.training = training
