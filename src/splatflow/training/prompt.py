"""A prompt on its way into a model: text -> tokens -> pieces of equal length -> a cache that stays as small as it was.

    pieces = in_pieces(prompt_tokens(text_blocks("book.txt"), tokenizer), size=2048)
    cache, last = prefill(model, pieces)
    model.generate(last[None], past_key_values=cache, attention_mask=torch.ones(1, 2))

No more than a piece and a block of the file is held at any time, whatever the length of the text.
"""

# N token of a piece, L last tokens

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import TextStreamer

from splatflow.models import SplatFlowCache, SplatFlowForCausalLM
from splatflow.training.text import OPENERS, encode, takes_bytes

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

SHOWN_TOKENS = 500  # of a prompt, at its end


def prompt_tokens(blocks: Iterable[bytes], tokenizer: PreTrainedTokenizerFast) -> Iterator[Int[np.ndarray, "N"]]:
    """The mark of an end of text, as before every document, and the tokens of a text that comes in blocks.

    If bytes are tokens, each block is taken by itself. Other tokens may lie across the border of two blocks, so there
    the text is put together first: it is held as a whole, and so are its tokens.
    """
    yield np.array([tokenizer.eos_token_id])
    for block in blocks if takes_bytes(tokenizer) else [b"".join(blocks)]:
        yield encode([block], tokenizer)[:-1]


def num_prompt_tokens(file: str | None, tokenizer: PreTrainedTokenizerFast) -> int | None:
    """How many tokens `prompt_tokens` will give of a file; None if only reading it could tell."""
    if file is None or not takes_bytes(tokenizer) or not Path(file).is_file() or Path(file).suffix in OPENERS:
        return None
    return 1 + Path(file).stat().st_size


def in_pieces(blocks: Iterable[Int[np.ndarray, "N"]], size: int) -> Iterator[Int[Tensor, "N"]]:
    """The same tokens, `size` at a time; the last piece, which may be shorter, is empty only if there are no tokens.

    >>> [piece.tolist() for piece in in_pieces([np.arange(3), np.arange(3, 7)], size=2)]
    [[0, 1], [2, 3], [4, 5], [6]]
    """
    waiting = np.empty(0, np.int64)
    for block in blocks:
        waiting = np.concatenate([waiting, block])
        while len(waiting) > size:
            yield torch.from_numpy(waiting[:size])
            waiting = waiting[size:]
    yield torch.from_numpy(waiting)


@torch.no_grad()
def prefill(
    model: SplatFlowForCausalLM, pieces: Iterator[Int[Tensor, "N"]], *, num_tokens: int | None = None
) -> tuple[SplatFlowCache, Int[Tensor, "L"]]:
    """Feed all tokens but the last to the model, piece by piece.

    Returns the cache, and the last tokens of all (500 at most), the very last of which is for the model to go on from.
    If there are several pieces a bar on stderr shows how far they are; `num_tokens` is its end.
    """
    cache = SplatFlowCache(model.config.num_hidden_layers)
    held_back = last = torch.empty(0, dtype=torch.long)
    first_two = list(islice(pieces, 2))
    with tqdm(desc="reading", total=num_tokens, unit="token", unit_scale=True, disable=len(first_two) < 2) as bar:
        for piece in chain(first_two, pieces):
            unread = torch.cat([held_back, piece])
            if len(unread) > 1:
                model(unread[None, :-1].to(model.device), past_key_values=cache, logits_to_keep=1)
            held_back, last = unread[-1:], torch.cat([last, piece])[-SHOWN_TOKENS:]
            bar.update(len(piece))
    return cache, last


class PromptEndStreamer(TextStreamer):
    """Prints `shown`, the end of a prompt, in the place of what `generate()` says is the prompt, and what follows."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, shown: Int[Tensor, "L"], **decoding: Any) -> None:
        super().__init__(tokenizer, **decoding)
        self.shown: Int[Tensor, "L"] | None = shown

    def put(self, value: Tensor) -> None:
        super().put(value if self.shown is None else self.shown)
        self.shown = None
