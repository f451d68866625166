"""The kernels compile for a Hopper GPU, which takes none: Triton refuses to compile some of what it interprets."""

# B batch, T token, H head, M splat, P position width, D value width

import doctest
import importlib.util
import itertools
import os
import subprocess
import sys

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from splatflow.ops.triton import cutting, launch_sparse

# What would be launched is compiled instead, as a launch would have it: 1 and None are constants, pointers are aligned.
COMPILE_ONLY = """
import inspect
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.bool: "*i1"}
POINTERS |= {torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64"}


def compile_only(kernel, *arguments, grid, warmup, num_warps=4, num_stages=3, **options):
    signature, constants, alignment = {}, {}, {}
    bound = inspect.signature(kernel.fn).bind(*arguments, **options).arguments
    for index, (name, value) in enumerate(bound.items()):
        if kernel.params[index].is_constexpr or value is None or type(value) is int and value == 1:
            signature[name], constants[(index,)] = "constexpr", value
        else:
            signature[name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                alignment[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, alignment)
    tuning = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=tuning)
    print(kernel.fn.__name__, compiled.metadata.shared)


JITFunction.run = compile_only
"""

SCRIPT = """
import splatflow.ops.triton.cutting as cutting
import splatflow.ops.triton.launch as launch
import splatflow.ops.triton.launch_backward as launch_backward
from splatflow.ops import Splats
from splatflow.ops.window_state import WindowState, each_part


def compile_all(size, dtype, grain, tied, num_segments, boundaries=None, group=1, num_heads=16, window_size=160):
    num_tokens, factors = 160, {"head": 1, "splat": size}
    batch, num_states = (2, 2) if boundaries is None else (1, len(boundaries) - 1)
    place, value = (torch.empty(batch, num_tokens, num_heads, size, dtype=dtype) for _ in range(2))
    target = torch.empty(batch, num_tokens, num_heads * group, size, dtype=dtype)
    factor = None if grain is None else torch.empty(batch, num_tokens, num_heads, factors[grain])
    one, many = torch.empty(num_heads, size), torch.empty(num_heads, size, size)
    splats = launch.SplatTensors(many, one, one, one)
    mass, total = torch.empty(num_states, num_heads, size), torch.empty(num_states, num_heads, size, size)
    if boundaries is None:
        whole = cutting.cut(num_tokens, batch * num_heads, (size,) * 3, launch.grain(factor))
        whole = whole._replace(num_segments=num_segments, alone=num_segments == 1)
    else:
        whole = cutting.cut_documents(boundaries, num_heads, (size,) * 3, launch.grain(factor))
        whole = whole._replace(alone=num_segments == 1)
    before = launch.states_before(place, value, splats, factor, factor, mass, total, whole)
    receive = None if tied else target
    launch.mix(place, receive, value, splats, factor, factor, before, num_states, whole)
    launch_backward.mix_backward(place, receive, value, splats, factor, factor, before, (target, mass, total), whole)
    launch.step(place[:, :1], target[:, :1], value[:, :1], splats, factor, factor, mass, total)
    tokens = WindowState(place, value, place[..., 0, 0] > 0, factor, factor, None)
    window, token = (each_part(lambda part: part[:, :length], tokens) for length in (window_size, 1))
    raw = Splats(many.to(dtype), one.to(dtype), one.to(dtype))
    of_groups = torch.empty(batch, 1, 3 * num_heads, size, dtype=dtype)
    launch.window_step(of_groups, torch.empty(3 * num_heads), raw, token, window, mass, total)
    launch.window_step(target[:, :1], one[:, 0], raw, token, token, mass, total)
    if grain is None:
        launch.hand_out(target, splats, total, dtype, whole)
        launch_backward.weighing_backward(place, value, splats, factor, mass, total, whole, sends=True)
        launch_backward.weighing_backward(target, target, splats, None, mass, total, whole, sends=False)


compile_all(CASE)
"""

