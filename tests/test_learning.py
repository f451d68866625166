"""The layer learns what it is for: recall of pairs by two blocks of splats, and not by a window too short for them."""

import pytest
from benchmarks.quality.probe import Run, measure


@pytest.mark.parametrize(("mixer", "least", "most"), [("splats", 0.8, 1.0), ("window only", 0.0, 0.3)])
def test_splats_recall_what_a_short_window_cannot(mixer, least, most):
    run = Run("short recall", mixer, state=1620, rate=1e-2, seed=1, steps=300)
    assert least <= measure(run, None)["scores"]["8 pairs"] <= most
