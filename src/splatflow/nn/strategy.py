"""What changes splats between the steps of training: never in `forward`, and never the shape of a parameter.

A training loop makes the strategies it wants and calls all three of their methods:

    strategy.begin(model, optimizer, batch)                   # a new run, not one that goes on
    for step, batch in enumerate(batches, start=1):
        loss(model, batch).backward()
        strategy.after_backward(model, optimizer, step)
        optimizer.step()
        strategy.after_step(model, optimizer, step, batch)

What a strategy does depends on the model, the optimizer, the step and the batch alone. It remembers nothing, so a run
that goes on from a checkpoint equals one without interruption. A new one is a class here and a row of `STRATEGIES`.
"""

# H head, M splat, R relocated splat

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from splatflow.ops import ROUTINGS, Splats
from splatflow.requirements import require_at_least, require_integers

from .geometry import DORMANT, is_awake, keep_apart, keep_length, overlap, overlap_loss, repulsion
from .splat_attention import SplatAttention
from .splat_rows import by_splat, moments_of, parameters_of_splats, require_interchangeable
from .starts import initialise_from_batch
from .usage import Batch, is_dead, splat_layers, usage

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

DUPLICATE = 0.99  # two splats that overlap more are one
JITTER = 0.5  # how far a split moves each of the two, in scales


@dataclass(frozen=True)
class Strategy:
    """Does nothing; a strategy overrides what it needs. `step` counts from 1."""

    def begin(self, model: nn.Module, optimizer: Optimizer, batch: Batch) -> None:
        """Before the first step of a new run."""

    def after_backward(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """When all gradients of a step are there, clipped if they are."""

    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int, batch: Batch) -> None:
        """When the optimizer has changed the parameters."""


@dataclass(frozen=True)
class KMeansStart(Strategy):
    """Splats start at the clusters of the first batch, see `initialise_from_batch`."""

    seed: int = 0

    def begin(self, model: nn.Module, optimizer: Optimizer, batch: Batch) -> None:
        initialise_from_batch(model, batch, seed=self.seed)


@dataclass(frozen=True)
class OverlapLoss(Strategy):
    """Adds the gradient of `weight` times the overlap loss of each layer, to centers alone.

    Scales are left out, for the cheapest way to overlap less is to shrink.
    """

    weight: float = 0.1

    def __post_init__(self) -> None:
        require_at_least(0, weight=self.weight)

    def after_backward(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        for layer in splat_layers(model).values():
            centers, log_scales, log_amplitudes = layer.free_splats()[:3]
            loss = self.weight * overlap_loss(Splats(centers, log_scales.detach(), log_amplitudes.detach()))
            (gradient,) = torch.autograd.grad(loss, centers)
            centers.grad = gradient if centers.grad is None else centers.grad + gradient


@dataclass(frozen=True)
class Repulsion(Strategy):
    """Moves centers away from one another by `strength` times the learning rate; they keep their length.

    A displacement after the step, as AdamW's decay is, and no gradient: an optimizer that divides a gradient by its own
    size would take the strength out of it just where the loss is flat, as it is between splats that have collapsed.
    """

    strength: float = 10.0

    def __post_init__(self) -> None:
        require_at_least(0, strength=self.strength)

    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int, batch: Batch) -> None:
        for layer in splat_layers(model).values():
            distance = self.strength * _learning_rate(optimizer, layer.centers)
            layer.centers.copy_(keep_length(layer.centers + distance * repulsion(layer.free_splats()), layer.centers))


@dataclass(frozen=True)
class MinimumDistance(Strategy):
    """No two awake centers of a head are nearer than `distance`, see `keep_apart`."""

    distance: float = 1.0

    def __post_init__(self) -> None:
        require_at_least(0, distance=self.distance)

    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int, batch: Batch) -> None:
        for layer in splat_layers(model).values():
            for head, awake in enumerate(is_awake(layer.free_splats())):
                layer.centers[head, awake] = keep_apart(layer.centers[head, awake][None], self.distance)[0]


@dataclass(frozen=True)
class SplitAndPrune(Strategy):
    """Every so many steps, splats that do nothing are moved onto the busiest ones, which share with them.

    Nothing is done by a splat that is dead (`is_dead`, on the batch of that step), and by one that overlaps with a
    busier one by more than `DUPLICATE`. The busiest of the others is split first, each once at most.
    """

    every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        require_integers(1, every=self.every)

    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int, batch: Batch) -> None:
        if step % self.every:
            return
        shares = usage(model, batch)
        for index, (name, layer) in enumerate(splat_layers(model).items()):
            awake = is_awake(layer.free_splats())
            useless = awake & (is_dead(shares[name]) | is_duplicate(layer.free_splats(), shares[name]))
            split(
                layer, optimizer, *_pair(shares[name], awake & ~useless, useless), seed=_seed_of(self.seed, step, index)
            )


