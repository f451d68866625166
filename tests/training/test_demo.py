"""The demo, on a text of a few kilobytes and two steps: it ends well, and its comparison is fair."""

from dataclasses import replace

import pytest

import splatflow.training.demo as demo_module
from splatflow.diagnostics import read_records
from splatflow.training.demo import MODEL, DemoConfig, demo, num_parameters, softmax_twin, train_config
from splatflow.training.text import Text


@pytest.fixture
def short_text(monkeypatch):
    line = b"def read(self, size=-1):  # a line of a library\n"
    monkeypatch.setattr(demo_module, "standard_library_text", lambda: Text([line * 200], [line * 25]))
    monkeypatch.setattr(demo_module, "SAMPLE_TOKENS", 5)


def test_the_demo_ends_well_and_writes_its_page(short_text, tmp_path, capsys):
    config = DemoConfig(output_dir=str(tmp_path / "demo"), steps=2, seq_lens=(16, 32))
    assert demo(config) == 0
    assert demo(replace(config, steps=1)) == 0, "a second time, over the first"
    printed = capsys.readouterr().out
    for name in (demo_module.SPLATS, demo_module.SOFTMAX, demo_module.WITHOUT_SPLATS, "xz -9", "5-gram", "KV cache"):
        assert name in printed
    assert (
        len(read_records(tmp_path / "demo")[0]["rows"]) == 3 + 2 + 2 + 4 + 2
    )  # scores, parameters, levels, mixers by lengths, states
    page = (tmp_path / "demo" / "demo.html").read_text()
    assert page.count("<svg") == 3  # learning curves, time, memory
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_the_twin_differs_in_its_mixer_and_has_as_many_parameters(tmp_path):
    run = train_config(DemoConfig(), tmp_path)
    twin = softmax_twin(run, tmp_path)
    assert abs(num_parameters(twin.model) / num_parameters(MODEL) - 1) < 0.02
    same = replace(twin.model, mixer="splat", window_size=MODEL.window_size, intermediate_size=None)
    assert replace(twin, model=same, output_dir=run.output_dir) == run


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "splats").mkdir()
    (tmp_path / "splats" / "paint.txt").write_text("mine")
    (tmp_path / "heldout.txt").write_text("mine, too")
    with pytest.raises(FileExistsError, match=r"holds heldout\.txt"):
        demo(DemoConfig(output_dir=str(tmp_path)))
    assert (tmp_path / "splats" / "paint.txt").read_text() == "mine"


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"seq_lens": ()}, {"seq_lens": (0,)}])
def test_wrong_settings_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        DemoConfig(**wrong)
