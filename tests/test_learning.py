"""The layer learns what it is for: recall of pairs by two blocks of splats, and not by a window too short for them."""

import pytest
from benchmarks.recall import NUM_HEADS, WIDTH, Task, accuracy_after_training

from splatflow.nn import SoftmaxAttention, SplatAttention

SHORT = Task(seq_len=32, num_pairs=4, vocab_size=64, steps=300)


@pytest.mark.parametrize(
    ("mixer", "least", "most"),
    [
        (lambda: SplatAttention(WIDTH, NUM_HEADS, num_splats=16, conv_size=4, head_norm=True), 0.9, 1.0),
        (lambda: SoftmaxAttention(WIDTH, NUM_HEADS, window_size=8, conv_size=4, head_norm=True), 0.0, 0.6),
    ],
    ids=["splats", "window only"],
)
def test_splats_recall_what_a_short_window_cannot(mixer, least, most):
    assert least <= accuracy_after_training(mixer, SHORT, learning_rate=1e-2, seed=0) <= most
