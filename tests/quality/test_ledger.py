"""A ledger survives being stopped at any byte."""

import json

import pytest
from benchmarks.quality.contestants import Shell
from benchmarks.quality.ledger import append, read_ledger
from benchmarks.quality.probe import Run

MEASURED = {
    "scores": {"mean accuracy": 0.5},
    "size": 16,
    "state_size": 1632,
    "step_operations": 4096,
    "parameters": 84032,
    "seconds": 1.0,
}


def run(seed, **options):
    return Run("recall", "splats", 1632, rate=1e-2, seed=seed, steps=5, **options)


def write(path, seed):
    append(path, run(seed), MEASURED, command="python -m benchmarks.quality smoke", device="cpu")


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "deep" / "ledger.jsonl"
    assert read_ledger(path) == {}
    write(path, 1)
    write(path, 2)
    rows = read_ledger(path)
    assert list(rows) == [run(1), run(2)]
    assert rows[run(1)]["scores"] == MEASURED["scores"]
    assert {"date", "machine", "commit", "versions", "command"} <= rows[run(1)].keys()
    assert run(1, shell=Shell(output_gate=True)) not in rows


def test_a_line_that_was_cut_off_is_lost_alone(tmp_path):
    path = tmp_path / "ledger.jsonl"
    write(path, 1)
    whole = path.read_bytes()
    write(path, 2)
    for length in range(len(whole), len(path.read_bytes()) - 1):
        cut = tmp_path / "cut.jsonl"
        cut.write_bytes(path.read_bytes()[:length])
        assert list(read_ledger(cut)) == [run(1)]
    write(cut, 3)
    assert list(read_ledger(cut)) == [run(1), run(3)]


def test_a_last_line_without_its_end_is_a_row(tmp_path):
    path = tmp_path / "ledger.jsonl"
    write(path, 1)
    path.write_bytes(path.read_bytes().rstrip())  # as some editors leave it
    assert list(read_ledger(path)) == [run(1)]
    write(path, 2)
    assert list(read_ledger(path)) == [run(1), run(2)]


def test_another_line_is_reported_with_its_number(tmp_path):
    path = tmp_path / "ledger.jsonl"
    write(path, 1)
    path.write_text(path.read_text() + '{"run": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*ledger.jsonl"):
        read_ledger(path)


@pytest.mark.parametrize("lost", ["scores", "parameters", "machine", "commit"])
def test_a_row_that_lacks_something_is_reported(lost, tmp_path):
    path = tmp_path / "ledger.jsonl"
    write(path, 1)
    row = json.loads(path.read_text())
    del row[lost]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"line 1 of .*ledger.jsonl.* lacks {lost}"):
        read_ledger(path)


def test_what_is_no_ledger_is_left_alone(tmp_path):
    letter = tmp_path / "letter.txt"
    letter.write_text("Dear reader")  # without an end of line: to append to it would take it away
    with pytest.raises(ValueError, match=r"last line of .*letter.txt.* begins with b'Dear reader'"):
        read_ledger(letter)
    with pytest.raises(ValueError, match="is not a file"):
        read_ledger(tmp_path)
