"""Random calls of `splat_attention`: what goes in, by name, and what comes out, gradients included."""

# B batch, T target token, S source token, H head, M splat, P position width, D value width

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import splatflow.ops.reach as reach_module
from splatflow.ops import BACKENDS, ROUTINGS, SplatState, Transform, splat_attention
from splatflow.ops.chunked import MIN_CHUNK
from splatflow.ops.routing import Router
from splatflow.ops.splats import Sources, Targets, inner_dtype

Arguments = dict[str, Tensor]  # the tensors of one call, by name; those of the splats and the state one by one

PER_TOKEN = (
    *("send_positions", "receive_positions", "values", "send_bias", "receive_bias"),
    *("log_decay", "write_gate", "padding_mask"),
)
OF_SPLATS = ("centers", "log_scales", "log_amplitudes", "log_reaches")
PER_SPLAT = ("receive_mixing", "listen", "say")  # what all sequences share beside the splats
GRAINS = (None, "head", "splat")  # what a log_decay or a write_gate is given for
LENGTHS = (0, 1, 2, 7, 31, MIN_CHUNK - 1, MIN_CHUNK, MIN_CHUNK + 1, 101, 2 * MIN_CHUNK + 1)

# all but the kernels, which take minutes where there is no GPU: test_triton.py has cases of their own
PORTABLE = [name for name in BACKENDS if name != "triton"]
every_backend = pytest.mark.parametrize("backend", PORTABLE)
# every routing, with all splats and with the nearest two
ROUTES = [
    *({"routing": name} for name in ROUTINGS if name != "grouped"),
    *({"routing": name, "top_p": 2} for name, row in ROUTINGS.items() if row.nearest is not None),
]
every_route = pytest.mark.parametrize("route", ROUTES, ids=lambda route: "-".join(map(str, route.values())))


