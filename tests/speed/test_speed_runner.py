"""A run fills a ledger, goes on where it stopped, and turns into rows what a machine cannot do."""

import json
import time
from functools import partial

import pytest
import torch
from benchmarks.speed import __main__ as command
from benchmarks.speed import checks, clock, contenders, ledger, runner, subjects
from benchmarks.speed.cases import FORWARD, SCALES, Case, groups
from benchmarks.speed.checks import Configuration
from benchmarks.speed.ledger import read_ledger
from benchmarks.speed.subjects import SUBJECTS

from splatflow.ops import BACKENDS
from splatflow.ops.chunked import chunked
from splatflow.ops.dispatch import Backend

OPERATOR = ("operator", "--tiny", "--device", "cpu")
FEW = [Configuration(37, 7, 6, 5), Configuration(37, 7, 6, 5, causal=False), Configuration(37, 7, routing="compact")]
ONE_SIZE = SCALES["tiny"]._replace(sizes=((2, 37),), seconds=0.001)


@pytest.fixture
def one_size(monkeypatch):
    monkeypatch.setitem(SCALES, "tiny", ONE_SIZE)
    monkeypatch.setattr(checks, "configurations", lambda num_splats: {16: FEW})
    monkeypatch.setattr(contenders, "LONGEST_DEFINITION", 1)


def run(path, *flags, minutes=9):
    flags = flags or ("--only", *OPERATOR)
    return command.main(["--record", str(path), "--minutes", str(minutes), "--seed", "7", *flags])


def results(path, what):
    return {row["result"] for row in read_ledger(path) if row["case"].what == what}


def add(monkeypatch, name, function, **changes):
    """Another contender, that takes and gives [B, T, H, D]."""
    row = contenders.Contender(lambda drawn, M: drawn.qkv, function, lambda M, D, T: D, lambda case: None)
    monkeypatch.setitem(contenders.PEERS, name, row._replace(**changes))


def test_a_whole_run_fills_a_ledger_and_a_second_one_measures_nothing(one_size, tmp_path, monkeypatch):
    path = tmp_path / "speed.jsonl"
    assert run(path, "--tiny", "--device", "cpu") == 0
    rows = read_ledger(path)
    assert {*SUBJECTS, "check", "contender"} == {row["case"].subject for row in rows}
    assert len({row["case"] for row in rows}) == len(rows)
    assert {"right", "left out", "measured"} == {row["result"] for row in rows}
    timed = [row for row in rows if row["case"].subject == "operator"]
    assert all(0 < row["low"] <= row["seconds"] <= row["high"] for row in timed)
    assert all(row["rounds"] >= 3 and row["floor"] > 0 and row["bytes"] > 0 for row in timed)
    assert {row["least_bytes"] for row in timed if row["case"].passes == FORWARD} == {4 * 2 * 37 * 2 * 16 * 4}
    for field in ("machine", "versions", "commit", "code", "load"):
        assert rows[0][field]
    assert "--seed 7" in rows[0]["command"]

    monkeypatch.setattr(runner, "measure_group", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(checks, "check", lambda *_: pytest.fail("checked again"))
    assert run(path, "--tiny", "--device", "cpu") == 0
    assert len(read_ledger(path)) == len(rows)


def test_a_run_goes_on_where_it_stopped(one_size, tmp_path, capsys):
    path = tmp_path / "speed.jsonl"
    assert run(path, minutes=0) == 0
    assert {row["case"].subject for row in read_ledger(path)} <= {"contender"}  # no time: nothing checked or timed
    assert "left for another call" in capsys.readouterr().out
    assert run(path) == 0
    whole = read_ledger(path)
    assert "all figures are in the ledger" in capsys.readouterr().out

    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]) + lines[-1][:100])  # killed while it wrote
    assert run(path) == 0
    assert {row["case"] for row in read_ledger(path)} == {row["case"] for row in whole}
    assert len(read_ledger(path)) == len(whole)


def test_other_code_or_fresh_is_measured_again(one_size, tmp_path, monkeypatch):
    path = tmp_path / "speed.jsonl"
    run(path)
    once = len(read_ledger(path))
    run(path, "--only", *OPERATOR, "--fresh")
    assert len(read_ledger(path)) == 2 * once
    circumstances = {**ledger.circumstances(), "code": "other code"}
    monkeypatch.setattr(ledger, "circumstances", lambda: circumstances)
    run(path)
    assert len(read_ledger(path)) == 3 * once