@dataclass(frozen=True)
class Curriculum(Strategy):
    """A few splats a head are awake at first; their number doubles, at even intervals, until all are at step `until`.

    A splat wakes as one half of the busiest one, on the batch of that step.
    """

    first: int = 1
    until: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        require_integers(1, first=self.first, until=self.until)

    def begin(self, model: nn.Module, optimizer: Optimizer, batch: Batch) -> None:
        for layer in splat_layers(model).values():
            asleep = torch.arange(layer.num_splats, device=layer.centers.device) >= self.first
            put_to_sleep(layer, optimizer, asleep.expand(layer.num_sets, -1))

    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int, batch: Batch) -> None:
        layers = splat_layers(model)
        if not any(self._grows(layer.num_splats, step) for layer in layers.values()):
            return
        shares = usage(model, batch)
        for index, (name, layer) in enumerate(layers.items()):
            awake = is_awake(layer.free_splats())
            missing = (self.num_awake(layer.num_splats, step) - awake.sum(-1, keepdim=True)).clamp_min(0)  # [H, 1]
            waking = ~awake & ((~awake).cumsum(-1) <= missing)
            split(layer, optimizer, *_pair(shares[name], awake, waking), seed=_seed_of(self.seed, step, index))

    def num_awake(self, num_splats: int, step: int) -> int:
        """How many splats a head are awake after a step.

        >>> [Curriculum(first=3, until=20).num_awake(11, step) for step in (9, 10, 19, 20)]
        [3, 6, 6, 11]
        """
        doublings = math.ceil(math.log2(max(1, num_splats / self.first)))
        return min(num_splats, self.first * 2 ** (doublings * min(step, self.until) // self.until))

    def _grows(self, num_splats: int, step: int) -> bool:
        return self.num_awake(num_splats, step) > self.num_awake(num_splats, step - 1)


STRATEGIES: dict[str, type[Strategy]] = {
    "kmeans_start": KMeansStart,
    "overlap_loss": OverlapLoss,
    "repulsion": Repulsion,
    "min_distance": MinimumDistance,
    "split_and_prune": SplitAndPrune,
    "curriculum": Curriculum,
}


def is_duplicate(splats: Splats, shares: Float[Tensor, "H M"]) -> Bool[Tensor, "H M"]:
    """Which splats lie, awake, where a busier one lies, or an earlier one that is as busy."""
    awake = is_awake(splats)
    same = (overlap(splats) > DUPLICATE) & awake[:, :, None] & awake[:, None]  # [H, M, M]
    busier = shares[:, None] > shares[:, :, None]  # [H, M, M], the second than the first
    as_busy = shares[:, None] == shares[:, :, None]
    return (same & (busier | as_busy.tril(-1))).any(-1)


@torch.no_grad()
def split(
    layer: SplatAttention,
    optimizer: Optimizer,
    heads: Int[Tensor, "R"],
    parents: Int[Tensor, "R"],
    children: Int[Tensor, "R"],
    *,
    seed: int,
    jitter: float = JITTER,
) -> None:
    """Make splat `children` of a head one half of splat `parents`: what the two do together is what the parent did.

    All that belongs to a splat is copied, the optimizer's moments too: children go on as their parents did, while
    moments of 0 would, once the optimizer no longer corrects for its start, make their first steps too long. Amplitude
    and prior mass are halved (divided by sqrt(2) where splats hold plain sums), which with `jitter` 0 leaves the
    layer's output as it was, unless tokens touch only the nearest: half an amplitude is farther away. The two centers
    are moved apart by `jitter` scales each, in a random direction, and keep their length. Parents of one head are
    different from one another and from all children.
    """
    require_interchangeable(layer)
    for parameter in parameters_of_splats(layer):
        for tensor in (parameter, *moments_of(optimizer, parameter)):
            rows = by_splat(tensor, layer)
            rows[heads, children] = rows[heads, parents]
    both = torch.cat([heads, heads]), torch.cat([parents, children])
    log_half = -math.log(2) if ROUTINGS[layer.routing].running_mean else -0.5 * math.log(2)
    layer.log_amplitudes[both] += log_half
    layer.prior_log_mass[both] += log_half

    centers = layer.centers[heads, parents]  # [R, P]
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(centers.shape, generator=generator, dtype=torch.float64).to(centers)
    directions = directions / torch.linalg.vector_norm(directions, dim=-1, keepdim=True)
    distance = jitter * layer.log_scales[heads, parents].exp()[:, None] * directions
    layer.centers[heads, parents] = keep_length(centers - distance, centers)
    layer.centers[heads, children] = keep_length(centers + distance, centers)


@torch.no_grad()
def put_to_sleep(layer: SplatAttention, optimizer: Optimizer, asleep: Bool[Tensor, "H M"]) -> None:
    """Give these splats the log-amplitude DORMANT: share and gradients 0. The optimizer forgets their moments."""
    require_interchangeable(layer)
    for parameter in parameters_of_splats(layer):
        for moment in moments_of(optimizer, parameter):
            by_splat(moment, layer)[asleep] = 0.0
    layer.log_amplitudes[asleep] = DORMANT


def _pair(
    shares: Float[Tensor, "H M"], splittable: Bool[Tensor, "H M"], movable: Bool[Tensor, "H M"]
) -> tuple[Tensor, Tensor, Tensor]:
    """(heads, parents, children): in each head the busiest of the first with the least busy of the second."""
    busiest = shares.masked_fill(~splittable, -1.0).argsort(dim=-1, descending=True, stable=True)
    idlest = shares.masked_fill(~movable, math.inf).argsort(dim=-1, stable=True)
    count = torch.minimum(splittable.sum(-1), movable.sum(-1))  # [H]
    chosen = torch.arange(shares.shape[-1], device=shares.device) < count[:, None]  # [H, M]
    return chosen.nonzero()[:, 0], busiest[chosen], idlest[chosen]


def _seed_of(*parts: int) -> int:
    """One number for a place in a run, so that chance depends on nothing that a checkpoint would have to keep."""
    return zlib.crc32(repr(parts).encode())


def _learning_rate(optimizer: Optimizer, parameter: nn.Parameter) -> float:
    """Of the group that holds a parameter; 0 if none does."""
    rates = (group["lr"] for group in optimizer.param_groups if any(part is parameter for part in group["params"]))
    return float(next(rates, 0.0))
