"""Where splats begin: at the clusters of a real batch, or where a softmax layer had its queries and keys."""

# H head, N point, K cluster, M splat, P position width, T token, C hidden size

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from splatflow.ops import Splats
from splatflow.ops.splats import inner_dtype

from .softmax_attention import SoftmaxAttention
from .splat_attention import SplatAttention
from .usage import Batch, run_watched

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SPREAD = 2.0  # standard deviation of the log-affinities of a token with the splats, as at the layer's own start


@torch.no_grad()
def kmeans(
    points: Float[Tensor, "H N P"], num_clusters: int, *, seed: int = 0, max_iterations: int = 50
) -> Float[Tensor, "H K P"]:
    """Centers of clusters, found in each head by itself: Lloyd's algorithm from a k-means++ start.

    Every iteration moves each center to the mean of the points that are nearest to it, which never increases the sum of
    their squared distances. It ends when nothing moves, or after `max_iterations`. A center that is nearest to no point
    stays. Chance comes from `seed` alone.

    Raises:
        ValueError: there are fewer points than clusters.

    Source: Lloyd 1982; Arthur and Vassilvitskii 2007.

    Example:
        >>> points = torch.tensor([[[0.0], [1.0], [8.0], [9.0]]])
        >>> kmeans(points, 2).sort(1).values.flatten().tolist()
        [0.5, 8.5]
    """
    if points.shape[1] < num_clusters:
        raise ValueError(f"points has {points.shape[1]} points a head, expected at least num_clusters, {num_clusters}")
    points = points.to(inner_dtype(points.dtype))
    centers = _scattered_points(points, num_clusters, seed)
    for _ in range(max_iterations):
        nearest = torch.cdist(points, centers).argmin(-1)  # [H, N]
        moved = _means(points, nearest, centers)
        if moved.equal(centers):
            break
        centers = moved
    return centers


def _scattered_points(points: Float[Tensor, "H N P"], num_clusters: int, seed: int) -> Float[Tensor, "H K P"]:
    """k-means++: each next center is a point, drawn by its squared distance to the nearest one so far."""
    num_heads, num_points, _ = points.shape
    draws = torch.rand(num_clusters, num_heads, 1, generator=torch.Generator().manual_seed(seed)).to(points)
    heads = torch.arange(num_heads, device=points.device)
    weights = torch.ones(num_heads, num_points, dtype=points.dtype, device=points.device)
    centers = []
    for draw in draws:
        sums = weights.cumsum(-1)
        # the first point whose sum is beyond the draw; the last one where rounding leaves none, or all weights are 0
        chosen = torch.searchsorted(sums, draw * sums[:, -1:], right=True).flatten().clamp_max(num_points - 1)
        centers.append(points[heads, chosen])  # [H, P]
        gaps = (points - centers[-1][:, None]).square().sum(-1)
        weights = gaps if len(centers) == 1 else torch.minimum(weights, gaps)
    return torch.stack(centers, 1)


def _means(
    points: Float[Tensor, "H N P"], nearest: Int[Tensor, "H N"], centers: Float[Tensor, "H K P"]
) -> Float[Tensor, "H K P"]:
    """The mean of each cluster's points; the center itself where there are none."""
    sums = torch.zeros_like(centers).scatter_add_(1, nearest[..., None].expand_as(points), points)
    counts = torch.zeros_like(centers[..., 0]).scatter_add_(1, nearest, torch.ones_like(points[..., 0]))[..., None]
    return torch.where(counts > 0, sums / counts.clamp_min(1), centers)


@torch.no_grad()
def initialise_from_batch(model: nn.Module, batch: Batch, *, seed: int = 0) -> None:
    """Put the splats of every splat attention in `model` where the tokens of a real batch lie, layer by layer.

    Centers are k-means of where the tokens send and receive. The scale, one a head, gives the log-affinities of a token
    with the splats a standard deviation of `SPREAD`. A layer is changed before the batch runs on through it, so the
    next one sees what it will see in training. The model is in evaluation mode for the time of the call.

    Args:
        model: a layer, or a model in which there are some.
        batch: hidden states or token ids for `model(batch)`, or a mapping for `model(**batch)`.

    Raises:
        ValueError: there is no splat attention, or fewer positions than splats.

    Example:
        >>> layer = SplatAttention(hidden_size=8, num_heads=2, num_splats=3)
        >>> initialise_from_batch(layer, torch.randn(5, 7, 8))
    """

    def start(name: str, layer: SplatAttention, send_positions: Tensor, receive_positions: Tensor) -> None:
        points = torch.cat([send_positions, receive_positions]).transpose(0, 1)  # [H, N, P]
        layer.free_splats().centers.copy_(kmeans(points, layer.num_splats, seed=seed))
        layer.log_scales.copy_(_log_scales(points, layer.centers, layer.log_scales))

    run_watched(model, batch, start)