def test_a_wrong_backend_is_not_timed(one_size, tmp_path, monkeypatch):
    def function(sources, targets, router, state, *, causal):
        output, state = chunked(sources, targets, router, state, causal=causal)
        return output * 1.1, state

    monkeypatch.setitem(BACKENDS, "planted", Backend(function, lambda router, sources, targets: None))
    path = tmp_path / "speed.jsonl"
    assert run(path) == 1
    assert results(path, "planted") == {"wrong"}
    assert results(path, "splats (planted)") == {"not timed"}
    assert results(path, "splats with decay") == {"not timed"}  # its backend may be the wrong one
    assert results(path, "splats (chunked)") == {"measured"}


def test_a_backend_that_is_not_checked_yet_is_not_timed(one_size, tmp_path, monkeypatch):
    path = tmp_path / "speed.jsonl"
    monkeypatch.setattr(runner, "check_all", lambda asked: runner.Found(set(), {"chunked", "auto"}))
    assert run(path) == 0
    assert results(path, "splats (chunked)") == set()
    assert results(path, "softmax (torch)") == {"measured"}


def test_a_backend_that_breaks_when_it_is_asked_is_wrong(one_size, tmp_path, monkeypatch):
    def function(*arguments, **options):
        raise RuntimeError("it did not compile")

    monkeypatch.setitem(BACKENDS, "broken", Backend(function, lambda router, sources, targets: None))
    path = tmp_path / "speed.jsonl"
    assert run(path) == 1
    assert results(path, "broken") == {"wrong"}
    assert results(path, "splats (broken)") == {"not timed"}


def test_what_the_sanitizer_finds_forbids_all_that_have_kernels(one_size, tmp_path, monkeypatch):
    monkeypatch.setitem(BACKENDS, "with kernels", BACKENDS["chunked"])
    monkeypatch.setattr(checks, "sanitize", lambda device: {"result": "wrong", "reason": "Invalid read"})
    path = tmp_path / "speed.jsonl"
    assert run(path) == 1
    assert results(path, "splats (with kernels)") == {"not timed"}
    assert results(path, "splats (chunked)") == {"measured"}


def test_a_new_backend_is_checked_and_timed_by_itself(one_size, tmp_path, monkeypatch):
    only_causal = "not on this machine"
    monkeypatch.setitem(BACKENDS, "new", Backend(chunked, lambda router, sources, targets: None))
    monkeypatch.setitem(BACKENDS, "absent", Backend(chunked, lambda router, sources, targets: only_causal))
    path = tmp_path / "speed.jsonl"
    assert run(path) == 0
    assert (results(path, "new"), results(path, "splats (new)")) == ({"right"}, {"measured"})
    assert results(path, "splats (absent)") == {"left out"}


def too_large(*tensors, causal):
    return torch.empty(2**50)


def refuses(*tensors, causal):
    raise NotImplementedError("not on this card")


@pytest.mark.parametrize(
    ("function", "result", "told"),
    [(too_large, "out of memory", "allocate"), (refuses, "failed", "not on this card")],
)
def test_what_cannot_be_done_is_a_row(one_size, tmp_path, monkeypatch, function, result, told):
    add(monkeypatch, "other", function)
    path = tmp_path / "speed.jsonl"
    assert run(path) == 0  # a peer that fails is no fault of ours
    assert results(path, "other") == {result}
    assert all(told in row["reason"] for row in read_ledger(path) if row["case"].what == "other")
    assert results(path, "softmax (torch)") == {"measured"}


def test_splats_that_fail_are_told_by_the_status(one_size, tmp_path, monkeypatch):
    add(monkeypatch, "splats that fail", refuses)
    assert run(tmp_path / "speed.jsonl") == 1


def test_what_takes_too_long_is_called_once_and_not_for_longer(one_size, tmp_path, monkeypatch):
    lengths = []

    def slow(queries, keys, values, *, causal):
        lengths.append(queries.shape[1])
        time.sleep(0.06)
        return queries + keys + values

    monkeypatch.setitem(SCALES, "tiny", ONE_SIZE._replace(sizes=((2, 37), (2, 3701)), limit=0.05))
    for name in ("splats with decay", "softmax (torch)", "softmax that stores its matrix"):
        monkeypatch.delitem(contenders.PEERS, name)
    add(monkeypatch, "slow", slow, power=2)
    path = tmp_path / "speed.jsonl"
    run(path)
    rows = [row for row in read_ledger(path) if row["case"].what == "slow"]
    assert {row["result"] for row in rows} == {"over the limit"}
    assert {row.get("rounds") for row in rows if row["case"].seq_len == 37} == {1}
    assert all(row["reason"].startswith("expected to take") for row in rows if row["case"].seq_len == 3701)
    assert {*lengths} == {37}


