"""A token of the hybrid in one launch: what is heard of both memories, and both after it, are what the parts give.

Without a GPU the kernel is interpreted, in tiles of which a window has few.
"""

# B batch, W window_size, G sending head, R receiving heads of each, H = G R, M splat, P position width, D value width

import importlib.util
import itertools
import random
import subprocess
import sys
from functools import partial
from unittest.mock import patch

import pytest
import torch
from cases import GRAINS, relative_error

import splatflow.nn.splat_attention as layer_module
import splatflow.ops.triton as room
from splatflow.nn import SplatAttention
from splatflow.ops import Splats, SplatState, Transform, hybrid
from splatflow.ops.hybrid import hybrid_attention
from splatflow.ops.splats import Targets
from splatflow.ops.window_state import WindowState, each_part, empty_window

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from kernel_cases import DEVICE, TILE, TOLERANCE, poisoned

from splatflow.ops.triton import launch, operators

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets, that exp(-1e9) is 0
WINDOWS = (1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE + 1, 2 * TILE + 3)
WIDTHS = ((7, 4, 5), (1, 2, 1), (17, 6, 3), (16, 16, 16), (5, 18, 3), (3, 2, 18))  # M, P, D, of which P is even
NUM_CASES = 21
in_parts = partial(hybrid_attention, backend="portable")
STARTS = ("full", "padded", "empty")  # the window: all real; some not, nor some new tokens; none real, nothing sent yet


@pytest.fixture(autouse=True)
def _small_and_poisoned():
    """Tiles of 16 tokens; and what is not written is NaN."""
    with patch.object(launch, "WINDOW_TILE", TILE), poisoned():
        yield


