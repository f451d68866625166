"""The page says what the ledger holds, and a tier ends with a ledger."""

import re
import subprocess
import sys

import pytest
from benchmarks.quality import __main__ as runner
from benchmarks.quality import plan, report
from benchmarks.quality.ledger import read_ledger
from benchmarks.quality.plan import Experiment

TINY = Experiment("short recall", ("splats", "window only"), state=1100, steps=2, seeds=(1, 2))


@pytest.fixture
def tiny_tier(monkeypatch):
    monkeypatch.setitem(runner.TIERS, "smoke", (TINY,))
    monkeypatch.setattr(plan, "FIRST_RATES", plan.FIRST_RATES[:2])


def test_the_page_in_docs_is_made_of_the_ledger():
    rows = read_ledger(runner.LEDGER)
    pictures = report.draw(rows)
    written = report.PAGE.read_text(encoding="utf-8")
    assert written == report.page(rows, pictures)
    assert sorted(re.findall(r"\(pictures/(.*?)\)", written)) == sorted(pictures)
    assert all((report.PICTURES / name).is_file() for name in pictures)


def test_a_tier_fills_a_ledger_and_goes_on_where_it_stopped(tiny_tier, tmp_path, capsys):
    options = runner.Options("smoke", ledger=tmp_path / "ledger.jsonl", workers=2, minutes=0)
    assert runner.main(options) == 0
    assert not options.ledger.exists()  # no time, no run
    assert "not finished" in capsys.readouterr().out

    options = runner.Options("smoke", ledger=options.ledger, workers=2)
    assert runner.main(options) == 0
    printed = capsys.readouterr().out
    rows = read_ledger(options.ledger)
    assert len(rows) >= 8
    assert re.search(r"splats +0\.\d+ to 0\.\d+ on 2 fresh seeds", printed)

    assert runner.main(options) == 0  # nothing left to do
    assert read_ledger(options.ledger) == rows


def test_a_run_that_fails_is_named_and_hinders_no_other(monkeypatch, tmp_path, capsys):
    impossible = TINY._replace(state=3)  # less than the convolution alone
    monkeypatch.setitem(runner.TIERS, "smoke", (impossible, TINY._replace(mixers=("splats",), seeds=(1,))))
    monkeypatch.setattr(plan, "FIRST_RATES", plan.FIRST_RATES[:2])
    options = runner.Options("smoke", ledger=tmp_path / "ledger.jsonl", workers=1)
    assert runner.main(options) == 1
    printed = capsys.readouterr()
    assert "cannot remember 3 numbers" in printed.err
    assert {run.state for run in read_ledger(options.ledger)} == {TINY.state}
    assert "on 1 fresh seeds" in printed.out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"workers": 0}, "--workers 0"),
        ({"minutes": float("nan")}, "--minutes nan"),
        ({"minutes": -1}, "--minutes -1"),
        ({"ledger": "no row"}, "line 1 of"),
    ],
)
def test_a_bad_option_is_told_before_anything_runs(options, told, tmp_path, capsys):
    if "ledger" in options:
        path = tmp_path / "ledger.jsonl"
        path.write_text(options["ledger"] + "\n")
        options = {"ledger": path}
    assert runner.main(runner.Options("smoke", **options)) == 2
    assert told in capsys.readouterr().err


def test_a_ledger_below_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert runner.main(runner.Options("smoke", ledger=tmp_path / "file" / "ledger.jsonl")) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_report_of_nothing_leaves_the_page_alone(tmp_path, capsys):
    before = report.PAGE.read_text(encoding="utf-8")
    assert runner.main(runner.Options("report", ledger=tmp_path / "typo.jsonl")) == 2
    assert "holds no runs" in capsys.readouterr().err
    assert report.PAGE.read_text(encoding="utf-8") == before


def test_the_table_shows_the_mean_of_the_fresh_seeds(tmp_path):
    rates = dict.fromkeys(plan.FIRST_RATES, 0.5)
    rows = {}
    for mixer, scores in {"splats": (0.7, 0.8), "window only": (0.1, 0.2)}.items():
        for rate, score in [*rates.items()]:
            rows[TINY.run(mixer, rate, 0)] = measured(score)
        for seed, score in zip(TINY.seeds, scores, strict=True):
            rows[TINY.run(mixer, min(rates), seed)] = measured(score)
    lines = report.table(TINY, rows).splitlines()
    assert lines[2].startswith("| splats | 1,100 | 9 | 3 | 0.005 | **0.750 ± 0.635** |  | 0/2 | 0.750 |")
    assert lines[3].startswith("| window only | 1,100 | 9 | 3 | 0.005 | **0.150 ± 0.635** | -0.600 ± 0.000 | 0/2 |")

    del rows[TINY.run("splats", min(rates), 2)]
    assert "| splats | not finished |" in report.table(TINY, rows)


def measured(score):
    return {
        "scores": {"8 pairs": score, "mean accuracy": score},
        "state_size": 1100,
        "parameters": 9,
        "step_operations": 3,
    }


def test_a_text_that_is_not_there_is_named(tmp_path, capsys):
    path = tmp_path / "absent.txt"
    assert runner.main(runner.Options("cpu", wikitext=(path, path))) == 2
    assert "absent.txt" in capsys.readouterr().err


def test_a_study_without_its_text_is_left_out_aloud(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(runner.TIERS, "cpu", (Experiment("needle", ("splats",), state=1100, steps=2),))
    assert runner.main(runner.Options("cpu", ledger=tmp_path / "ledger.jsonl")) == 0
    assert "needle is left out: it needs --novels TRAIN HELDOUT" in capsys.readouterr().out


def test_the_command_begins_no_run_after_its_time(tmp_path):
    """A process of its own: what the workers run has to be found by them too."""
    ledger = tmp_path / "ledger.jsonl"
    command = [sys.executable, "-m", "benchmarks.quality", "smoke", "--ledger", ledger, "--workers", "1"]
    subprocess.run([*command, "--minutes", "0.01"], check=True, capture_output=True, cwd=report.PAGE.parents[1])
    [(run, row)] = read_ledger(ledger).items()
    assert run.mixer == "splats"
    assert row["scores"]["mean accuracy"] > 0.03  # it has learnt something: chance is 1 in 32
