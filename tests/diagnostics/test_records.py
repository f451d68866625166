"""A record comes back as it was written, and what is not a record is refused with its place."""

import json
import math
from datetime import UTC, datetime

import pytest
import torch

from splatflow.diagnostics import records
from splatflow.diagnostics.records import FIELDS, read_records, write_record

ROWS = [{"mixer": "splats", "seq_len": 257, "seconds": 0.003}]


def test_a_record_comes_back(tmp_path):
    path = tmp_path / "results" / "speed.json"
    write_record(path, command="splatflow bench", rows=ROWS, seeds=[2, 3], notes="2 µs ± 1")
    [record] = read_records(path.parent)
    assert tuple(record) == FIELDS
    assert record["rows"] == ROWS
    assert record["command"] == "splatflow bench"
    assert record["seeds"] == [2, 3]
    assert record["notes"] == "2 µs ± 1"
    assert datetime.fromisoformat(record["date"]).tzinfo == UTC
    assert {"cpu", "threads", "torch"} <= record["machine"].keys()


def test_records_are_read_oldest_first(tmp_path, monkeypatch):
    class Clock(datetime):
        year_now = 2031

        @classmethod
        def now(cls, tz=None):
            return datetime(cls.year_now, 1, 1, tzinfo=tz)

    monkeypatch.setattr(records, "datetime", Clock)
    write_record(tmp_path / "a.json", command="later", rows=ROWS)
    Clock.year_now = 2029
    write_record(tmp_path / "b.json", command="earlier", rows=ROWS)
    assert [record["command"] for record in read_records(tmp_path)] == ["earlier", "later"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rows": []}, ValueError, "rows is empty"),
        ({"rows": [ROWS[0], [1, 2]]}, TypeError, r"rows\[1\] is of type list, expected a dict"),
        ({"rows": [{7: 1}]}, TypeError, r"rows\[0\] has the key 7"),
        ({"rows": [{"loss": torch.ones(())}]}, TypeError, r"rows\[0\]\['loss'\] is of type Tensor"),
        ({"rows": [{"loss": None}]}, TypeError, r"rows\[0\]\['loss'\] is of type NoneType"),
        ({"rows": [{"loss": math.nan}]}, ValueError, r"rows\[0\]\['loss'\] is nan, expected a finite number"),
        ({"command": " "}, ValueError, "command is empty"),
        ({"seeds": ["two"]}, TypeError, "seeds holds 'two' of type str"),
    ],
)
def test_what_is_not_plain_is_refused_and_nothing_is_written(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        write_record(tmp_path / "record.json", **{"command": "splatflow bench", "rows": ROWS, **arguments})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "broken.json' is not a record"),
        ("[]", "lacks date, machine"),
        (json.dumps(dict.fromkeys(FIELDS[:-1], "")), "it lacks notes"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, text, message):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(NotADirectoryError, match="nowhere"):
        read_records(tmp_path / "nowhere")
    assert read_records(tmp_path) == []
