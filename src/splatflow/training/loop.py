"""The Trainer of `transformers`, with this package's evaluation, weight decay and log, and a guard against nan."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from splatflow.nn import Strategy, dead_fraction, effective_num_splats, usage
from splatflow.nn.usage import splat_layers
from splatflow.training.evaluate import bits_per_byte
from splatflow.training.text import TokenWindows

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int
    from torch import Tensor

LOG_NAME = "log.jsonl"


class DivergedError(FloatingPointError):
    """Training has left the finite numbers; the message says where, and what was saved before."""


class SplatFlowTrainer(Trainer):
    """Trains on `TokenWindows`, evaluates in bits per byte, and writes `output_dir/log.jsonl`.

    - `bytes_per_token`: for each token id the bytes it stands for, from `token_byte_lengths(tokenizer)`.
    - `strategies`: what changes splats between steps, see `splatflow.nn.strategy`.

    The other arguments are those of `Trainer`.
    """

    control: TrainerControl

    def __init__(
        self,
        *,
        train_dataset: TokenWindows,
        bytes_per_token: Int[np.ndarray, "V"],
        strategies: Sequence[Strategy] = (),
        **arguments: Any,
    ) -> None:
        super().__init__(train_dataset=train_dataset, **arguments)
        if strategies:
            self.add_callback(CallStrategies(strategies, train_dataset))
        self.bytes_per_token = bytes_per_token
        mean_bytes = float(bytes_per_token[train_dataset.windows].mean())
        self.add_callback(JsonLog(Path(self.args.output_dir) / LOG_NAME, mean_bytes))
        if self.pop_callback(ProgressCallback) is not None:  # a notebook has its own
            self.add_callback(ProgressBar())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices and embeddings alone: for a splat, a norm or a bias, 0 is a place and not a simpler model."""
        decaying = (nn.Linear, nn.Embedding)
        return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, decaying)]

    def training_step(self, *arguments: Any, **named_arguments: Any) -> Tensor:
        loss = super().training_step(*arguments, **named_arguments)
        # Reading the number waits for the device. It is worth it: a nan found later has already reached the weights.
        if not math.isfinite(number := loss.item()):
            raise DivergedError(self._explain(f"in step {self.state.global_step + 1} the loss is {number}"))
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; checkpoints are saved by this, too."""
        self._check_weights()
        super().save_model(output_dir, _internal_call)

    def _check_weights(self) -> None:
        """The gradient of a finite loss may be nan, which the next loss would show, but only after a save."""
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                problem = f"after step {self.state.global_step} {name} holds numbers that are not finite"
                raise DivergedError(self._explain(problem))

    def _explain(self, problem: str) -> str:
        return (
            f"{problem}, expected finite numbers; nothing is written over the checkpoints in {self.args.output_dir}. "
            f"A learning_rate below {self.args.learning_rate:g} or a longer warm-up may help"
        )

    def evaluate(
        self,
        eval_dataset: TokenWindows | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Bits per byte, the ends `low` and `high` of its interval, the bytes predicted, and how splats are used."""
        self._check_weights()
        windows = eval_dataset or self.eval_dataset
        with self.compute_loss_context_manager():
            score = bits_per_byte(
                self.model,
                windows,
                bytes_per_token=self.bytes_per_token,
                batch_size=self.args.per_device_eval_batch_size,
                progress=not self.args.disable_tqdm,
            )
        metrics = {
            f"{metric_key_prefix}_bits_per_byte": score.bits_per_byte,
            f"{metric_key_prefix}_low": score.low,
            f"{metric_key_prefix}_high": score.high,
            f"{metric_key_prefix}_num_bytes": score.num_bytes,
        }
        if splat_layers(self.model):
            batch = windows_as_batch(windows, 0, self.args.per_device_eval_batch_size, self.args.device)
            shares = torch.cat(list(usage(self.model, batch).values()))  # [all heads, M]
            metrics[f"{metric_key_prefix}_dead_fraction"] = dead_fraction(shares).mean().item()
            metrics[f"{metric_key_prefix}_effective_num_splats"] = effective_num_splats(shares).mean().item()
        self.log(dict(metrics))  # a copy: log() adds entries of its own
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def windows_as_batch(windows: TokenWindows, first: int, count: int, device: torch.device) -> dict[str, Tensor]:
    """`count` windows from `first` on, or from the beginning again, without labels: usage needs no loss."""
    rows = [windows[index % len(windows)]["input_ids"] for index in range(first, first + min(count, len(windows)))]
    return {"input_ids": torch.stack(rows).to(device)}


