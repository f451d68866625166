"""A backend that is wrong is found out, whatever it is wrong in, and is not timed."""

import importlib.util
from itertools import accumulate

import pytest
import torch
from benchmarks.speed import checks
from benchmarks.speed.checks import Configuration, check, configurations, poisoned_memory, steps
from benchmarks.speed.contenders import backends

from splatflow.ops import BACKENDS, SplatState, scan
from splatflow.ops.chunked import chunked
from splatflow.ops.dispatch import Backend
from splatflow.ops.events import in_order
from splatflow.ops.hybrid import hybrid_attention
from splatflow.ops.splats import each

SEGMENT = 1024  # events of a splat that a program of the scan adds up
FEW = [Configuration(37, 7, 6, 5), Configuration(67, 7, 6, 5, causal=False), Configuration(31, 7, 6, 5, decay="head")]


def unwritten_row(output, state):
    hole = torch.empty_like(output)
    hole[:, 1:] = output[:, 1:]
    return hole, state


def wrong_state(output, state):
    return output, state._replace(mass=state.mass * 1.01)


def wrong_gradient(output, state):
    return output * 0.9 + output.detach() * 0.1, state


def rounded_to_tf32(output, state):
    return output * (1 + 3e-4), state


BREACHES = {
    "output": (unwritten_row, rounded_to_tf32),
    "mass": (wrong_state,),
    "d ": (wrong_gradient,),
}


def plant(monkeypatch, breach):
    def function(*arguments, **options):
        return breach(*chunked(*arguments, **options))

    monkeypatch.setitem(BACKENDS, "planted", Backend(function, lambda router, sources, targets: None))


@pytest.mark.parametrize(
    ("told", "breach"), [(told, breach) for told, breaches in BREACHES.items() for breach in breaches]
)
def test_a_wrong_backend_is_told_with_what_is_wrong(monkeypatch, told, breach):
    plant(monkeypatch, breach)
    row = check("planted", "cpu", FEW, seed=5)
    assert row["result"] == "wrong"
    assert f": {told}" in row["reason"]
    assert "seq_len 37" in row["reason"]


def test_what_is_wrong_with_bf16_alone_is_wrong(monkeypatch):
    def function(sources, *rest, **options):
        output, state = chunked(sources, *rest, **options)
        return (output * 1.1 if sources.values.dtype == torch.bfloat16 else output), state

    monkeypatch.setitem(BACKENDS, "planted", Backend(function, lambda router, sources, targets: None))
    assert "torch.bfloat16" in check("planted", "cpu", FEW, seed=5)["reason"]


@pytest.mark.parametrize("backend", backends())
def test_our_backends_are_right_in_all_that_they_do(backend):
    row = check(backend, "cpu", [one for some in configurations((17,)).values() for one in some], seed=11)
    assert row["result"] == "right", row
    assert 0 < row["output"] < 1e-5
    assert 0 < row["gradient"] < 1e-4
    assert row["calls"] == {"sparse": 14, "reach": 4, "chunked": 46}.get(backend, 38)


def planted(monkeypatch, function, packed=None):
    """What the check says of it, in all that is checked of odd sizes but what is long."""
    monkeypatch.setitem(BACKENDS, "planted", Backend(function, lambda router, sources, targets: None, packed))
    return check("planted", "cpu", [one for one in configurations((17,))[0] if one.seq_len < 500], seed=5)


def test_documents_that_hear_each_other_are_wrong(monkeypatch):
    def function(boundaries, sources, targets, router, state, *, causal):
        num_documents = len(boundaries) - 1
        whole, after = chunked(sources, targets, router, SplatState(*(part[:1] for part in state)), causal=causal)
        return whole, SplatState(*(part.expand(num_documents, *part.shape[1:]) for part in after))

    row = planted(monkeypatch, chunked, function)
    assert row["result"] == "wrong"
    assert "documents (1, 0, 66)" in row["reason"]
    assert planted(monkeypatch, chunked)["result"] == "right"


def test_heads_that_receive_from_another_are_wrong(monkeypatch):
    def function(sources, targets, router, state, *, causal):
        num_senders = sources.values.shape[2]
        targets = each(lambda part: part.unflatten(2, (num_senders, -1)).transpose(2, 3).flatten(2, 3), targets)
        return chunked(sources, targets, router, state, causal=causal)

    row = planted(monkeypatch, function)
    assert row["result"] == "wrong"
    assert "receivers 3" in row["reason"]


