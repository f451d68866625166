"""Who is compared: every mixer under one name, in one shell, with one knob that sets how much it remembers.

A new contestant is one row of `CONTESTANTS`.
"""

# C hidden size

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from benchmarks.rivals import RIVALS, Rival
from splatflow.nn import SoftmaxAttention, SplatAttention, Strategy
from splatflow.nn.strategy import Curriculum, KMeansStart, MinimumDistance, OverlapLoss, Repulsion, SplitAndPrune

from .controls import FrozenCenters, LinearRouter

TOLERANCE = 0.02  # how far a contestant may be from the state and the parameters that were asked for


class Shell(NamedTuple):
    """What all contestants of a comparison share."""

    width: int = 64
    num_heads: int = 2
    conv_size: int = 4
    output_gate: bool = False


SHELL = Shell()


class Contestant(NamedTuple):
    """`build(shell, size)` makes a mixer. `sized`: the size says how large its state is; else no size changes that.

    `table` names what looks up a bias of the routing: the "token", or its "place" in the text. `strategy` moves splats
    while they learn, and `kept` is the share of them that is examined, those used most. `heir_of` names the contestant
    that learns as long before, on lessons of its own, and from which this one begins.
    """

    build: Callable[[Shell, int], nn.Module]
    sized: bool = True
    control: bool = False  # a foil of splats, not a rival
    table: Literal["token", "place"] | None = None
    strategy: Strategy = Strategy()  # it is frozen
    kept: float = 1.0
    heir_of: str | None = None


def _shared(shell: Shell) -> dict[str, Any]:
    return {"conv_size": shell.conv_size, "output_gate": shell.output_gate, "head_norm": True}


def _splats(kind: type[SplatAttention], shell: Shell, size: int, **options: Any) -> nn.Module:
    return kind(shell.width, shell.num_heads, size, **options, **_shared(shell))


def _window(shell: Shell, size: int) -> nn.Module:
    return SoftmaxAttention(shell.width, shell.num_heads, window_size=size, **_shared(shell))


def _softmax(shell: Shell, size: int) -> nn.Module:
    return SoftmaxAttention(shell.width, shell.num_heads, **_shared(shell))


