"""What a trained model is good for: measure it on text, and let it write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from splatflow.nn import silence
from splatflow.training.config import EvalConfig, GenerateConfig
from splatflow.training.evaluate import Score, bits_per_byte
from splatflow.training.text import TokenWindows, encode, read_text, token_byte_lengths

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
    """The prompt and what the model makes of it, printed as it is made, and returned.

    The prompt is the beginning of a document, as in training: a mark of an end of text goes before it.

    Raises:
        FileNotFoundError, TextError: there is no such model or prompt file, or the file is binary or empty.
    """
    check_model_folder(config.model)
    prompt = config.prompt
    if config.prompt_file is not None:
        prompt = b"".join(read_text(config.prompt_file)).decode(errors="replace")
    pretrained = load_pretrained(config.model)
    from transformers import TextStreamer, set_seed

    tokenizer, device = pretrained.tokenizer, pretrained.model.device
    ids = [tokenizer.eos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    input_ids = torch.tensor([ids], device=device)  # [1, T]
    choices: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0:
        choices = {"do_sample": True, "temperature": config.temperature, "top_k": config.top_k}
    set_seed(config.seed)
    output = pretrained.model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=config.max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **choices,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)