class CallStrategies(TrainerCallback):
    """Calls strategies between the steps of a run.

    They look at windows of the training text that are a function of the step, the same in every process and in a run
    that goes on from a checkpoint.
    """

    def __init__(self, strategies: Sequence[Strategy], windows: TokenWindows) -> None:
        self.strategies = strategies
        self.windows = windows

    def _batch(self, args: TrainingArguments, step: int) -> dict[str, Tensor]:
        count = args.per_device_train_batch_size
        return windows_as_batch(self.windows, step * count, count, args.device)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        if state.global_step == 0:
            for strategy in self.strategies:
                strategy.begin(parts["model"], parts["optimizer"], self._batch(args, 0))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        for strategy in self.strategies:
            strategy.after_backward(parts["model"], parts["optimizer"], state.global_step + 1)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        step = state.global_step + 1
        batch = self._batch(args, step)
        for strategy in self.strategies:
            strategy.after_step(parts["model"], parts["optimizer"], step, batch)


class ProgressBar(ProgressCallback):
    """The loss beside the bar, and a line for each evaluation."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if self.training_bar is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)
        elif "eval_bits_per_byte" in logs:
            self.training_bar.write(
                f"step {state.global_step:,}: {logs['eval_bits_per_byte']:.3f} bits per held-out byte"
            )


class JsonLog(TrainerCallback):
    """One JSON object a line: `loss`, the mean in nats a token since the last such line, or an evaluation.

        {"step": 10, "tokens": 40960, "loss": 3.47, "bits_per_byte": 5.01, "learning_rate": 0.0001, "grad_norm": 1.2,
         "tokens_per_second": 20843.1}
        {"step": 10, "tokens": 40960, "eval_bits_per_byte": 4.9, "eval_low": 4.8, "eval_high": 5.0,
         "eval_num_bytes": 52020, "eval_dead_fraction": 0.02, "eval_effective_num_splats": 51.3}

    `tokens` counts from the beginning of training. `bits_per_byte` is `loss` in bits over `bytes_per_token`, the mean
    of the training text. `tokens_per_second` is of this run and leaves out evaluating and saving. A run that goes on
    from a checkpoint keeps the lines up to that checkpoint, and its first `loss` is the mean since then. How splats are
    used is the mean over all heads, on the first held-out windows.
    """

    def __init__(self, path: Path, bytes_per_token: float) -> None:
        self.path = path
        self.bytes_per_token = bytes_per_token

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds, self.tokens_before = 0.0, state.num_input_tokens_seen
        if state.is_world_process_zero:
            earlier = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            kept = [line for line in earlier if _step_of(line) <= state.global_step]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step_began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds += time.perf_counter() - self.step_began
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last steps too, though they be few

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        line = {"step": state.global_step, "tokens": state.num_input_tokens_seen}
        if "loss" in logs:
            line["loss"] = logs["loss"]
            line["bits_per_byte"] = logs["loss"] / math.log(2) / self.bytes_per_token
            line["learning_rate"] = logs["learning_rate"]
            line["grad_norm"] = logs["grad_norm"]
            line["tokens_per_second"] = (state.num_input_tokens_seen - self.tokens_before) / self.seconds
            self.seconds, self.tokens_before = 0.0, state.num_input_tokens_seen
        elif evaluated := {name: value for name, value in logs.items() if name.startswith("eval_")}:
            line |= evaluated
        else:
            return  # the Trainer's summary at the end
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")


def _step_of(line: str) -> int:
    """The step of a line; a line that its run, killed, left unfinished belongs nowhere."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return 2**63