SPARSE_SCRIPT = """
import splatflow.ops.triton.launch_sparse as launch


def compile_all(num_points, position_dim, top_p, dtype, biased, fades, num_tokens, num_heads):
    positions = torch.empty(2, num_tokens, num_heads, position_dim, dtype=dtype)
    factors = torch.empty(num_heads, 2, num_points, position_dim // 2 + 2)
    bias = positions.new_empty(*positions.shape[:3], 2 * num_points) if biased else None
    chosen = torch.empty(*positions.shape[:3], top_p, dtype=torch.int64)
    launch.best_pairs(positions, factors, bias, top_p, chosen, chosen)
    heads, num_events, num_rows, width = 2 * num_heads, num_tokens * top_p, num_points, position_dim + 1
    rows, table = torch.empty(heads, num_events, width), torch.empty(heads, num_rows, width)
    places = torch.empty(heads, num_events, dtype=torch.int64)
    times = torch.empty(heads, num_events, dtype=torch.float64) if fades else None
    edge = None if times is None else times[:, 0]
    starts = torch.empty(heads, 1 + launch.num_segments_of(num_events, num_rows), dtype=torch.int64)
    sums = launch.running_sums(rows, places, places, starts, times)
    launch.look_up(table, sums, places, times, edge, places, places)
    launch.add_last(table, sums, places, places, times, edge)


compile_all(CASE)
"""
FAST_MEMORY = 227 * 1024  # bytes that a program can have on Hopper
EVERY_KERNEL = {"mix_kernel", "prepare_kernel", "mix_backward_kernel", "step_kernel", "window_step_kernel"}
EVERY_SPARSE_KERNEL = {"best_pairs_kernel", "running_sums_kernel", "look_up_kernel", "add_last_kernel"}


def bytes_used_by(script, folder):
    """(name of a kernel, bytes of fast memory that it has), for each that a script would launch."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    outcome = subprocess.run(
        [sys.executable, "-c", COMPILE_ONLY + script],
        env={**environment, "TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    used = [line.split() for line in outcome.stdout.splitlines()]
    return [(name, int(number)) for name, number in used]


@pytest.mark.parametrize(
    ("case", "more"),
    [
        ("64, torch.bfloat16, None, True, 1", {"hand_out_kernel", "weighing_backward_kernel"}),
        ("128, torch.bfloat16, 'head', False, 3", {"collect_kernel", "carry_kernel"}),
        ("16, torch.float16, 'splat', False, 3", {"collect_kernel", "carry_kernel"}),
        ("64, torch.bfloat16, None, False, 1, [0, 50, 50, 160]", {"hand_out_kernel", "weighing_backward_kernel"}),
        ("128, torch.bfloat16, 'head', True, 3, [0, 50, 50, 160]", {"collect_kernel", "carry_kernel"}),
        ("64, torch.bfloat16, None, False, 1, None, 4", {"hand_out_kernel", "weighing_backward_kernel"}),
        ("128, torch.bfloat16, 'head', False, 3, None, 4", {"collect_kernel", "carry_kernel"}),
        ("16, torch.float32, 'splat', False, 3, [0, 50, 50, 160], 3", {"collect_kernel", "carry_kernel"}),
        # what is 1 is a constant to the compiler: one head, and one tile of the window
        ("16, torch.bfloat16, 'head', False, 1, num_heads=1, window_size=32", set()),
        (
            "16, torch.bfloat16, 'splat', False, 3, [0, 50, 50, 160], num_heads=1, window_size=32",
            {"collect_kernel", "carry_kernel"},
        ),
    ],
)
def test_kernels_compile_for_hopper_and_fit(case, more, tmp_path):
    used = bytes_used_by(SCRIPT.replace("CASE", case), tmp_path)
    assert {name for name, _ in used} == EVERY_KERNEL | more
    assert max(number for _, number in used) <= FAST_MEMORY


@pytest.mark.parametrize(
    ("case", "more"),
    [
        ("256, 128, 8, torch.float32, True, True, 300, 3", {"segment_sums_kernel"}),
        ("32, 64, 4, torch.bfloat16, False, False, 300, 3", {"segment_sums_kernel"}),
        ("1, 2, 1, torch.float16, True, True, 1, 1", set()),  # what is 1 is a constant to the compiler
    ],
)
def test_kernels_of_the_sparse_path_compile_for_hopper_and_fit(case, more, tmp_path):
    used = bytes_used_by(SPARSE_SCRIPT.replace("CASE", case), tmp_path)
    assert {name for name, _ in used} == EVERY_SPARSE_KERNEL | more
    assert max(number for _, number in used) <= FAST_MEMORY


def test_the_rules_by_which_sequences_are_cut():
    assert doctest.testmod(cutting).failed == doctest.testmod(launch_sparse).failed == 0
    for num_tokens, num_sequences in itertools.product((1, 31, 32, 33, 1023, 1025, 100_003), (1, 7, 131, 263, 1000)):
        for decay in cutting.TILES:
            tile, num_tiles, num_segments, *_ = cutting.cut(num_tokens, num_sequences, (7, 65, 3), decay)
            of_segment = tile * num_tiles
            assert (num_segments - 1) * of_segment < num_tokens <= num_segments * of_segment
            assert num_segments == 1 or num_segments * num_sequences <= cutting.PROGRAMS
