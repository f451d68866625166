"""The study of collapsed splats: without a remedy they stay one, with one they do not, and the picture names both."""

import pytest
from benchmarks.collapse import draw, learn


def test_collapsed_splats_stay_one_unless_something_parts_them():
    alone, parted = learn("none", seed=1, steps=20), learn("minimum distance", seed=1, steps=20)
    assert [row["step"] for row in alone] == list(range(0, 21, 2))
    assert alone[-1]["overlap"] == pytest.approx(1.0, abs=1e-5)
    assert alone[-1]["effective_num_splats"] == pytest.approx(16, abs=1e-3)  # usage does not see it
    assert parted[0]["overlap"] == pytest.approx(1.0, abs=1e-5)
    assert parted[1]["overlap"] < 0.5
    assert 0 <= alone[-1]["accuracy"] <= 1
    svg = draw({"rows": alone + parted})
    assert f"minimum distance: {parted[-1]['accuracy']:.3f}" in svg
    assert f"none: {alone[-1]['accuracy']:.3f}" in svg
    for measured in ("dead fraction", "effective number of splats", "mean overlap"):
        assert f">{measured}</text>" in svg
