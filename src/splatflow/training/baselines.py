"""What a number of bits per byte is worth: the same held-out text, read by a compressor and by counting n-grams."""
# N n-grams of a text; K different n-grams; C different contexts (an n-gram without its last byte)

from __future__ import annotations

import lzma
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, UInt64

MAX_ORDER = 8  # an n-gram is kept as the bytes of one 64-bit integer


def xz_bits_per_byte(train: bytes, heldout: bytes) -> float:
    """By how many bits `xz -9e` grows for each held-out byte that follows the training text.

        8 * (size(train + heldout) - size(train)) / len(heldout)

    Its dictionary is 64 MiB, so of a longer training text only the end helps. With `train = b""` this is the compressor
    alone. Raises `ValueError` if `heldout` is empty.
    """
    _check_not_empty(heldout=heldout)

    def compressed_size(text: bytes) -> int:
        return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))

    return 8 * (compressed_size(train + heldout) - compressed_size(train)) / len(heldout)


def ngram_bits_per_byte(train: bytes, heldout: bytes, order: int = 5) -> float:
    """Bits per held-out byte of an n-gram model with interpolated Kneser-Ney smoothing, counted on `train`.

    The model sees the `order - 1` bytes before each byte. Raises `ValueError` if either text is empty or `order` is not
    in 1 ... 8.
    """
    _check_not_empty(train=train, heldout=heldout)
    if not 1 <= order <= MAX_ORDER:
        raise ValueError(f"order is {order}; expected 1 to {MAX_ORDER} bytes")
    probabilities = ngram_probabilities(ngram_tables(train, order), ngrams_of(heldout, order))
    return float(-np.log2(probabilities).mean())


def _check_not_empty(**texts: bytes) -> None:
    for name, text in texts.items():
        if not text:
            raise ValueError(f"{name} is empty: 0 bytes; expected at least 1")


@dataclass(frozen=True)
class NgramTable:
    """One order of the model, sorted for look-up.

    P(byte | context) = kept[context + byte] + passed_on[context] * P(byte | context without its first byte)

    where `kept` is 0 for an n-gram that was never seen, and `passed_on` is 1 for a context that was never seen.
    """

    ngrams: UInt64[np.ndarray, "K"]
    kept: Float[np.ndarray, "K"]
    contexts: UInt64[np.ndarray, "C"]
    passed_on: Float[np.ndarray, "C"]


def ngrams_of(text: bytes, order: int) -> UInt64[np.ndarray, "N"]:
    """For each byte, the `order` bytes that end with it as one big-endian integer; NUL bytes precede the text.

    ngrams_of(b"ab", 2)     # [0x0061, 0x6162]
    """
    padded = np.frombuffer(bytes(order - 1) + text, np.uint8)
    ngrams: UInt64[np.ndarray, "N"] = np.zeros(len(text), np.uint64)
    for offset in range(order):
        ngrams = (ngrams << 8) | padded[offset : offset + len(text)]
    return ngrams


def ngram_tables(text: bytes, order: int) -> list[NgramTable]:
    """The tables of the orders 1 ... `order`, shortest first.

    The longest n-grams are counted as they occur. A shorter one counts once for each different byte before it (Kneser
    and Ney, 1995): a byte that follows one context only, however often, is no good guess in another.
    """
    ngrams, counts = np.unique(ngrams_of(text, order), return_counts=True)
    tables = [_discount(ngrams, counts)]
    for length in range(order - 1, 0, -1):
        ngrams, counts = np.unique(_last_bytes(ngrams, length), return_counts=True)
        tables.insert(0, _discount(ngrams, counts))
    return tables


def _discount(ngrams: UInt64[np.ndarray, "K"], counts: np.ndarray) -> NgramTable:
    """Take the same part of one count from every n-gram, and pass what was taken on to the shorter contexts."""
    once, twice = np.sum(counts == 1), np.sum(counts == 2)
    # The estimate of Ney, Essen and Kneser (1994), once / (once + 2 twice), with 1 more of each: never 0, never 1.
    discount = (once + 1) / (once + 1 + 2 * (twice + 1))
    contexts, first = np.unique(ngrams >> 8, return_index=True)
    num_followers = np.diff(first, append=len(ngrams))
    context_counts = np.add.reduceat(counts, first)
    kept = (counts - discount) / np.repeat(context_counts, num_followers)
    return NgramTable(ngrams, kept, contexts, discount * num_followers / context_counts)


def ngram_probabilities(tables: list[NgramTable], ngrams: UInt64[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """The probability of the last byte of each n-gram after the bytes before it; never 0.

    `ngrams` have the order of the longest table; in every context the 256 next bytes share a probability of 1.
    """
    probabilities = np.full(len(ngrams), 1 / 256)
    for length, table in enumerate(tables, start=1):
        shorter = _last_bytes(ngrams, length)
        kept = _look_up(shorter, table.ngrams, table.kept, missing=0.0)
        passed_on = _look_up(shorter >> 8, table.contexts, table.passed_on, missing=1.0)
        probabilities = kept + passed_on * probabilities
    return probabilities


def _last_bytes(ngrams: UInt64[np.ndarray, "N"], length: int) -> UInt64[np.ndarray, "N"]:
    return ngrams & np.uint64(256**length - 1)


def _look_up(
    wanted: UInt64[np.ndarray, "N"], keys: UInt64[np.ndarray, "K"], values: Float[np.ndarray, "K"], *, missing: float
) -> Float[np.ndarray, "N"]:
    places = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], missing)