@pytest.mark.parametrize("decay", [None, "head"])
def test_a_scan_that_loses_what_comes_after_a_segment_is_wrong(monkeypatch, decay):
    plain = scan.run

    def run(table, rows, write_at, *rest, **options):
        order = in_order(write_at)
        rank = torch.empty_like(order.rank).scatter_(1, order.by, order.rank)
        return plain(table, rows * (rank < SEGMENT)[..., None], write_at, *rest, **options)

    asked = [one for one in configurations((17,))[0] if (one.routing, one.decay) == ("lattice", decay)]
    shorter = [one for one in asked if one.seq_len <= SEGMENT]
    monkeypatch.setattr(scan, "run", run)
    assert check("sparse", "cpu", shorter, seed=5)["result"] == "right"
    row = check("sparse", "cpu", asked, seed=5)
    assert row["result"] == "wrong"
    assert "num_splats 4" in row["reason"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_some_calls_are_cut_into_segments():
    from splatflow.ops.triton import cutting, launch_sparse

    assert launch_sparse.SEGMENT == SEGMENT
    sequence, documents = (one for one in configurations((17,))[0] if one.routing == "mixture" and one.seq_len > 131)
    assert (sequence.documents, sequence.decay, documents.decay) == ((), "splat", "splat")
    assert not cutting.cut(sequence.seq_len, checks.B * checks.H, sequence[1:4], "splat").alone
    boundaries = [0, *accumulate(documents.documents)]
    assert not cutting.cut_documents(boundaries, checks.H, documents[1:4], "splat").alone


BREACHES_OF_STEPS = {
    "near": lambda heard: heard._replace(near=heard.near * 1.001),
    "far": lambda heard: heard._replace(far=heard.far + 1e-3),
    "mass": lambda heard: heard._replace(splats=heard.splats._replace(mass=heard.splats.mass * 1.001)),
    "window values": lambda heard: heard._replace(window=heard.window._replace(values=heard.window.values.roll(1, 1))),
}


@pytest.mark.parametrize("told", BREACHES_OF_STEPS)
def test_a_wrong_step_of_the_hybrid_is_told_with_what_is_wrong(monkeypatch, told):
    def wrong(*arguments, backend):
        heard = hybrid_attention(*arguments, backend="portable")
        return BREACHES_OF_STEPS[told](heard) if backend == "triton" else heard

    monkeypatch.setattr(checks, "hybrid_attention", wrong)
    asked = steps((17,))
    assert check("portable", "cpu", asked, seed=5)["result"] == "right"
    row = check("triton", "cpu", asked, seed=5)
    assert row["result"] == "wrong"
    assert f"window 32: {told} is off" in row["reason"]


@pytest.mark.parametrize("way", checks.STEPS)
def test_our_steps_of_the_hybrid_are_right(way):
    """Where there is no GPU the kernel is interpreted."""
    if way == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    row = check(way, device, steps((3, 17)), seed=11)
    assert (row["result"], row["calls"]) == ("right", 8)
    assert 0 < row["output"] < 1e-5
    assert "gradient" not in row


def test_a_window_of_which_nothing_is_real_is_not_wrong():
    """With this seed the one token of the window is real in neither sequence."""
    asked = Configuration(1, 7, 6, 5, state=True, window=1)
    seed = next(seed for seed in range(1000) if not checks.drawn(asked, seed)["real"][:, 0].any())
    assert check("portable", "cpu", [asked], seed)["result"] == "right"


def test_documents_and_receivers_are_met_at_the_sizes_that_are_timed():
    asked = configurations((3, 5, 7, 11))
    assert [count for count, some in asked.items() if count and some[-1].documents] == [7, 11]
    assert {one.receivers for some in asked.values() for one in some} == {1, 2, 3}


def test_each_check_is_a_row_and_the_step_has_its_own():
    asked = [case.what for case, _ in checks.jobs((17,), "cpu", seed=5)]
    assert asked[-2:] == ["hybrid step (portable)", checks.SANITIZER]  # kernels are not interpreted for it
    assert {*backends()} < {*asked}


def test_what_the_definition_itself_cannot_tell_is_not_wrong():
    """With this seed a token lies so near the edge of a reach that fp32 is 1.3e-5 off, in every backend."""
    edge = configurations((16,))[0][6]
    assert edge.routing == "compact"
    assert max(checks.errors(edge, "chunked", "cpu", torch.float32, 2406).values()) > 1e-5
    assert check("chunked", "cpu", [edge], seed=2406)["result"] == "right"


def test_a_backend_that_does_nothing_is_left_out(monkeypatch):
    monkeypatch.setitem(BACKENDS, "planted", Backend(chunked, lambda router, sources, targets: "it is tired"))
    assert check("planted", "cpu", FEW, seed=5)["result"] == "left out"


def test_memory_is_poisoned_within_alone():
    with poisoned_memory():
        assert torch.empty(1009).isnan().all()
        assert torch.ones(3, 5).new_empty(7, 11).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


class Finished:
    def __init__(self, returncode):
        self.returncode, self.stdout, self.stderr = returncode, "a line\nInvalid read", ""


@pytest.mark.parametrize(("status", "result"), [(0, "right"), (99, "wrong"), (1, "left out")])
def test_the_sanitizer_is_asked_about_backends_with_kernels(monkeypatch, status, result):
    asked = []
    monkeypatch.setitem(BACKENDS, "planted", BACKENDS["chunked"])
    monkeypatch.setattr(checks.shutil, "which", lambda name: name)
    monkeypatch.setattr(checks.subprocess, "run", lambda command, **_: asked.append(command) or Finished(status))
    row = checks.sanitize("cuda")
    assert row["result"] == result
    names = asked[0][asked[0].index("benchmarks.speed.checks") + 1 :]
    assert {"sparse", "planted"} <= {*names} <= {"sparse", "planted", "triton"}
    assert "Invalid read" in row["reason"] or status == 0


def test_without_a_gpu_or_kernels_the_sanitizer_is_not_asked(monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda name: pytest.fail("asked"))
    assert checks.sanitize("cpu")["result"] == "left out"
    monkeypatch.setattr(checks, "backends", lambda: [*checks.PLAIN])
    assert checks.sanitize("cuda")["result"] == "left out"


def test_what_the_sanitizer_watches_is_packed_shared_searched_and_scanned():
    watched = [*checks.few()]
    assert {one.routing for one in watched} == {"mixture", "lattice"}
    assert any(one.documents and one.receivers > 1 for one in watched)
    assert any(one.top_p == one.num_splats and one.seq_len > SEGMENT for one in watched)
    row = check("sparse", "cpu", watched, seed=0)
    assert (row["result"], row["calls"]) == ("right", 4)
