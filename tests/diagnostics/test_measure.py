"""Memory against cases counted by hand, time against a clock that the test holds."""

import subprocess
import time

import pytest
import torch
import torch.nn.functional as F

from splatflow.diagnostics import measure
from splatflow.diagnostics.measure import commit, machine, peak_memory, time_calls

FLOAT = 4  # bytes


def test_peak_memory_is_the_greatest_live_at_once_not_the_sum():
    def one_after_the_other():
        first = torch.empty(1009, 1000)
        del first
        return torch.empty(503, 1000)

    def both_at_once():
        return torch.empty(1009, 1000), torch.empty(503, 1000)

    assert peak_memory(one_after_the_other) == 1009 * 1000 * FLOAT
    assert peak_memory(both_at_once) == (1009 + 503) * 1000 * FLOAT


def test_peak_memory_sees_a_temporary_and_counts_only_what_is_above_the_start():
    values = torch.ones(1009)  # alive before the call
    assert peak_memory(lambda: values.exp().sum()) == (1009 + 1) * FLOAT
    assert peak_memory(lambda: values.sin_()) == 0
    assert peak_memory(lambda: None) == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_peak_memory_of_forward_and_backward(threads):
    inputs = torch.randn(67, 1009, requires_grad=True)
    weight = torch.randn(1009, 307, requires_grad=True)

    def forward_and_backward():
        return torch.autograd.grad((inputs @ weight).square().sum(), (inputs, weight))

    def forward():
        with torch.no_grad():
            return (inputs @ weight).square().sum()

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        product, gradients = 67 * 307 * FLOAT, (67 * 1009 + 1009 * 307) * FLOAT
        assert peak_memory(forward) == 2 * product
        # the product's gradient is alive beside both results, and a few scalars
        assert product + gradients <= peak_memory(forward_and_backward) <= 2 * product + gradients + 64
    finally:
        torch.set_num_threads(before)


def test_peak_memory_sees_scratch_inside_a_fused_operator():
    queries = torch.randn(1, 3, 257, 64)
    result = queries.numel() * FLOAT
    scores = 3 * 257 * 257 * FLOAT
    assert peak_memory(lambda: F.scaled_dot_product_attention(queries, queries, queries)) > result
    assert peak_memory(lambda: (queries @ queries.mT).softmax(-1) @ queries) == 2 * scores


def test_peak_memory_leaves_out_what_is_cached_on_the_first_call():
    cache = {}

    def with_a_cache():
        if "table" not in cache:
            cache["table"] = torch.empty(10_007)
        return torch.empty(7)

    assert peak_memory(with_a_cache) == 7 * FLOAT
    cache.clear()
    assert peak_memory(with_a_cache, warmup=False) == (10_007 + 7) * FLOAT


def test_functions_are_called_in_turn_and_the_median_is_returned(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    durations = {"slow": iter([100.0, 5.0, 3.0, 4.0]), "fast": iter([100.0, 1.0, 9.0, 2.0])}  # the first warms up

    def call(name):
        calls.append(name)
        now[0] += next(durations[name])

    medians = time_calls({"slow": lambda: call("slow"), "fast": lambda: call("fast")}, repeats=3, seconds=1.0)
    assert calls == ["slow", "fast"] * 4  # all three rounds, although the second was late already
    assert medians == {"slow": 4.0, "fast": 2.0}


def test_no_round_starts_after_the_seconds_are_over():
    start = time.perf_counter()
    medians = time_calls({"sleep": lambda: time.sleep(0.02)}, repeats=10_000, seconds=0.2)
    assert time.perf_counter() - start < 5
    assert medians["sleep"] >= 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"functions": {}}, "functions is empty"),
        ({"repeats": 2}, "repeats is 2, expected at least 3"),
        ({"warmup": -1}, "warmup is -1"),
        ({"seconds": 0}, "seconds is 0"),
        ({"device": "meta"}, "device is 'meta', expected a cpu or a cuda device"),
    ],
)
def test_wrong_calls_of_time_calls(arguments, message):
    with pytest.raises(ValueError, match=message):
        time_calls(**{"functions": {"nothing": lambda: None}, **arguments})


def test_wrong_device_of_peak_memory():
    with pytest.raises(ValueError, match="device is 'meta'"):
        peak_memory(lambda: None, device="meta")


def test_machine_is_plain_and_names_nobody():
    facts = machine()
    assert {"cpu", "threads", "platform", "python", "torch"} <= facts.keys() <= {*machine(), "device"}
    assert all(isinstance(value, str | int) for value in facts.values())
    assert measure.platform.node() not in facts.values()


def _git(folder, *arguments):
    subprocess.run(
        ["git", "-c", "user.name=nobody", "-c", "user.email=nobody@example.org", *arguments],
        cwd=folder,
        check=True,
        capture_output=True,
    )


def test_commit_of_a_checkout(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    tracked = package / "module.py"
    tracked.write_text("one = 1\n")
    assert commit(package) == "unknown"
    _git(tmp_path, "init")
    assert commit(package) == "unknown"  # nothing tracked: as a wheel in an environment inside a checkout
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-m", "first", "--no-gpg-sign")
    _git(tmp_path, "tag", "v1")
    clean = commit(package)
    assert len(clean) >= 7
    assert set(clean) <= set("0123456789abcdef")
    (tmp_path / "untracked.txt").write_text("not of the package")
    assert commit(package) == clean
    tracked.write_text("one = 2\n")
    assert commit(package) == clean + "+dirty"


def test_commit_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit() == "unknown"
