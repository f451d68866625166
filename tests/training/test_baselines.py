"""The n-gram model is a distribution that agrees with counting by hand, and both baselines know what is predictable."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splatflow.training.baselines import (
    ngram_bits_per_byte,
    ngram_probabilities,
    ngram_tables,
    ngrams_of,
    xz_bits_per_byte,
)

TEXT = b"the splats are where the tokens meet, and the tokens meet only at the splats. " * 7


def kneser_ney_by_definition(text: bytes, context: bytes, byte: int) -> float:
    """The same model with dictionaries: slow, and close to the formula."""
    order = len(context) + 1
    padded = bytes(order - 1) + text
    counts = Counter(padded[start : start + order] for start in range(len(text)))
    probability = 1 / 256
    tables = [counts]
    for _ in range(order - 1):
        tables.append(Counter(ngram[1:] for ngram in tables[-1]))
    for length, table in enumerate(reversed(tables)):
        once, twice = (sum(count == wanted for count in table.values()) for wanted in (1, 2))
        discount = (once + 1) / (once + 2 * twice + 3)
        suffix = context[len(context) - length :]
        followers = [count for ngram, count in table.items() if ngram[:-1] == suffix]
        if followers:
            kept = max(table[suffix + bytes([byte])] - discount, 0)
            probability = (kept + discount * len(followers) * probability) / sum(followers)
    return probability


def test_ngrams_are_big_endian_and_start_with_nul() -> None:
    assert ngrams_of(b"ab", 2).tolist() == [0x0061, 0x6162]
    assert ngrams_of(b"abcdefgh", 8)[-1] == int.from_bytes(b"abcdefgh", "big")


@given(st.binary(min_size=1, max_size=60), st.binary(min_size=7, max_size=7), st.integers(1, 8), st.booleans())
def test_next_bytes_share_a_probability_of_one(train: bytes, unseen: bytes, order: int, is_seen: bool) -> None:
    context = ((bytes(7) + train[:-1]) if is_seen else unseen)[-7:]
    followed = np.array([int.from_bytes((context + bytes([byte]))[-order:], "big") for byte in range(256)], np.uint64)
    probabilities = ngram_probabilities(ngram_tables(train, order), followed)
    assert (probabilities > 0).all()
    assert math.isclose(probabilities.sum(), 1.0, rel_tol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_equal_the_definition(order: int) -> None:
    generator = np.random.default_rng(0)
    train, heldout = (bytes(generator.choice(list(b"abcd"), size=size).tolist()) for size in (199, 31))
    padded = bytes(order - 1) + heldout
    expected = [
        kneser_ney_by_definition(train, padded[place : place + order - 1], byte) for place, byte in enumerate(heldout)
    ]
    actual = ngram_probabilities(ngram_tables(train, order), ngrams_of(heldout, order))
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_ngrams_find_the_entropy_of_a_known_source() -> None:
    generator = np.random.default_rng(0)
    train, heldout = (generator.choice(8, size=size).astype(np.uint8).tobytes() for size in (200_000, 20_000))
    assert ngram_bits_per_byte(train, heldout, order=3) == pytest.approx(3.0, abs=0.01)


def test_longer_contexts_help_on_text() -> None:
    bits = [ngram_bits_per_byte(TEXT, TEXT[:200], order) for order in range(1, 6)]
    assert bits == sorted(bits, reverse=True)
    assert bits[-1] < 0.5


def test_xz_learns_from_the_training_text() -> None:
    noise = np.random.default_rng(0).bytes(5_000)
    assert xz_bits_per_byte(b"", noise) > 8.0
    assert xz_bits_per_byte(noise, noise) < 0.2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: xz_bits_per_byte(b"a", b""), "heldout is empty: 0 bytes"),
        (lambda: ngram_bits_per_byte(b"", b"a"), "train is empty: 0 bytes"),
        (lambda: ngram_bits_per_byte(b"a", b""), "heldout is empty: 0 bytes"),
        (lambda: ngram_bits_per_byte(b"a", b"a", order=0), "order is 0; expected 1 to 8 bytes"),
        (lambda: ngram_bits_per_byte(b"a", b"a", order=9), "order is 9; expected 1 to 8 bytes"),
    ],
)
def test_wrong_calls(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