def test_groups_hold_one_size_and_the_most_important_come_first():
    scale = SCALES["cuda"]
    planned = groups(scale, "cuda", lambda subject, causal: SUBJECTS[subject].names(scale.num_splats, causal))
    for group in planned:
        assert len({(case.subject, case.causal, case.passes, case.batch, case.seq_len) for case in group}) == 1
    assert planned[0][0].seq_len == scale.sizes[0][1]
    operators = {(case.batch * case.seq_len) for group in planned for case in group if case.subject == "operator"}
    assert operators == {2**20}  # the same number of tokens at every length
    lengths = {case.seq_len for group in planned for case in group if case.subject == "operator"}
    assert {min(lengths), max(lengths)} == {128, 2**20}
    assert len({case for group in planned for case in group}) == sum(map(len, planned))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--minutes", "-1"], "--minutes is -1"),
        (["--minutes", "nan"], "--minutes is nan"),
        (["report"], "holds no rows"),
        (["--tiny", "--record", str(ledger.LEDGER)], "--tiny gives no figures of worth"),
    ],
)
def test_a_wrong_call_is_told(flags, told, tmp_path, capsys):
    assert command.main(["--record", str(tmp_path / "none.jsonl"), *flags]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_a_gpu_that_is_not_there_is_told(tmp_path, capsys):
    assert command.main(["--record", str(tmp_path / "none.jsonl"), "--device", "cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def test_memory_is_bounded_within_alone():
    size = 4 * 2**40  # bytes
    with clock.bounded_memory("cpu"):
        _, failure = clock.outcome(partial(torch.empty, size, dtype=torch.uint8), "cpu")
    assert failure["result"] == "out of memory"
    assert clock.resource.getrlimit(clock.resource.RLIMIT_AS)[0] == clock.resource.RLIM_INFINITY


def test_rounds_take_turns_and_inputs_too():
    seen = []
    watch = clock.Clock.of("cpu", 101)
    calls = {name: lambda number, name=name: seen.append((name, number)) for name in "ab"}
    samples = watch.rounds(calls, seconds=0, deadline=0)
    assert seen == [(name, number) for number in range(3) for name in "ab"]  # never fewer than three
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 3, "b": 3}


def test_inputs_differ_from_set_to_set_and_not_from_call_to_call():
    case = Case("operator", "softmax (torch)", 0, True, FORWARD, 2, 37, 3, 5, "cpu", "float32")
    first, second = subjects.sets_of_inputs(case, SCALES["tiny"], 7)[:2]
    again = subjects.sets_of_inputs(case, SCALES["tiny"], 7)[0]
    assert first.qkv[0].equal(again.qkv[0])
    assert not first.qkv[0].equal(second.qkv[0])
    assert first.heads_first[2].transpose(1, 2).equal(first.qkv[2])


def test_the_digest_is_of_what_is_measured(tmp_path, monkeypatch):
    """A change of the operator counts, one of the page does not."""
    names = ("src/splatflow/ops/a.py", "src/splatflow/diagnostics/measure.py", "src/splatflow/diagnostics/speed.py")
    for name in (*names, "benchmarks/speed/clock.py", "benchmarks/speed/report.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for room in ("nn", "models"):
        (tmp_path / "src" / "splatflow" / room).mkdir()
        (tmp_path / "src" / "splatflow" / room / "b.py").write_text("")
    monkeypatch.setattr(ledger, "ROOT", tmp_path)
    before = ledger.code_digest()
    (tmp_path / "benchmarks/speed/report.py").write_text("changed")
    assert ledger.code_digest() == before
    for name in (*names, "benchmarks/speed/clock.py", "src/splatflow/nn/b.py"):
        (tmp_path / name).write_text("changed")
        after = ledger.code_digest()
        assert after != before, name
        before = after


def test_a_line_that_is_no_row_is_told_with_its_number(tmp_path):
    path = tmp_path / "speed.jsonl"
    path.write_text(json.dumps({"case": {}}) + "\n")
    with pytest.raises(ValueError, match=r"line 1 of .*speed.jsonl"):
        read_ledger(path)
    path.write_text("Dear reader")
    with pytest.raises(ValueError, match=r"begins with 'Dear reader'"):
        read_ledger(path)
    with pytest.raises(ValueError, match="is not a file"):
        read_ledger(tmp_path)