def _window_and_splats(shell: Shell, size: int) -> nn.Module:
    """A token of window for every two splats: the two memories are of about one size."""
    return _splats(SplatAttention, shell, size, window_size=max(1, size // 2), decay="head")


def _nearest(shell: Shell, size: int) -> nn.Module:
    return _splats(SplatAttention, shell, size, top_p=min(4, size))


def _lattice(shell: Shell, size: int) -> nn.Module:
    """256 splats a head, of which a token touches four: more to remember in than the others, for no more work."""
    return _splats(SplatAttention, shell, 256, routing="lattice", top_p=4)


def _window_beside(shell: Shell, size: int) -> nn.Module:
    """As `_window_and_splats`, of splats that forget nothing."""
    return _splats(SplatAttention, shell, size, window_size=max(1, size // 2))


def _wide_values(shell: Shell, size: int) -> nn.Module:
    """Values of 7/4 of the width: about as much is remembered by half as many splats."""
    return _splats(SplatAttention, shell, size, value_dim=7 * shell.width // (4 * shell.num_heads))


def _both_directions(shell: Shell, size: int) -> nn.Module:
    """As many splats as the causal ones have at 1,620 numbers: being centred, its convolution has no state."""
    return _splats(SplatAttention, shell, 16, causal=False)


def _rival(kind: type[Rival], shell: Shell, size: int) -> nn.Module:
    return kind(shell.width, shell.num_heads, size, **_shared(shell))


_PLAIN = partial(_splats, SplatAttention)

CONTESTANTS: dict[str, Contestant] = {
    "splats": Contestant(_PLAIN),
    "splats, decay": Contestant(partial(_splats, SplatAttention, decay="head")),
    "splats, decay, skip": Contestant(partial(_splats, SplatAttention, decay="head", value_skip=True)),
    "window + splats": Contestant(_window_and_splats),
    "splats, top 4": Contestant(_nearest),
    "splats, compact": Contestant(partial(_splats, SplatAttention, routing="compact")),
    "splats, write gate": Contestant(partial(_splats, SplatAttention, write_gate=True)),
    "splats, routing bias": Contestant(partial(_splats, SplatAttention, routing_bias=True)),
    "lattice of 256, top 4": Contestant(_lattice, sized=False),
    "splats, token table": Contestant(_PLAIN, table="token"),
    "splats, place table": Contestant(_PLAIN, table="place"),
    "splats, window": Contestant(_window_beside),
    "splats, linear transform": Contestant(partial(_splats, SplatAttention, transform="linear")),
    "splats, lagged MLP": Contestant(partial(_splats, SplatAttention, transform="lagged", lag=16)),
    "splats, one hop": Contestant(partial(_splats, SplatAttention, hops=1)),
    "splats, two hops": Contestant(partial(_splats, SplatAttention, hops=2)),
    "splats, wide values": Contestant(_wide_values),
    "splats, half kept": Contestant(_PLAIN, kept=0.5),
    "splats, k-means start": Contestant(_PLAIN, strategy=KMeansStart()),
    "splats, overlap loss": Contestant(_PLAIN, strategy=OverlapLoss()),
    "splats, repulsion": Contestant(_PLAIN, strategy=Repulsion()),
    "splats, minimum distance": Contestant(_PLAIN, strategy=MinimumDistance(6.0)),
    "splats, split and prune": Contestant(_PLAIN, strategy=SplitAndPrune()),
    "splats, curriculum": Contestant(_PLAIN, strategy=Curriculum()),
    "splats, attention start": Contestant(_PLAIN, heir_of="softmax"),
    "splats, twice as long": Contestant(_PLAIN, heir_of="splats"),
    "splats, both directions": Contestant(_both_directions, sized=False),
    "linear router": Contestant(partial(_splats, LinearRouter), control=True),
    "linear router, decay, skip": Contestant(
        partial(_splats, LinearRouter, decay="head", value_skip=True), control=True
    ),
    "frozen centers": Contestant(partial(_splats, FrozenCenters), control=True),
    "window only": Contestant(_window, control=True),
    "softmax": Contestant(_softmax, sized=False, control=True),
    **{name: Contestant(partial(_rival, kind)) for name, kind in RIVALS.items()},
}


def state_size(mixer: nn.Module, seq_len: int) -> int:
    """Numbers that a layer remembers of one sequence of `seq_len` tokens: means, normalisers, window, convolution."""
    if isinstance(mixer, Rival):
        return mixer.state_size
    with torch.no_grad():
        _, state = mixer(torch.zeros(1, seq_len, mixer.hidden_size))
    return sum(part.numel() for part in _tensors(state) if part.is_floating_point())


def step_operations(mixer: nn.Module, seq_len: int) -> int:
    """Multiply-adds of one token in a layer, as a recurrent step: the mixing of all heads, without projections.

    A token of softmax attention meets the whole context, here counted at its full length `seq_len`.
    """
    if isinstance(mixer, Rival):
        return mixer.step_operations
    window = mixer.window_size
    if isinstance(mixer, SoftmaxAttention):
        head_dim = mixer.hidden_size // mixer.num_heads
        return mixer.num_heads * 2 * head_dim * min(window or seq_len, seq_len)
    # two routings, each a product with all centers; a write, a read and perhaps a decay of every splat touched
    routings = 2 * mixer.centers[0].numel()
    passes = 2 if mixer.decay is None else 3
    touched = mixer.num_splats if mixer.top_p is None else mixer.top_p
    if mixer.listen is not None:  # what a splat listens for in its content, and what it says
        passes += 2
    made = 0
    if mixer.content_mlp is not None:  # once a chunk a SwiGLU of 2 D for each splat, and what it makes is read
        width = mixer.value_dim
        made = mixer.num_splats * width * (1 + 6 * width // mixer.lag)
    handed_on = mixer.num_splats**2 if len(mixer.hops) else 0  # receive weights times what splats make of each other
    near = window * (mixer.position_dim + mixer.value_dim)
    return mixer.num_heads * (routings + passes * touched * mixer.value_dim + handed_on + made + near)


@lru_cache
def size_for(name: str, shell: Shell, state: int) -> int:
    """The size at which a contestant remembers about `state` numbers a layer.

    Raises:
        ValueError: no size comes within `TOLERANCE`.
    """
    if not CONTESTANTS[name].sized:
        return 0

    def remembered(size: int) -> int:
        return state_size(CONTESTANTS[name].build(shell, size), seq_len=1)

    size = 1
    while remembered(size + 1) <= state:
        size += 1
    nearest = min((size, size + 1), key=lambda near: abs(remembered(near) - state))
    if abs(remembered(nearest) - state) > TOLERANCE * state:
        raise ValueError(
            f"{name} cannot remember {state} numbers within {TOLERANCE:.0%}: the nearest are {remembered(size)} and "
            f"{remembered(size + 1)}"
        )
    return nearest


def _tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    return [] if state is None else [tensor for part in state for tensor in _tensors(part)]
