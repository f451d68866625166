"""A backend that is wrong is found out, whatever it is wrong in, and is not timed."""

import pytest
import torch
from benchmarks.speed import checks
from benchmarks.speed.checks import Configuration, check, configurations, poisoned_memory
from benchmarks.speed.contenders import backends

from splatflow.ops import BACKENDS
from splatflow.ops.chunked import chunked
from splatflow.ops.dispatch import Backend

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
    assert row["calls"] == {"sparse": 8, "reach": 4}.get(backend, 32)


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
    assert asked[0][-2:] == ["benchmarks.speed.checks", "planted"]
    assert "Invalid read" in row["reason"] or status == 0


def test_without_kernels_the_sanitizer_is_not_asked():
    assert checks.sanitize("cuda")["result"] == checks.sanitize("cpu")["result"] == "left out"
