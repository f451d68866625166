"""Settings of what changes splats between the steps of a run, and the strategies that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from splatflow.nn.strategy import (
    Curriculum,
    KMeansStart,
    MinimumDistance,
    OverlapLoss,
    Repulsion,
    SplitAndPrune,
    Strategy,
)
from splatflow.requirements import require_at_least, require_one_of

if TYPE_CHECKING:
    from splatflow.training.config import ModelConfig

Start = Literal["random", "kmeans"]


@dataclass(frozen=True)
class GeometryConfig:
    """What moves splats besides the gradient of the text; at first nothing does."""

    start: Start = "random"
    """Where splats begin: anywhere, or ("kmeans") where the tokens of the first batch lie."""
    overlap: float = 0.0
    """Weight of the overlap loss of each layer."""
    repulsion: float = 0.0
    """How far splats repel one another in a step, in learning rates."""
    min_distance: float = 0.0
    """The least distance between the splats of a head, kept by moving them; positions have length sqrt(width)."""
    split_every: int = 0
    """Steps between two moves of idle splats onto busy ones; 0 makes none."""
    first_splats: int = 0
    """Splats a head at first, which double until all are awake; 0 begins with all."""
    all_awake_by: int = 0
    """The step by which all splats are awake, if not all are at first."""

    def __post_init__(self) -> None:
        require_one_of(get_args(Start), start=self.start)
        require_at_least(
            0,
            overlap=self.overlap,
            repulsion=self.repulsion,
            min_distance=self.min_distance,
            split_every=self.split_every,
            first_splats=self.first_splats,
            all_awake_by=self.all_awake_by,
        )
        if bool(self.first_splats) != bool(self.all_awake_by):
            raise ValueError(
                f"first_splats is {self.first_splats} and all_awake_by {self.all_awake_by}, expected both or neither"
            )


def require_movable(geometry: GeometryConfig, model: ModelConfig) -> None:
    """Raises ValueError for settings that move splats, with a model whose splats cannot be moved so."""
    if geometry != GeometryConfig() and model.mixer != "splat":
        raise ValueError(f"geometry is set with model.mixer {model.mixer!r}, expected 'splat', with splats")
    if geometry != GeometryConfig() and model.routing == "lattice":
        raise ValueError("geometry is set with model.routing 'lattice', expected splats that lie free")
    moves = geometry.split_every or geometry.first_splats
    if moves and (model.routing_bias or model.token_bias or model.position_bias):
        raise ValueError("geometry.split_every or first_splats is set with a bias, which splats cannot exchange")
    if geometry.first_splats > model.num_splats:
        first, all_splats = geometry.first_splats, model.num_splats
        raise ValueError(f"geometry.first_splats is {first}, expected at most model.num_splats, {all_splats}")


def strategies_of(config: GeometryConfig, seed: int = 0) -> list[Strategy]:
    """Those that are switched on, in the order in which they act.

    >>> strategies_of(GeometryConfig(overlap=0.5))
    [OverlapLoss(weight=0.5)]
    """
    chosen: list[Strategy] = []
    if config.start == "kmeans":
        chosen.append(KMeansStart(seed))
    if config.first_splats:
        chosen.append(Curriculum(config.first_splats, config.all_awake_by, seed))
    if config.overlap:
        chosen.append(OverlapLoss(config.overlap))
    if config.split_every:
        chosen.append(SplitAndPrune(config.split_every, seed))
    if config.repulsion:
        chosen.append(Repulsion(config.repulsion))
    if config.min_distance:  # last: what it promises holds after the step
        chosen.append(MinimumDistance(config.min_distance))
    return chosen