def _log_scales(
    points: Float[Tensor, "H N P"], centers: Float[Tensor, "H M P"], before: Float[Tensor, "H M"]
) -> Float[Tensor, "H M"]:
    """One scale a head, by which log-affinities spread by `SPREAD` over the splats; as before if there is one splat."""
    halved = torch.cdist(points, centers.to(points.dtype)).square() / 2
    spread = halved.var(-1, correction=0).mean(-1, keepdim=True).sqrt()  # [H, 1]
    return torch.where(spread > 0, 0.5 * (spread / SPREAD).log(), before)


def splats_of_keys(keys: Float[Tensor, "H M P"], log_sharpness: Float[Tensor, "H"]) -> Splats:
    """The splats whose `mixture` weights at a query are softmax attention's weights of these keys, exactly.

        softmax_m(s <q, k_m> / sqrt(P)) = softmax_m(log alpha_m - |q - k_m|^2 / (2 sigma^2)),
        sigma^2 = sqrt(P) / s,    log alpha_m = |k_m|^2 / (2 sigma^2)

    Args:
        log_sharpness: log s, the logarithm of what a head multiplies its scores by.
    """
    variance = math.sqrt(keys.shape[-1]) * (-log_sharpness).exp()[:, None]  # [H, 1]
    log_amplitudes = keys.square().sum(-1) / (2 * variance)
    return Splats(keys, (0.5 * variance.log()).expand_as(log_amplitudes), log_amplitudes)


@torch.no_grad()
def initialise_from_attention(
    layer: SplatAttention, attention: SoftmaxAttention, hidden_states: Float[Tensor, "B T C"], *, seed: int = 0
) -> None:
    """Start a splat attention from a trained softmax attention, on tokens such as it was trained on.

    Projections, convolution, head norm and output are copied, and a window is made as sharp as the attention. Centers
    are k-means of the pooled queries and keys; scales and amplitudes make each center a key, see `splats_of_keys`, with
    the mean sharpness of the heads that receive from one.
    Rotary positions have no heir among the splats: what the attention knew of order stays in the window alone.

    Args:
        layer: changed in place. It has no `position_dim` of its own and no tied positions.
        attention: of the same hidden size, heads, convolution, head norm and output gate.
        hidden_states: what reaches the layer.

    Raises:
        ValueError: the two differ in a part that is copied, or there are fewer positions than splats.
    """
    heads = [(layer.num_heads, layer.num_sets), (attention.num_heads, attention.num_key_value_heads)]
    if heads[0] != heads[1]:
        raise ValueError(
            "layer has {} heads, {} of which send, expected {} and {} as in the attention".format(*heads[0], *heads[1])
        )
    for name in ("projections", "output"):
        ours, theirs = (dict(side.get_submodule(name).named_parameters()) for side in (layer, attention))
        for part in sorted(ours.keys() | theirs.keys()):
            given, expected = (list(side[part].shape) if part in side else None for side in (ours, theirs))
            if given != expected:
                raise ValueError(f"layer has {name}.{part} of shape {given}, expected {expected} as in the attention")
    layer.projections.load_state_dict(attention.projections.state_dict())
    layer.output.load_state_dict(attention.output.state_dict())
    if layer.window_log_scale is not None:
        layer.window_log_scale.copy_(attention.log_scale)

    def start(name: str, layer: SplatAttention, send_positions: Tensor, receive_positions: Tensor) -> None:
        points = torch.cat([send_positions, receive_positions]).transpose(0, 1)  # [H, N, P]
        log_sharpness = attention.log_scale.unflatten(0, (layer.num_sets, -1)).mean(1)
        splats = splats_of_keys(kmeans(points, layer.num_splats, seed=seed), log_sharpness)
        for parameter, value in zip(layer.free_splats()[:3], splats[:3], strict=True):
            parameter.copy_(value)

    run_watched(layer, hidden_states, start)
