"""A training run from its settings: text -> tokens -> windows, a new model, the loop, a folder that holds the model.

    model = train(TrainConfig(text="notes/", output_dir="runs/notes"))

    import splatflow.models     # makes the model known to the Auto classes
    model = AutoModelForCausalLM.from_pretrained("runs/notes")
    tokenizer = AutoTokenizer.from_pretrained("runs/notes")

`transformers` is imported where it is used: a wrong path must be reported at once.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from splatflow.training.checkpoints import checkpoints, newest_complete, step_of
from splatflow.training.config import ModelConfig, TrainConfig
from splatflow.training.geometry import strategies_of
from splatflow.training.text import (
    HELDOUT_FRACTION,
    Text,
    TextError,
    TokenWindows,
    encode,
    load_tokenizer,
    read_text,
    token_byte_lengths,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, TrainingArguments

    from splatflow.models import SplatFlowForCausalLM


def train(config: TrainConfig) -> SplatFlowForCausalLM:
    """Train a model on text, and save it with its tokenizer in `config.output_dir`.

    `output_dir/log.jsonl` gets a line for each logging step and each evaluation, see `splatflow.training.loop.JsonLog`.

    Raises:
        FileNotFoundError, TextError: there is no such text, or none in it that can be used.
        FileExistsError: `output_dir` holds a model or checkpoints and `resume` is off, or a model alone and it is on.
        ValueError: the checkpoint to resume from has more steps already, or is of another model.
        DivergedError: the loss is no longer a finite number. Checkpoints made before are left as they are.
    """
    text = training_text(config)
    checkpoint = starting_point(config)
    from transformers import default_data_collator, set_seed

    from splatflow.training.loop import SplatFlowTrainer

    tokenizer = load_tokenizer(config.tokenizer)
    train_windows, heldout_windows = (
        _windows(name, documents, tokenizer, config.seq_len)
        for name, documents in (("training text", text.train), ("held-out text", text.heldout))
    )
    set_seed(config.seed)
    model = build_model(config.model, tokenizer)
    if checkpoint is not None:
        check_same_model(model, checkpoint)
    trainer = SplatFlowTrainer(
        model=model,
        args=training_arguments(config),
        train_dataset=train_windows,
        eval_dataset=heldout_windows,
        processing_class=tokenizer,
        data_collator=default_data_collator,  # the one for tokenizers would add a mask, though nothing is padded
        bytes_per_token=token_byte_lengths(tokenizer),
        strategies=strategies_of(config.geometry, config.seed),
    )
    if checkpoint is not None and step_of(checkpoint) == config.steps:  # the Trainer would take one step more
        trainer.model.load_state_dict(type(model).from_pretrained(checkpoint).state_dict())
    else:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    trainer.save_model()
    return trainer.model


def training_text(config: TrainConfig) -> Text:
    """What to learn from and what to measure on."""
    documents = read_text(config.text)
    if config.heldout is not None:
        return Text(train=documents, heldout=read_text(config.heldout))
    return hold_out_the_end(documents, HELDOUT_FRACTION)


def hold_out_the_end(documents: list[bytes], fraction: float) -> Text:
    """Keep the last `fraction` of all bytes from learning; a document that lies across the border is cut in two.

    >>> hold_out_the_end([b"abcdef", b"gh"], fraction=0.5)
    Text(train=[b'abcd'], heldout=[b'ef', b'gh'])
    """
    ends = list(accumulate(map(len, documents)))
    border = int(ends[-1] * (1 - fraction))
    last = next(index for index, end in enumerate(ends) if end > border)
    document = documents[last]
    cut = border - (ends[last] - len(document))
    while cut and document[cut] & 0xC0 == 0x80:  # inside a character of UTF-8
        cut -= 1
    train = [*documents[:last], document[:cut]]
    return Text(train=[part for part in train if part], heldout=[document[cut:], *documents[last + 1 :]])


def starting_point(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from; None is the beginning."""
    folder = Path(config.output_dir)
    models = list(folder.glob("model*.safetensors"))
    if config.resume:
        checkpoint = newest_complete(folder)
        if checkpoint is None and models:
            raise FileExistsError(f"output_dir {folder} holds {models[0].name} and no checkpoint to resume from")
        if checkpoint is not None and step_of(checkpoint) > config.steps:
            raise ValueError(f"steps is {config.steps}, expected at least the {step_of(checkpoint)} of {checkpoint}")
        return checkpoint
    if earlier := [*checkpoints(folder), *models]:
        raise FileExistsError(
            f"output_dir {folder} holds {earlier[0].name} of an earlier run; "
            "expected another folder, or resume to go on from its newest checkpoint"
        )
    return None


def check_same_model(model: SplatFlowForCausalLM, checkpoint: Path) -> None:
    """Raises ValueError, naming the setting, if the model in `checkpoint` is built in another way."""
    before = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    for name in ModelConfig.__dataclass_fields__:
        name = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}.get(name, name)
        given = getattr(model.config, name)
        if before.get(name, given) != given:
            raise ValueError(f"model.{name} is {given!r}, expected {before[name]!r} as in {checkpoint}")


def _windows(name: str, documents: list[bytes], tokenizer: PreTrainedTokenizerFast, seq_len: int) -> TokenWindows:
    try:
        return TokenWindows(encode(documents, tokenizer), seq_len)
    except TextError as error:
        raise TextError(f"{name}: {error}") from error


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> SplatFlowForCausalLM:
    """A new model with random values and the vocabulary of `tokenizer`."""
    from splatflow.models import SplatFlowConfig, SplatFlowForCausalLM

    settings = asdict(config)
    settings |= {"num_hidden_layers": settings.pop("num_layers"), "num_attention_heads": settings.pop("num_heads")}
    return SplatFlowForCausalLM(
        SplatFlowConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
    )


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The same settings in the words of `transformers`."""
    import torch
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=config.output_dir,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        max_steps=config.steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta2=0.95,  # usual for language models: with 0.999 the second moment trails behind a short run
        use_cpu=not torch.accelerator.is_available(),  # or bf16 is refused there
        bf16=config.precision == "bf16",
        gradient_checkpointing=config.gradient_checkpointing,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # it would report the mean of earlier losses in place of a nan
        eval_strategy="steps",
        eval_steps=config.eval_every or config.steps,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or config.steps,
        save_total_limit=3,  # one may be incomplete, and one may be about to be
        seed=config.seed,
        report_to=list(config.report_to),
        include_num_input_tokens_seen="all",
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
