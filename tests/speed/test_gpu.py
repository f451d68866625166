"""`make gpu`: pieces in their order and within their time; a dry run where there is no GPU."""

import subprocess
import time
from pathlib import Path

import pytest
from benchmarks import gpu
from benchmarks.speed import __main__ as speed
from benchmarks.speed import cases
from benchmarks.speed.ledger import read_ledger

ROOT = Path(gpu.__file__).parents[1]


@pytest.fixture
def commands(monkeypatch):
    ran = []
    monkeypatch.setattr(gpu, "run_piece", lambda name, flags, seconds: ran.append((name, flags, seconds)) or 0)
    return ran


def test_on_a_gpu_each_piece_has_its_share_of_the_minutes(monkeypatch, commands, tmp_path):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    assert gpu.main(["--minutes", "10", "--results", str(tmp_path), "--wikitext", "a", "b"]) == 0
    assert [name for name, _, _ in commands] == ["check", "speed", "quality"]
    minutes = [float(flags[flags.index("--minutes") + 1]) for _, flags, _ in commands]
    assert minutes == pytest.approx([2, 7, 10], abs=0.02)  # the others took no time, and left theirs
    flags = {name: flags for name, flags, _ in commands}
    assert flags["check"][:3] == ["benchmarks.speed", "--only", "check"]
    assert str(tmp_path / "speed.jsonl") in flags["speed"]
    assert flags["quality"][:2] == ["benchmarks.quality", "gpu"]
    assert flags["quality"][-3:] == ["--wikitext", "a", "b"]
    assert all("--tiny" not in some for some in flags.values())


def test_a_piece_alone_has_all_the_time(monkeypatch, commands):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    assert gpu.main(["quality", "--minutes", "7"]) == 0
    [(name, flags, seconds)] = commands
    assert (name, flags[3]) == ("quality", "7.00")
    assert seconds == pytest.approx(7 * 60 + gpu.GRACE, abs=1)


def test_an_unknown_piece_is_told(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["sped"])
    assert "no piece 'sped', expected some of check, speed, quality" in capsys.readouterr().err


def test_without_a_gpu_it_is_a_dry_run_that_says_so(monkeypatch, commands, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 0
    assert "there is no GPU: a dry run" in capsys.readouterr().out
    flags = {name: flags for name, flags, _ in commands}
    assert "--tiny" in flags["check"]
    assert "--tiny" in flags["speed"]
    assert flags["quality"][1] == "smoke"
    assert not any(str(gpu.RESULTS) in flag for some in flags.values() for flag in some)


def test_a_piece_that_takes_too_long_is_stopped_with_its_children(tmp_path, monkeypatch, capsys):
    """Its child would write a file after two seconds."""
    written = tmp_path / "written"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(written)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    (tmp_path / "piece.py").write_text(parent)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start = time.monotonic()
    assert gpu.run_piece("check", ["piece"], seconds=0.5) == 0
    assert "check was stopped" in capsys.readouterr().out
    time.sleep(max(0.0, 2.5 - (time.monotonic() - start)))
    assert not written.exists()


def test_the_status_of_a_piece_is_handed_on(tmp_path, monkeypatch):
    (tmp_path / "piece.py").write_text("import sys; sys.exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert gpu.run_piece("check", ["piece"], seconds=30) == 3


def test_a_piece_whose_package_is_missing_is_left_out_aloud(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert gpu.run_piece("quality", ["nothing"], seconds=1) == 0
    assert "quality is left out: it needs tyro, tqdm" in capsys.readouterr().out


def test_what_make_calls_is_what_there_is():
    """The Makefile's commands, without running them."""
    command = ["make", "--no-print-directory", "-n", "gpu", "gpu-check", "gpu-speed"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    first, check, speed = shown.stdout.strip().splitlines()
    assert first.strip().endswith("-m benchmarks.gpu")
    assert "benchmarks.gpu check --minutes 2" in check
    assert "benchmarks.gpu speed" in speed


def test_the_dry_check_and_the_dry_run_are_calls_that_work(tmp_path, monkeypatch):
    monkeypatch.setitem(cases.SCALES, "tiny", cases.SCALES["tiny"]._replace(sizes=((2, 37),), seconds=0.001))
    for name, subjects in {"check": {"check"}, "speed": {"check", "contender", *gpu.TIMED}}.items():
        flags = gpu.PIECES[name].dry(tmp_path)
        assert flags[0] == "benchmarks.speed"
        assert speed.main(flags[1:]) == 0
        assert {row["case"].subject for row in read_ledger(tmp_path / "speed.jsonl")} == subjects
