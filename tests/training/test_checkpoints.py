"""A checkpoint that was cut short is found out and passed over; a trained one stands in for a good one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from splatflow.training.checkpoints import checkpoints, newest_complete, reason_incomplete

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def write_checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.arange(7.0)}, checkpoint / "model.safetensors")
    for name in FILES[1:4]:
        torch.save({"step": step}, checkpoint / name)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return checkpoint


def test_checkpoints_are_sorted_by_number_and_other_folders_left_out(tmp_path):
    for name in ("checkpoint-9", "checkpoint-11", "checkpoint-2", "checkpoint-old", "checkpoints", "checkpoint-3-copy"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-11", "checkpoint-9", "checkpoint-2"]
    assert checkpoints(tmp_path / "none") == []


def test_a_complete_checkpoint_has_no_reason_against_it(tmp_path):
    assert reason_incomplete(write_checkpoint(tmp_path, 5)) is None


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, name):
    checkpoint = write_checkpoint(tmp_path, 5)
    (checkpoint / name).unlink()
    assert reason_incomplete(checkpoint).endswith("is missing")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0, 0.5, 0.98])
def test_a_file_cut_short_is_named(tmp_path, name, kept):
    path = write_checkpoint(tmp_path, 5) / name
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert reason_incomplete(path.parent) == f"{name} is cut short"


def test_the_newest_complete_one_is_chosen_with_a_warning_that_names_both(tmp_path):
    for step in (2, 9, 11):
        write_checkpoint(tmp_path, step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_complete(tmp_path).name == "checkpoint-11"
    (tmp_path / "checkpoint-11" / "optimizer.pt").unlink()
    with pytest.warns(
        UserWarning, match=r"checkpoint-11 is incomplete \(optimizer.pt is missing\).*from .*checkpoint-9"
    ):
        assert newest_complete(tmp_path).name == "checkpoint-9"


def test_without_a_complete_one_training_begins_anew(tmp_path):
    assert newest_complete(tmp_path) is None
    (write_checkpoint(tmp_path, 3) / "trainer_state.json").unlink()
    with pytest.warns(UserWarning, match="checkpoint-3 is incomplete.*from the beginning"):
        assert newest_complete(tmp_path) is None
