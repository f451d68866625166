"""Bits per byte of models whose probabilities are known, and an interval that is right as often as it says."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from splatflow.training.evaluate import bits_per_byte, bootstrap_interval
from splatflow.training.text import TokenWindows

V = 257
ONE_BYTE_EACH = np.array([1] * 256 + [0])


class CountingModel(nn.Module):
    """Expects each token to be the one before it plus 1, and gives that a probability of 1/2, the others the rest."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros((), dtype=dtype))
        self.frozen = nn.Dropout().eval()

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        logits = nn.functional.one_hot((input_ids + 1) % V, V) * torch.tensor(V - 1.0).log()
        return SimpleNamespace(logits=logits.to(self.anchor.dtype))


def score_of(tokens: np.ndarray, seq_len: int, **options):
    options = {"model": CountingModel(), "bytes_per_token": ONE_BYTE_EACH, "batch_size": 3, "progress": False} | options
    return bits_per_byte(windows=TokenWindows(tokens, seq_len), **options)


def test_expected_tokens_cost_one_bit() -> None:
    score = score_of(np.arange(7 * 11, dtype=np.uint16), seq_len=11)
    assert score.bits_per_byte == pytest.approx(1.0, rel=1e-6)
    assert score.low == pytest.approx(1.0, rel=1e-6)
    assert score.high == pytest.approx(1.0, rel=1e-6)
    assert score.num_bytes == 7 * 10, "the first token of a window is not predicted"


def test_surprises_cost_what_they_should() -> None:
    tokens = np.tile(np.array([10, 11, 12, 50, 51], np.uint16), 4)
    unexpected = -np.log2(0.5 / (V - 1))  # 12 -> 50; the others cost one bit
    assert score_of(tokens, seq_len=5).bits_per_byte == pytest.approx((3 + unexpected) / 4, rel=1e-6)


def test_windows_are_read_alone() -> None:
    """A surprise between two windows costs nothing, and neither the batch size nor the order of windows matters."""
    tokens = np.concatenate([np.arange(start, start + 5) for start in (90, 10, 200, 40, 150)])
    assert score_of(tokens, seq_len=5).bits_per_byte == pytest.approx(1.0, rel=1e-6)
    tokens[7] = 0
    scores = [score_of(tokens, seq_len=5, batch_size=batch_size) for batch_size in (1, 2, 7)]
    assert scores[0] == scores[1] == scores[2]


def test_tokens_of_several_bytes_share_their_bits() -> None:
    score = score_of(np.arange(22, dtype=np.uint16), seq_len=11, bytes_per_token=np.full(V, 5))
    assert score.bits_per_byte == pytest.approx(1 / 5, rel=1e-6)
    assert score.num_bytes == 2 * 10 * 5


def test_the_end_of_text_costs_bits_and_is_no_byte() -> None:
    tokens = np.array([254, 255, 256, 0, 1] * 2, np.uint16)  # 255 -> 256 and 256 -> 0 are expected, one bit each
    score = score_of(tokens, seq_len=5)
    assert score.num_bytes == 2 * 3
    assert score.bits_per_byte == pytest.approx(4 / 3, rel=1e-6)


def test_half_precision_logits_are_scored_in_full_precision() -> None:
    logit = torch.tensor(V - 1.0).log().bfloat16().double()
    expected = torch.log2(1 + (V - 1) * torch.exp(-logit)).item()
    tokens = np.arange(250, dtype=np.uint16)
    score = score_of(tokens, seq_len=250, model=CountingModel(torch.bfloat16))
    assert score.bits_per_byte == pytest.approx(expected, rel=1e-6)


def test_training_flags_come_back_even_after_an_error() -> None:
    model = CountingModel().train()
    model.frozen.eval()
    score_of(np.arange(10, dtype=np.uint16), seq_len=5, model=model)
    assert (model.training, model.frozen.training) == (True, False)
    with pytest.raises(IndexError):
        score_of(np.arange(10, dtype=np.uint16), seq_len=5, model=model, bytes_per_token=np.ones(3, int))
    assert (model.training, model.frozen.training) == (True, False)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    num_trials, num_windows, truth = 300, 80, 2.0
    hits = 0
    for trial in range(num_trials):
        num_bytes = generator.integers(50, 100, size=num_windows)
        bits = num_bytes * generator.gamma(4.0, truth / 4.0, size=num_windows)
        low, high = bootstrap_interval(bits, num_bytes, resamples=400, seed=trial)
        hits += low <= truth <= high
    assert 0.90 <= hits / num_trials <= 0.99


def test_the_interval_narrows_with_more_windows_and_repeats() -> None:
    generator = np.random.default_rng(0)
    bits, num_bytes = generator.gamma(4.0, size=1600), np.ones(1600)
    few, many = (bootstrap_interval(bits[:count], num_bytes[:count]) for count in (100, 1600))
    assert (few[1] - few[0]) / (many[1] - many[0]) == pytest.approx(4.0, rel=0.3)
    assert many == bootstrap_interval(bits, num_bytes)
    assert many != bootstrap_interval(bits, num_bytes, seed=1)


def test_wrong_calls() -> None:
    with pytest.raises(ValueError, match="bits has 3 windows, num_bytes 2"):
        bootstrap_interval(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match="bits has 0 windows"):
        bootstrap_interval(np.ones(0), np.ones(0))
    with pytest.raises(ValueError, match="predict 0 bytes"):
        score_of(np.full(10, 256, np.uint16), seq_len=5)
