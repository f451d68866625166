"""How well a language model predicts held-out text: bits per byte, and how sure that number is."""
# B windows of a batch, T tokens of a window, V vocabulary, W windows in all

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from splatflow.nn.usage import evaluation_mode

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Score:
    """Bits per byte on held-out text, the 95 % interval from `low` to `high`, and how many bytes were predicted."""

    bits_per_byte: float
    low: float
    high: float
    num_bytes: int


def bits_per_byte(
    model: nn.Module,
    windows: Dataset,
    *,
    bytes_per_token: Int[np.ndarray, "V"],
    batch_size: int = 16,
    progress: bool = True,
) -> Score:
    """The bits that `model` spends on the tokens of `windows`, divided by the bytes that these tokens stand for.

    Each window is read alone, so its first token is not predicted: it counts neither in bits nor in bytes. An
    end-of-text token stands for no bytes, yet its bits count: to know where a document ends is part of knowing it.

    - `model`: any Hugging Face causal model, `model(input_ids=[B, T]).logits` being [B, T, V]. It is put in evaluation
      mode for the time of the call.
    - `windows`: items with "input_ids" [T], such as `TokenWindows`.
    - `bytes_per_token`: for each token id the bytes it stands for, from `token_byte_lengths(tokenizer)`.

    Raises `ValueError` if no byte is predicted at all.
    """
    device = next(model.parameters()).device
    byte_lengths = torch.from_numpy(bytes_per_token)
    batches = tqdm(DataLoader(windows, batch_size), desc="evaluating", unit="batch", disable=not progress)
    bits, num_bytes = [], []
    with torch.inference_mode(), evaluation_mode(model):
        for batch in batches:
            input_ids = batch["input_ids"]  # [B, T]
            logits = model(input_ids=input_ids.to(device)).logits  # [B, T, V]
            bits.append(_window_bits(logits, input_ids.to(device)).numpy())
            num_bytes.append(byte_lengths[input_ids[:, 1:]].sum(1).numpy())
    if not sum(map(np.sum, num_bytes)):
        raise ValueError(f"windows predict 0 bytes in {len(bits)} batches; expected at least one byte")
    window_bits, window_bytes = np.concatenate(bits), np.concatenate(num_bytes)
    low, high = bootstrap_interval(window_bits, window_bytes)
    return Score(float(window_bits.sum() / window_bytes.sum()), low, high, int(window_bytes.sum()))


def _window_bits(logits: Float[Tensor, "B T V"], input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B"]:
    """Bits for the second to the last token of each window, summed in fp64 on the CPU."""
    # The last logits have no token to predict: what they cost is left out after, for slicing them off copies [B, T, V]
    targets = input_ids.roll(-1, 1)
    nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(input_ids)
    return nats[:, :-1].cpu().double().sum(1) / math.log(2)


def bootstrap_interval(
    bits: Float[np.ndarray, "W"], num_bytes: Int[np.ndarray, "W"], *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of `bits.sum() / num_bytes.sum()`, had other windows of the same kind been drawn.

    Windows are drawn again with replacement, `resamples` times; the interval leaves 2.5 % of the ratios on each side.
    Windows are taken as independent: neighbours in one document are not quite, so the truth is a little wider.
    Raises `ValueError` if there are no windows, or not as many `bits` as `num_bytes`.
    """
    if len(bits) != len(num_bytes) or len(bits) == 0:
        raise ValueError(f"bits has {len(bits)} windows, num_bytes {len(num_bytes)}; expected the same number, not 0")
    generator = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    for resample in range(resamples):  # one at a time: all at once would hold resamples x W indices
        chosen = generator.integers(len(bits), size=len(bits))
        ratios[resample] = bits[chosen].sum() / num_bytes[chosen].sum()
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