def make(*, seed=0, B=2, W=5, G=2, R=1, M=7, P=4, D=5, decay=None, gate=None, start="full", strided=False):
    """Arguments of `hybrid_attention`, of type fp32; only heads that receive number G R."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        part = torch.randn(*shape, 2 if strided else 1, generator=generator)
        return part.to(DEVICE)[..., 0]

    def factor(grain, length):
        shape = {None: None, "head": (B, length, G), "splat": (B, length, G, M)}[grain]
        return None if shape is None else normal(*shape).sigmoid()

    def tokens(length):
        log_decay = factor(decay, length)
        log_decay = None if log_decay is None else log_decay.log().masked_fill(log_decay > 0.9, -torch.inf)
        real = normal(B, length) < (0.5 if start == "padded" else torch.inf)
        positions, values = normal(B, length, G, P), normal(B, length, G, D)
        return WindowState(positions, values, real, log_decay, factor(gate, length), None)

    token, state = tokens(1), SplatState(0.5 + normal(B, G, M).abs(), normal(B, G, M, D))
    return {
        "targets": Targets(normal(B, 1, G * R, P), None),
        "tokens": token,
        "log_scale": 0.5 * normal(G * R),
        "splats": Splats(normal(G, M, P), 0.5 + 0.1 * normal(G, M), 0.1 * normal(G, M)),
        "window": empty_window(token, W) if start == "empty" else tokens(W),
        "state": SplatState(*map(torch.zeros_like, state)) if start == "empty" else state,
    }


def cast(arguments, dtype, inner):
    """Decays, gates and the state go to the type of sums."""
    floats = {name: part for name, part in arguments.items() if name not in ("tokens", "window", "state", "log_scale")}
    changed = {name: type(part)(*(x if x is None else x.to(dtype) for x in part)) for name, part in floats.items()}
    for name in ("tokens", "window"):
        inside = {part: getattr(arguments[name], part) for part in ("log_decay", "write_gate")}
        changed[name] = arguments[name]._replace(
            send_positions=arguments[name].send_positions.to(dtype),
            values=arguments[name].values.to(dtype),
            **{part: None if factor is None else factor.to(inner) for part, factor in inside.items()},
        )
    state = SplatState(*(part.to(inner) for part in arguments["state"]))
    return {**arguments, **changed, "log_scale": arguments["log_scale"].to(dtype), "state": state}


def case(number):
    """Keywords of `make`: a fixed draw of all that the kernel is built for."""
    draw = random.Random(number)
    return {
        "seed": number,
        "B": draw.choice((1, 2)),
        "W": WINDOWS[number % len(WINDOWS)],
        "G": draw.choice((1, 2, 3)),
        "R": draw.choice((1, 1, 2, 3)),
        **dict(zip("MPD", draw.choice(WIDTHS), strict=True)),
        "decay": draw.choice(GRAINS),
        "gate": draw.choice(GRAINS),
        "start": STARTS[number // len(WINDOWS) % len(STARTS)],
        "strided": draw.random() < 0.2,
    }


def named(number):
    return "-".join(f"{name}={value}" for name, value in case(number).items() if name != "seed" and value)


@pytest.mark.parametrize("number", range(NUM_CASES), ids=named)
def test_equals_the_parts(number):
    arguments = make(**case(number))
    expected = in_parts(**cast(arguments, torch.float64, torch.float64))
    actual = hybrid_attention(**arguments, backend="triton")
    found = {"near": actual.near, "far": actual.far, **actual.splats._asdict()}
    wanted = {"near": expected.near, "far": expected.far, **expected.splats._asdict()}
    for name, part in found.items():
        assert part.dtype == torch.float32
        assert relative_error(part, wanted[name]) <= TOLERANCE, name
    moved = in_parts(**arguments)
    for name in ("window", "leaving"):
        for part, other in zip(getattr(actual, name), getattr(moved, name), strict=True):
            assert (part is None and other is None) or torch.equal(part, other), name


def test_the_cases_meet_everything():
    drawn = [case(number) for number in range(NUM_CASES)]
    met = {(name, sizes[name]) for sizes in drawn for name in ("decay", "gate", "R", "strided")}
    assert met >= {*itertools.product(("decay", "gate"), GRAINS), *itertools.product("R", (1, 2, 3)), ("strided", True)}
    assert {(sizes["W"], sizes["start"]) for sizes in drawn} == {*itertools.product(WINDOWS, STARTS)}
    assert {(sizes["M"], sizes["P"], sizes["D"]) for sizes in drawn} == {*WIDTHS}
    assert any(not make(**sizes)["tokens"].real.all() for sizes in drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kinds", [{}, {"decay": "head", "gate": "splat", "start": "padded"}], ids=str)
def test_half_precision_is_at_most_twice_as_far_off_as_plain_torch(dtype, kinds):
    arguments = cast(make(B=1, W=33, M=13, P=6, D=11, **kinds), dtype, torch.float32)
    exact = in_parts(**cast(arguments, torch.float64, torch.float64))
    plain, actual = in_parts(**arguments), hybrid_attention(**arguments, backend="triton")
    assert actual.near.dtype == actual.far.dtype == actual.window.values.dtype == dtype
    for name in ("near", "far"):
        error, plain_error = (relative_error(getattr(found, name), getattr(exact, name)) for found in (actual, plain))
        assert error <= 2 * plain_error, (name, error, plain_error)
    for part, exact_part in zip(actual.splats, exact.splats, strict=True):
        assert part.dtype == torch.float32
        assert relative_error(part, exact_part) <= TOLERANCE
    assert torch.equal(actual.window.values, plain.window.values)
    assert torch.equal(actual.window.send_positions, plain.window.send_positions)


def test_the_widest():
    arguments = make(B=1, G=1, W=3, M=128, P=128, D=128, decay="splat")
    expected = in_parts(**cast(arguments, torch.float64, torch.float64))
    actual = hybrid_attention(**arguments, backend="triton")
    for part, other in zip((*actual[:2], *actual.splats), (*expected[:2], *expected.splats), strict=True):
        assert relative_error(part, other) <= TOLERANCE


@pytest.mark.parametrize("grain", ["head", "splat"])
def test_padding_that_leaves_changes_nothing_whatever_stands_there(grain):
    arguments = make(decay=grain, gate=grain)
    arguments["window"].real[:, 0] = False
    for part in arguments["window"]:
        if part is not None and part.is_floating_point():
            part[:, 0] = torch.nan
    heard = hybrid_attention(**arguments, backend="triton")
    assert torch.equal(heard.splats.mass, arguments["state"].mass)
    assert torch.equal(heard.splats.total, arguments["state"].total)
    assert heard.near.isfinite().all()
    assert heard.far.isfinite().all()


@pytest.mark.parametrize("name", ["tokens", "window", "state"])
def test_nan_in_one_sequence_reaches_no_other_and_is_not_hidden(name):
    arguments = make(W=TILE + 2)
    expected = hybrid_attention(**arguments, backend="triton")
    part = arguments["state"].total if name == "state" else arguments[name].values
    part[1] = torch.nan
    actual = hybrid_attention(**arguments, backend="triton")
    assert torch.equal(actual.near[0], expected.near[0])
    assert torch.equal(actual.far[0], expected.far[0])
    assert (actual.far if name == "state" else actual.near)[1].isnan().all()


NUM_DECODED = 16  # more than twice a window, and a lag after it
LAYERS = {  # options, and how many tokens come first in one piece
    "plain": ({}, 0),
    "decay and gate": ({"decay": "splat", "write_gate": True, "conv_size": 3, "value_skip": True}, 11),
    "decay of heads": ({"decay": "head", "tied_positions": True, "value_dim": 5}, 0),
    "shared senders": ({"num_key_value_heads": 1, "decay": "splat", "write_gate": True}, 11),
    "lagged": ({"decay": "head", "transform": "lagged", "lag": 8}, 11),
}


@pytest.mark.parametrize(("options", "prompt"), LAYERS.values(), ids=LAYERS)
@torch.no_grad()
def test_decoding_token_by_token_equals_one_pass_without_it(options, prompt):
    torch.manual_seed(0)
    layer = SplatAttention(14, 2, 5, window_size=7, position_dim=6, **options).to(DEVICE)
    hidden_states = torch.randn(1, prompt + NUM_DECODED, 14, device=DEVICE)
    mask = torch.rand(1, prompt + NUM_DECODED, device=DEVICE) < 0.8
    with patch.object(layer_module, "hybrid_attention", partial(hybrid_attention, backend="portable")):
        expected, last = layer(hidden_states, attention_mask=mask)
        start, state = layer(hidden_states[:, :prompt], attention_mask=mask[:, :prompt])
    outputs = [start]
    with patch.object(layer_module, "hybrid_attention", partial(hybrid_attention, backend="triton")):
        for token in range(prompt, prompt + NUM_DECODED):
            one = slice(token, token + 1)
            output, state = layer(hidden_states[:, one], attention_mask=mask[:, one], state=state)
            outputs.append(output)
    assert relative_error(torch.cat(outputs, 1), expected) <= TOLERANCE
    for part, other in zip(state.splats, last.splats, strict=True):
        assert relative_error(part, other) <= TOLERANCE
    assert torch.equal(state.window.real, last.window.real)
    assert relative_error(state.window.values, last.window.values) <= TOLERANCE


def changed(name, **parts):
    """`make` with parts of one argument in place of others."""

    def change(arguments):
        return {**arguments, name: arguments[name]._replace(**parts)}

    return change


REFUSED = {
    "it takes one token of each sequence, and there are 2 sequences of 5": lambda given: {
        **given,
        "tokens": given["window"],
        "targets": Targets(given["window"].send_positions, None),
    },
    "there are 0 sequences of 1": lambda given: {
        **given,
        "tokens": each_part(lambda part: part[:0], given["tokens"]),
        "targets": Targets(given["targets"].positions[:0], None),
        "window": each_part(lambda part: part[:0], given["window"]),
        "state": SplatState(*(part[:0] for part in given["state"])),
    },
    "a window of at least one token": lambda given: {
        **given,
        "window": each_part(lambda part: part[:, :0], given["window"]),
    },
    "the routing 'mixture' alone": lambda given: {**given, "routing": "gaussian"},
    "top_p is 2": lambda given: {**given, "top_p": 2},
    "receive_mixing": lambda given: {**given, "receive_mixing": torch.eye(7).expand(2, 7, 7)},
    "transform": lambda given: {**given, "transform": Transform(torch.zeros(2, 7, 5), torch.zeros(2, 7, 5))},
    "send_bias": lambda given: {
        **given,
        "tokens": given["tokens"]._replace(send_bias=torch.zeros(2, 1, 2, 7)),
        "window": given["window"]._replace(send_bias=torch.zeros(2, 5, 2, 7)),
    },
    "receive_bias": changed("targets", bias=torch.zeros(2, 1, 2, 7)),
    "the number of splats is 129, expected 1 to 128": lambda given: make(M=129),
    "values is torch.bfloat16 in the window and torch.float32 of the token": changed(
        "window", values=torch.zeros(2, 5, 2, 5, dtype=torch.bfloat16)
    ),
    "expected torch.float32": lambda given: cast(given, torch.float64, torch.float64),
    "it has no gradient, and one is wanted": lambda given: {**given, "log_scale": given["log_scale"].requires_grad_()},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_is_not_built_for_is_refused_with_the_reason(reason):
    with pytest.raises(ValueError, match="backend 'triton' cannot do this") as raised:
        hybrid_attention(**REFUSED[reason](make()), backend="triton")
    assert reason in str(raised.value)


def test_where_it_cannot_run_it_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"backend is 'fast', expected one of \['auto', 'portable', 'triton'\]"):
        hybrid_attention(**make(), backend="fast")
    with (
        patch.object(importlib.util, "find_spec", lambda name: None),
        pytest.raises(ValueError, match="triton is not installed"),
    ):
        hybrid_attention(**make(), backend="triton")


def test_auto_takes_it_on_cuda_if_it_can():
    assert not hybrid._in_one_launch("auto", torch.device("cpu"))
    assert hybrid._in_one_launch("auto", torch.device("cuda"))
    given = make()
    expected = hybrid_attention(**given, backend="portable")
    with (
        patch.object(hybrid, "_in_one_launch", lambda backend, device: True),
        patch.object(room, "supports_step", lambda *given: "it is not built for that"),
    ):
        assert hybrid_attention(**given).far.equal(expected.far)


@pytest.mark.parametrize("backend", ["portable", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_scale": torch.zeros(3)}, r"log_scale has shape \[3\], expected \[2\], one number a head"),
        ({"window": {"values": torch.zeros(2, 5, 2, 4)}}, r"window.values has shape \[2, 5, 2, 4\]"),
        ({"window": {"log_decay": torch.zeros(2, 5, 2)}}, "window.log_decay is given, expected None"),
        ({"targets": {"positions": torch.zeros(2, 1, 3, 4)}, "log_scale": torch.zeros(3)}, "positions has 3 heads"),
        ({"routing": "nearest"}, "routing is 'nearest', expected one of"),
        ({"state": {"mass": torch.zeros(2, 2, 6)}}, r"state.mass has shape \[2, 2, 6\]"),
        ({"tokens": {"send_positions": torch.zeros(2, 2, 2, 4)}}, r"send_positions has shape \[2, 2, 2, 4\]"),
        ({"tokens": {"real": torch.ones(2, 2, dtype=torch.bool)}}, r"padding_mask has shape \[2, 2\]"),
        ({"window": {"real": torch.ones(2, dtype=torch.bool)}}, r"window.real has shape \[2\]"),
        ({"window": {"values": torch.zeros(2, 5, 2, 5, dtype=torch.int64)}}, "window.values is torch.int64"),
        ({"window": {"real": None}}, "window.real is a NoneType, expected a tensor"),
        ({"window": None}, "window is a NoneType, expected WindowState"),
        ({"targets": torch.zeros(2, 1, 2, 4)}, "targets is a Tensor, expected Targets"),
        ({"log_scale": torch.zeros(2, dtype=torch.int64)}, "log_scale is torch.int64, expected a tensor of floats"),
    ],
)
def test_wrong_calls_are_refused_by_both_forms(backend, change, message):
    given = make()
    for name, part in change.items():
        given[name] = given[name]._replace(**part) if isinstance(part, dict) else part
    with pytest.raises((ValueError, TypeError), match=message):
        hybrid_attention(**given, backend=backend)


@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_odd_widths_are_refused_and_plain_tuples_and_no_state_will_do(backend):
    with pytest.raises(ValueError, match="send_positions is 3 wide, expected an even width"):
        hybrid_attention(**make(P=3), backend=backend)
    given = make()
    empty = SplatState(*(torch.zeros_like(part) for part in given["state"]))
    expected = hybrid_attention(**{**given, "state": empty}, backend=backend)
    plain = {name: tuple(given[name]) for name in ("targets", "tokens", "window", "splats")}
    assert hybrid_attention(**{**given, **plain, "state": None}, backend=backend).far.equal(expected.far)


@pytest.mark.parametrize(("decay", "gate"), [(None, None), ("head", "splat")])
def test_the_operator_of_torch(decay, gate):
    given = make(decay="splat" if decay else None, gate=gate, B=1, W=3, G=1, R=2)
    tokens, window = ([*given[name]] for name in ("tokens", "window"))
    arguments = given["targets"].positions, given["log_scale"], [*given["splats"][:3]], tokens, window, *given["state"]
    torch.library.opcheck(operators.window_step, arguments)


COMPILED = """
from functools import partial

import torch
import splatflow.nn.splat_attention as layer_module
from splatflow import SplatAttention
from splatflow.ops.hybrid import hybrid_attention

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
layer = SplatAttention(12, 2, 5, window_size=7, decay="head", write_gate=True).to(device)
hidden_states = torch.randn(2, 12, 12, device=device)


def two_tokens(state):
    for token in (10, 11):
        output, state = layer(hidden_states[:, token : token + 1], state=state)
    return output, *state.splats, *(part for part in state.window if part is not None)


with torch.no_grad():
    layer_module.hybrid_attention = hybrid_attention
    _, state = layer(hidden_states[:, :10])
    layer_module.hybrid_attention = partial(hybrid_attention, backend="triton")
    compiled = torch.compile(two_tokens, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(state), two_tokens(state), strict=True):
        torch.testing.assert_close(actual, expected)
"""


def test_compiled_in_one_graph_equals_eager():
    """In a process of its own: the checks of shapes that conftest installs cannot be traced."""
    outcome = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
