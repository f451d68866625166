"""What a trained model is good for: measure it on text, and let it write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from splatflow.nn import silence
from splatflow.training.config import EvalConfig, GenerateConfig
from splatflow.training.evaluate import Score, bits_per_byte
from splatflow.training.text import TokenWindows, encode, read_text, text_blocks, token_byte_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Pretrained:
    """A model in evaluation mode, on the accelerator if there is one, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


def check_model_folder(folder: str) -> None:
    """Raises `FileNotFoundError` if `folder` holds no model; to be called before a heavy library is imported."""
    if not (Path(folder) / "config.json").exists():
        raise FileNotFoundError(f"no model in {folder!r}; expected a folder that holds config.json")


def load_pretrained(folder: str) -> Pretrained:
    """Load what `train` saved, or any causal language model of `transformers` with its tokenizer."""
    check_model_folder(folder)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import splatflow.models  # noqa: F401  # registers the model

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return Pretrained(model.to(accelerator or "cpu"), AutoTokenizer.from_pretrained(folder))


def score(config: EvalConfig) -> Score:
    """Bits per byte of a trained model on a text, with the memories in `config.without` switched off.

    Raises:
        FileNotFoundError, TextError: there is no such model or text, or the text cannot be used.
    """
    check_model_folder(config.model)
    documents = read_text(config.text)
    pretrained = load_pretrained(config.model)
    windows = TokenWindows(encode(documents, pretrained.tokenizer), config.seq_len)
    with silence(pretrained.model, *config.without):
        return bits_per_byte(
            pretrained.model,
            windows,
            bytes_per_token=token_byte_lengths(pretrained.tokenizer),
            batch_size=config.batch_size,
        )


def generate(config: GenerateConfig) -> str:
    """The end of the prompt (all of it, if short) and what the model makes of it, printed as made, and returned.

    The prompt is the beginning of a document, as in training: a mark of an end of text goes before it. It is fed to the
    model piece by piece, so a long one takes no more memory than a short one. Models that are not of this package get
    it in one piece.

    Raises:
        FileNotFoundError, TextError: there is no such model or prompt file, or the file is binary or empty.
    """
    check_model_folder(config.model)
    blocks = iter([config.prompt.encode()]) if config.prompt_file is None else text_blocks(config.prompt_file)
    pretrained = load_pretrained(config.model)
    from transformers import set_seed

    from splatflow.models import SplatFlowForCausalLM
    from splatflow.training.prompt import PromptEndStreamer, in_pieces, num_prompt_tokens, prefill, prompt_tokens

    model, tokenizer = pretrained.model, pretrained.tokenizer
    tokens = prompt_tokens(blocks, tokenizer)
    choices: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0:
        choices = {"do_sample": True, "temperature": config.temperature, "top_k": config.top_k}
    if isinstance(model, SplatFlowForCausalLM):
        num_tokens = num_prompt_tokens(config.prompt_file, tokenizer)
        cache, prompt_end = prefill(model, in_pieces(tokens, config.prefill_size), num_tokens=num_tokens)
        choices["past_key_values"] = cache
        input_ids = prompt_end[None, -1:]  # [1, 1], all that the cache has not seen
    else:
        prompt_end = torch.cat(list(in_pieces(tokens, config.prefill_size)))
        input_ids = prompt_end[None]  # [1, T]
    # with a cache one column more than there are tokens, or the library takes the first of them for those in the cache
    mask = torch.ones(1, input_ids.shape[1] + ("past_key_values" in choices), dtype=torch.long)
    set_seed(config.seed)
    output = model.generate(
        input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=config.max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        streamer=PromptEndStreamer(tokenizer, prompt_end, skip_special_tokens=True),
        **choices,
    )
    written = output[0, input_ids.shape[1] :].cpu()
    return tokenizer.decode(torch.cat([prompt_end, written]), skip_special_tokens=True)