def make_arguments(
    *,
    seed: int = 0,
    B: int = 2,
    T: int = 37,
    S: int | None = None,
    H: int = 3,
    receivers: int = 1,
    M: int = 7,
    P: int = 4,
    D: int = 5,
    decay: str | None = None,
    gate: str | None = None,
    state: bool = False,
    padding: bool = False,
    tied: bool = False,
    strided: bool = False,
    bias: bool = False,
    mixing: bool = False,
    transform: bool = False,
    routing: str = "mixture",
    dtype: torch.dtype = torch.float64,
) -> Arguments:
    """Positions of RMS 1 in a cube, and scales a little wider than a layer's: every token reaches every splat.

    A decay is sometimes exactly 0 and sometimes -inf. `tied` leaves out `receive_positions`, `strided` makes every
    tensor non-contiguous. A lattice has the largest square of splats up to M, and an even P. Each of the H heads that
    send has so many `receivers`.
    """
    generator = torch.Generator().manual_seed(seed)
    S = T if S is None else S
    per_splat, R = (M,), M
    if routing == "lattice":
        K = math.isqrt(M)
        M, P, per_splat, R = K * K, P + P % 2, (2, K), 2 * K

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def positions(*shape: int) -> Tensor:
        return math.sqrt(3) * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1)

    def uniform(grain: str | None) -> Tensor:
        shape = {"head": (B, S, H), "splat": (B, S, H, M)}[grain]
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    arguments = {
        "send_positions": positions(B, S, H, P),
        "values": normal(B, S, H, D),
        "centers": positions(H, *per_splat, P if routing != "lattice" else P // 2),
        "log_scales": 0.5 * math.log(math.sqrt(P)) + 0.1 * normal(H, *per_splat),
        "log_amplitudes": 0.1 * normal(H, *per_splat),
    }
    if not tied:
        arguments["receive_positions"] = positions(B, T, H * receivers, P)
    if routing == "compact":
        arguments["log_reaches"] = reaches_in_gaps(arguments, 4 if dtype == torch.float64 else 200).log()
    if bias:
        arguments |= {"send_bias": normal(B, S, H, R), "receive_bias": normal(B, T, H * receivers, R)}
    if decay:
        kind = uniform(decay)
        strength = torch.where(kind < 0.2, 0.0, -0.5 * kind)
        arguments["log_decay"] = strength.masked_fill(kind > 0.95, -torch.inf)
    if gate:
        arguments["write_gate"] = 0.1 + 0.9 * uniform(gate)
        if state and not decay:  # without a state to fall back on, a gate of 0 would leave 0 / 0
            arguments["write_gate"][:, ::3] = 0.0
    if state:
        arguments["mass"] = 0.5 + normal(B, H, M).abs()
        arguments["total"] = normal(B, H, M, D)
    if mixing:
        arguments["receive_mixing"] = normal(H, M, M).softmax(-1)
    if transform:
        arguments |= {"listen": 0.3 * normal(H, M, D), "say": 0.3 * normal(H, M, D)}
    if strided:  # every second number of a larger array
        arguments = {name: torch.stack([part, part], -1)[..., 0] for name, part in arguments.items()}
    if padding:
        arguments["padding_mask"] = uniform("head")[..., 0] < 0.7
    return cast(arguments, dtype)


def reaches_in_gaps(arguments: Arguments, share: int) -> Tensor:
    """For each splat a reach that no token is just within or just without: the middle of the widest gap.

    At the edge a compact kernel is a difference of nearly equal numbers, of which few digits are known. One in `share`
    of the tokens at least is within reach, and as many are not.
    """
    positions = [arguments[name] for name in ("send_positions", "receive_positions") if name in arguments]
    distances = [torch.cdist(by_sender(part, arguments), arguments["centers"]) for part in positions]
    ordered = torch.cat(distances, 1).sort(1).values  # [H, tokens, M]
    if not ordered.shape[1]:
        return torch.ones_like(arguments["log_scales"])
    few = max(1, ordered.shape[1] // share)
    farther = ordered[:, -1:] + 1.0
    ordered = torch.cat([ordered, farther], 1)[:, few - 1 : ordered.shape[1] + 2 - few]
    widest = ordered.diff(dim=1).argmax(1, keepdim=True)
    return 0.5 * (ordered.gather(1, widest) + ordered.gather(1, widest + 1))[:, 0]


def by_sender(positions: Tensor, arguments: Arguments) -> Tensor:
    """[B, T, H R, P] -> [H, B T R, P], all positions that have to do with the splats of one head."""
    return positions.unflatten(2, (arguments["values"].shape[2], -1)).transpose(2, 3).flatten(0, 2).transpose(0, 1)


def cast(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The same numbers in another type; a state stays in the type that sums are kept in."""
    dtypes = {"padding_mask": torch.bool, "mass": inner_dtype(dtype), "total": inner_dtype(dtype)}
    return {name: part.to(dtypes.get(name, dtype)) for name, part in arguments.items()}


def skipping_anyway():
    """Within it the backend "reach" skips what it can, whether that pays or not, in chunks of few tokens."""
    return patch.multiple(reach_module, SHORTEST=0, FEWEST_SPLATS=0, LEAST_SKIPPED=0.0, CHUNK=13, BLOCK_ROWS=80)


def attend(arguments: Arguments, **options: Any) -> tuple[Tensor, SplatState]:
    """`splat_attention` of arguments by name."""
    rest = dict(arguments)
    parts = [rest.pop(name) for name in OF_SPLATS if name in rest]
    splats = ROUTINGS[options.get("routing", "mixture")].kind(*parts)
    if "mass" in rest:
        options["state"] = SplatState(rest.pop("mass"), rest.pop("total"))
    if "listen" in rest:
        options["transform"] = Transform(rest.pop("listen"), rest.pop("say"))
    send_positions, values = rest.pop("send_positions"), rest.pop("values")
    receive_positions = rest.pop("receive_positions", send_positions)
    with skipping_anyway() if options.get("backend") == "reach" else nullcontext():
        return splat_attention(send_positions, receive_positions, values, splats, **rest, **options)


def results(arguments: Arguments, call: Callable[..., tuple[Tensor, SplatState]] = attend, **options: Any) -> Arguments:
    """Output, state, and the gradients by every argument of one random weighing of both, as "d values" and so on."""
    leaves = {name: part.detach() for name, part in arguments.items()}
    floats = {name: part.requires_grad_() for name, part in leaves.items() if part.is_floating_point()}
    output, state = call(leaves, **options)
    parts = {"output": output, "mass": state.mass, "total": state.total}
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part) for name, part in parts.items()
    }
    # an empty sequence hands on what it was given, which may depend on nothing
    dependent = [name for name, part in parts.items() if part.requires_grad]
    if not dependent:
        return {**parts, **{f"d {name}": torch.zeros_like(part) for name, part in floats.items()}}
    gradients = torch.autograd.grad(
        [parts[name] for name in dependent],
        list(floats.values()),
        [weights[name] for name in dependent],
        materialize_grads=True,
    )
    return {**parts, **{f"d {name}": gradient for name, gradient in zip(floats, gradients, strict=True)}}


def part_of(arguments: Arguments, tokens: slice) -> Arguments:
    """A piece of the sequence."""
    return {name: part[:, tokens] if name in PER_TOKEN else part for name, part in arguments.items()}


def relative_error(actual: Tensor, expected: Tensor, unit: float = 1.0) -> float:
    """|actual - expected| / |expected|, as norms in fp64, and never relative to less than `unit`.

    Some results are 0, or nearly so, because terms of that size cancel (the gradient of a softmax over one splat, or of
    a mean of one token): there the rounding of the terms is all there is to compare.
    """
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp_min(unit)).item()


def without_top_p(options: dict) -> dict:
    return {name: option for name, option in options.items() if name != "top_p"}


def fit(backend: str, sizes: dict, options: dict) -> tuple[dict, dict]:
    """A case that the backend can do, as near as may be to the one given."""
    if backend == "reach":
        groups = {"M": 16} if sizes.get("M") == 9 else {}  # nine cannot be split into groups of one size
        return {**sizes, **groups, "routing": "compact", "mixing": False}, {
            **without_top_p(options),
            "routing": "compact",
        }
    if backend != "sparse":
        return sizes, options
    sizes = {**sizes, "decay": sizes.get("decay") and "head", "mixing": False}
    if ROUTINGS[options["routing"]].nearest is None:
        sizes["routing"] = options["routing"] = "mixture"
    return sizes, {**options, "top_p": options.get("top_p") or 1}


def supports(backend: str, route: dict, decay: str | None = None, mixing: bool = False) -> bool:
    router = Router(ROUTINGS[route["routing"]], None, route.get("top_p"), torch.ones(1, 1, 1) if mixing else None)
    log_decay = {None: None, "head": torch.zeros(1, 1, 1, 1), "splat": torch.zeros(1, 1, 1, 2)}[decay]
    tokens = torch.zeros(1, 1, 1, 1)
    sources = Sources(tokens, tokens, None, log_decay, None)
    return BACKENDS[backend].supports(router, sources, Targets(tokens, None)) is None


def skip_unless(backend: str, route: dict, decay: str | None = None, mixing: bool = False) -> None:
    if not supports(backend, route, decay, mixing):
        pytest.skip(f"{backend} cannot")


def is_clear(arguments: Arguments, options: dict) -> bool:
    """No choice of splats hangs on the last digits of an affinity."""
    row, top_p = ROUTINGS[options["routing"]], options.get("top_p")
    margins = [math.inf]
    for side in ("send", "receive"):
        positions = arguments.get(f"{side}_positions")
        if positions is None or not positions.numel():
            continue
        bias = arguments.get(f"{side}_bias")
        count = positions.shape[2] // arguments["values"].shape[2]
        splats = row.kind(
            *(arguments[name].double().repeat_interleave(count, 0) for name in OF_SPLATS if name in arguments)
        )
        affinities = row.affinity(positions.double(), splats, bias)
        if top_p is not None and top_p < splats.num_splats:
            ordered = affinities.sort(dim=-1, descending=True).values
            margins.append((ordered[..., top_p - 1] - ordered[..., top_p]).min().item())
        if options["routing"] == "compact":
            distance = torch.cdist(positions.double().transpose(1, 2), splats.centers[None]).transpose(1, 2)
            edge = (distance - splats.log_reaches.exp()).abs().min().item()
            single = arguments["values"].dtype != torch.float64
            margins.append(edge / 3000 if single else edge)  # nearer its end more digits are lost than 1e-5 admits
            nearest = distance.sort(dim=-1).values
            margins.append((nearest[..., 1:2] - nearest[..., :1]).min().item() if nearest.shape[-1] > 1 else math.inf)
    return min(margins) > 1e-5


def unit_of(name: str, sizes: dict, routing: str) -> float:
    """The size that a result has, unless its terms cancel, where inputs and cotangents are of size 1.

    A mean stays of size 1, a plain sum grows with its tokens, and a gradient is a sum over tokens with random signs.
    """
    num_tokens = max(1, sizes["T"], sizes.get("S", 0))
    if not ROUTINGS[routing].running_mean:
        return num_tokens
    return math.sqrt(sizes["B"] * num_tokens) if name.startswith("d ") else 1.0


@st.composite
def cases(draw: st.DrawFn, causal: bool | None = None, lengths: Sequence[int] = LENGTHS) -> tuple[dict, dict]:
    """(keywords of `make_arguments`, options of the call), in every combination that the operator admits."""
    causal = draw(st.booleans()) if causal is None else causal
    tied = draw(st.booleans())
    sizes = {
        "T": draw(st.sampled_from(lengths)),
        "B": draw(st.sampled_from((1, 2))),
        "H": draw(st.sampled_from((1, 3))),
        "receivers": 1 if tied else draw(st.sampled_from((1, 1, 2, 3))),
        "M": draw(st.sampled_from((1, 2, 7, 9))),
        "P": draw(st.sampled_from((1, 4))),
        "D": draw(st.sampled_from((1, 5))),
    }
    if not causal and not tied:
        sizes["S"] = draw(st.sampled_from(lengths))
    kinds = {
        "seed": draw(st.integers(0, 10_000)),
        "decay": draw(st.sampled_from(GRAINS)) if causal else None,
        "gate": draw(st.sampled_from(GRAINS)),
        "state": draw(st.booleans()),
        "padding": draw(st.booleans()),
        "tied": tied,
        "strided": draw(st.booleans()),
        "mixing": draw(st.booleans()),
        "transform": draw(st.booleans()),
    }
    routing = draw(st.sampled_from(list(ROUTINGS)))
    kinds |= {"routing": routing, "bias": draw(st.booleans())}
    options = {"causal": causal, "routing": routing}
    if ROUTINGS[routing].nearest is not None:
        num_splats = math.isqrt(sizes["M"]) ** 2 if routing == "lattice" else sizes["M"]
        options["top_p"] = min(num_splats, draw(st.sampled_from((1, 2, 5))))
        if routing != "grouped" and draw(st.booleans()):
            options["top_p"] = None
    return {**sizes, **kinds}, options
