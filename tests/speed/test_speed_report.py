"""The page says what the ledger holds, figures that look bad included."""

import re

import pytest
from benchmarks.speed import __main__ as command
from benchmarks.speed import report
from benchmarks.speed.cases import BOTH, FORWARD, STORES, Case
from benchmarks.speed.ledger import LEDGER, by_machine, read_ledger
from benchmarks.speed.pictures import draw
from benchmarks.speed.targets import CHUNKED, SOFTMAX, verdicts

MACHINE = {"cpu": "A Processor", "threads": 2}
CASE = Case("operator", CHUNKED, 16, False, FORWARD, 1, 16_384, 8, 64, "cpu", "float32")


def row(case, machine=MACHINE, **measured):
    given = {"result": "measured", "state": 1040, "tokens": case.batch * case.seq_len}
    if "seconds" in measured:
        given |= {"low": 0.9 * measured["seconds"], "high": 1.1 * measured["seconds"], "rounds": 3}
    rest = {
        "date": "2026-11-25T00:00:00+00:00",
        "machine": machine,
        "versions": "torch 2",
        "commit": "abc",
        "code": "def",
    }
    return {"case": case, **given, **measured, **rest, "load": 1.0, "command": "python", "seed": 7}


def test_the_page_in_docs_is_made_of_the_ledger():
    rows = read_ledger(LEDGER)
    pictures = draw(rows)
    written = report.PAGE.read_text(encoding="utf-8")
    assert written == report.page(rows, pictures)
    assert sorted(re.findall(r"\(pictures/(.*?)\)", written)) == sorted(pictures)
    assert sorted(pictures) == sorted(path.name for path in report.PICTURES.glob("speed-*.svg"))


def test_ratios_are_to_the_copy_and_to_the_quickest_that_is_no_splats():
    rows = [
        row(CASE, seconds=0.030, floor=0.010, least_bytes=2**20, bytes=3 * 2**20),
        row(CASE._replace(what="splats (other)"), seconds=0.001, floor=0.010, least_bytes=2**20),
        row(CASE._replace(what=SOFTMAX, num_splats=0), seconds=0.020, floor=0.010, least_bytes=2**20),
        row(CASE._replace(what="slower", num_splats=0), seconds=0.040, floor=0.010, least_bytes=2**20),
        row(CASE._replace(seq_len=8192, what="no", num_splats=0), seconds=0.001, floor=0.010, least_bytes=2**20),
    ]
    lines = report.table(rows).splitlines()
    assert f"| 1 x 16,384 | {CHUNKED}, M = 16 | 30 | 27 to 33 | 3.00 | 1.5 | 3.0 | 1,040 |" in lines
    assert "| 1 x 16,384 | a copy that moves 1 MiB | 10 | 0.1 GB/s | 1 |  |  |  |" in lines


@pytest.mark.parametrize("result", ["out of memory", "over the limit", "failed", "not timed"])
def test_what_was_not_measured_stays_with_its_reason(result):
    lines = report.table([row(CASE, result=result, reason="that is why")])
    assert f"| {CHUNKED}, M = 16 | {result}: that is why |" in lines


def test_one_call_over_the_limit_is_shown_as_such():
    slow = {**row(CASE, result="over the limit", reason="one call, more than 12 s", seconds=15.0), "rounds": 1}
    assert "| 1.5e+04 | one call, more than 12 s |" in report.table([slow])


def test_the_newest_row_of_a_machine_counts():
    other = {**MACHINE, "threads": 1}
    rows = [row(CASE, seconds=1.0), row(CASE, machine=other, seconds=2.0), row(CASE, seconds=3.0)]
    here = by_machine(rows)
    assert [[one["seconds"] for one in of_machine] for of_machine in here.values()] == [[3.0], [2.0]]
    assert list(here) == ["A Processor, 2 threads", "A Processor, 1 threads"]


def judged(*rows):
    return {verdict.aim.split(",")[0]: (verdict.figure, verdict.met) for verdict in verdicts(list(rows))}


@pytest.mark.parametrize(("seconds", "met"), [(0.039, True), (0.041, False)])
def test_the_copy_of_four_tensors_moves_twice_the_floor(seconds, met):
    [(figure, found)] = judged(row(CASE, seconds=seconds, floor=0.010)).values()
    assert (figure, found) == (f"{seconds / 0.020:.1f} times", met)


@pytest.mark.parametrize(("seconds", "met"), [(1.01, True), (0.99, False)])
def test_ten_times_as_quick_as_softmax(seconds, met):
    ours = CASE._replace(causal=True, passes=BOTH, seq_len=8192, num_splats=32)
    theirs = ours._replace(what=SOFTMAX, num_splats=0)
    elsewhere = theirs._replace(causal=False)
    rows = (row(ours, seconds=0.1), row(elsewhere, seconds=9.0), row(theirs, result="over the limit", seconds=seconds))
    [(_, found)] = judged(*rows).values()
    assert found is met


@pytest.mark.parametrize(("size", "met"), [(100, True), (102, False)])
def test_memory_beside_softmax_and_beside_a_stored_matrix(size, met):
    ours = CASE._replace(causal=True, passes=BOTH)
    theirs = ours._replace(what=SOFTMAX, num_splats=0)
    assert [one for _, one in judged(row(ours, bytes=size), row(theirs, bytes=101)).values()] == [met]
    stored = theirs._replace(subject="memory", what=STORES, seq_len=1024)
    longer = ours._replace(subject="memory", seq_len=10_240)
    found = judged(row(stored, bytes=101), row(longer, bytes=size))
    assert found == {"10": (f"{size / 101:.3f} times that memory", met)}
    assert judged(row(stored, bytes=101), row(longer._replace(seq_len=10_241), bytes=size)) == {}


def test_report_writes_the_page_of_a_ledger_and_removes_old_pictures(tmp_path, monkeypatch):
    path = tmp_path / "speed.jsonl"
    flags = ["--record", str(path), "--tiny", "--device", "cpu", "--only", "decode", "training", "--seed", "7"]
    assert command.main(flags) == 0
    monkeypatch.setattr(report, "PICTURES", tmp_path / "pictures")
    monkeypatch.setattr(report, "PAGE", tmp_path / "speed.md")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "speed-old.svg").write_text("old")
    assert command.main(["report", "--record", str(path)]) == 0
    page = report.PAGE.read_text()
    assert "### Decoding one token" in page
    assert "| splat model |" in page
    assert "| chunked, M = 16 |" in page
    assert "flash-linear-attention" not in page  # nobody asked for its operators
    assert not (tmp_path / "pictures" / "speed-old.svg").exists()


def test_a_picture_has_a_line_for_who_was_measured_at_two_lengths():
    lengths = (1024, 16_384)
    rows = [row(CASE._replace(seq_len=n, batch=16_384 // n), seconds=0.03, floor=0.01) for n in lengths]
    rows += [row(CASE._replace(seq_len=n, num_splats=128), seconds=0.03, floor=0.01) for n in lengths]
    [(name, svg)] = draw(rows).items()
    assert name == "speed-a-processor-2-threads-bidirectional.svg"
    assert "M = 16" in svg
    assert "M = 128" not in svg  # of four, two are shown
    assert draw(rows[:1]) == {}
