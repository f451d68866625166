"""What each command needs to know, as frozen dataclasses. The same settings in Python, in a TOML file and as flags:

    TrainConfig(text="notes/", steps=500, model=ModelConfig(num_splats=32))

    text = "notes/"             # run.toml, which `run_file.py` reads
    steps = 500
    [model]
    num_splats = 32

    splatflow train --text notes/ --steps 500 --model.num-splats 32

The line below a field is its help on the command line. A value that makes no sense is refused at construction, before
anything slow is begun.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from tyro.conf import Positional, arg

from splatflow.nn import MIXERS
from splatflow.nn.ablation import MEMORIES
from splatflow.nn.splat_attention import GRAINS, Grain
from splatflow.nn.splat_set import require_routing
from splatflow.nn.super_splats import require_hops
from splatflow.nn.transforms import require_transform
from splatflow.requirements import (
    require_at_least,
    require_even_positions,
    require_heads,
    require_no_routing,
    require_one_of,
    share_of_heads,
)
from splatflow.training.geometry import GeometryConfig, require_movable

# The schedules of transformers that need no further numbers.
Schedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class ModelConfig:
    """The language model; `SplatFlowConfig` has the same settings and more."""

    hidden_size: int = 256
    """Width of the hidden states."""
    num_layers: int = 4
    """Blocks, each of a mixer and an MLP."""
    num_heads: int = 4
    """Heads a block; a divisor of hidden_size."""
    num_key_value_heads: int | None = None
    """Heads that send and have splats, a divisor of num_heads, which receive from them in turn; None is num_heads."""
    num_splats: int = 64
    """Splats a head."""
    mixer: str = "splat"
    """How tokens meet: "splat", or "softmax" for the twin to compare with."""
    window_size: int = 0
    """Tokens that are heard exactly, besides the splats; 0 is none for "splat" and all for "softmax"."""
    routing: str = "mixture"
    """How closeness becomes weights: "mixture", "gaussian", "compact", "lattice" or "grouped"."""
    splat_top_p: int | None = None
    """Splats, the nearest, that a token sends to and receives from; None is all."""
    routing_bias: bool = False
    """Learn from each token which splats it prefers."""
    token_bias: bool = False
    """Learn a table of the splats that each token of the vocabulary prefers."""
    position_bias: int = 0
    """Rows of a learned table of the splats that each place in a text prefers, and again from its start; 0 is none."""
    hops: int = 0
    """How often what a splat holds goes on to others, by way of super-splats."""
    num_super_splats: int | None = None
    """Super-splats a head, for each hop; None is the root of num_splats."""
    transform: Literal["linear", "lagged"] | None = None
    """What a splat makes of its content: "linear", a map for each; "lagged", an MLP of what it held; or None."""
    lag: int = 64
    """Tokens of a chunk, for "lagged": the MLP is of what splats held before it."""
    decay: Grain | None = "head"
    """What learns to forget: each head, each splat, or None."""
    write_gate: bool = False
    """Learn how much each token sends to each splat."""
    conv_size: int = 4
    """Tokens under the short convolution before the splats; 0 is none."""
    head_norm: bool = False
    """Normalise what each head heard."""
    output_gate: bool = False
    """Multiply what was heard by a gate made of the token."""
    value_skip: bool = False
    """Add a token's own value to what it heard."""
    position_dim: int | None = None
    """Width of the space in which tokens and splats lie; None is hidden_size / num_heads."""
    value_dim: int | None = None
    """Width of what a head sends; None is hidden_size / num_heads."""
    intermediate_size: int | None = None
    """Width of the MLP; None is 8/3 of hidden_size, rounded up to a multiple of 16."""

    def __post_init__(self) -> None:
        require_heads(self.hidden_size, num_heads=self.num_heads)
        share_of_heads(self.num_heads, self.num_key_value_heads)
        require_at_least(1, num_layers=self.num_layers, num_splats=self.num_splats, lag=self.lag)
        require_at_least(0, window_size=self.window_size, conv_size=self.conv_size, position_bias=self.position_bias)
        if self.intermediate_size is not None:
            require_at_least(1, intermediate_size=self.intermediate_size)
        require_one_of(MIXERS, mixer=self.mixer)
        require_one_of(GRAINS, decay=self.decay)
        head_dim = self.hidden_size // self.num_heads
        width = self.position_dim or head_dim
        require_routing(self.routing, self.num_splats, width, self.splat_top_p, "splat_top_p")
        require_hops(self.hops, self.num_super_splats, self.routing, self.num_splats)
        require_transform(self.transform, causal=True)
        if self.mixer != "splat":
            require_no_routing(self.mixer, token_bias=self.token_bias, position_bias=self.position_bias)
        if self.window_size or self.mixer == "softmax":
            require_even_positions(head_dim if self.mixer == "softmax" else self.position_dim or head_dim)


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    text: str
    """What to learn from: a file, a folder, or dataset:NAME[:CONFIG][@SPLIT]."""
    heldout: str | None = None
    """What to measure on, of the same kinds; None holds out the last 5 % of the text."""
    output_dir: str = "runs/train"
    """Folder for the model, its tokenizer, checkpoints and log.jsonl."""
    tokenizer: str | None = None
    """A tokenizers JSON file or a tokenizer's folder; None reads bytes."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model to train."""
    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    """What moves its splats between steps."""
    seq_len: int = 256
    """Tokens a window."""
    batch_size: int = 16
    """Windows in a forward pass, on each device."""
    accumulation: int = 1
    """Forward passes in a step."""
    steps: int = 2000
    """Updates of the parameters."""
    learning_rate: float = 1e-3
    """The highest of the schedule."""
    schedule: Schedule = "cosine"
    """How the learning rate goes on after the warm-up."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises from 0."""
    weight_decay: float = 0.1
    """Of matrices and embeddings only."""
    precision: Precision = "fp32"
    """Arithmetic of the forward pass; parameters are kept in fp32."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, more time."""
    log_every: int = 10
    """Steps between two lines of log.jsonl."""
    eval_every: int = 250
    """Steps between two evaluations; 0 evaluates at the end only, as is always done."""
    save_every: int = 500
    """Steps between two checkpoints; 0 makes none. The last three are kept."""
    seed: int = 0
    """Of the initial values and of the order of the windows."""
    resume: bool = False
    """Go on from the newest complete checkpoint in output_dir, if there is one."""
    report_to: tuple[str, ...] = ()
    """Trackers that transformers knows, such as "tensorboard" or "wandb"."""

    def __post_init__(self) -> None:
        _require_text(self, "text", "output_dir")
        require_at_least(2, seq_len=self.seq_len)
        require_at_least(
            1, batch_size=self.batch_size, accumulation=self.accumulation, steps=self.steps, log_every=self.log_every
        )
        require_at_least(
            0,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            eval_every=self.eval_every,
            save_every=self.save_every,
        )
        _require_seed(self.seed)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}, expected a finite number above 0")
        require_one_of(get_args(Schedule), schedule=self.schedule)
        require_one_of(get_args(Precision), precision=self.precision)
        require_movable(self.geometry, self.model)


@dataclass(frozen=True)
class EvalConfig:
    """A measurement of a trained model."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Folder of a trained model."""
    text: Annotated[Positional[str], arg(metavar="TEXT")]
    """What to measure on: a file, a folder, or dataset:NAME[:CONFIG][@SPLIT]."""
    without: tuple[str, ...] = ()
    """Memories to switch off: "splats", "window"."""
    seq_len: int = 256
    """Tokens a window."""
    batch_size: int = 16
    """Windows in a forward pass."""

    def __post_init__(self) -> None:
        _require_text(self, "model", "text")
        require_at_least(2, seq_len=self.seq_len)
        require_at_least(1, batch_size=self.batch_size)
        for memory in self.without:
            require_one_of(MEMORIES, without=memory)


@dataclass(frozen=True)
class GenerateConfig:
    """A continuation of a text by a trained model."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Folder of a trained model."""
    prompt: str = ""
    """How the text begins."""
    prompt_file: str | None = None
    """A file to read the prompt from. It may be huge; only the last 500 tokens of a prompt are printed again."""
    prefill_size: int = 2048
    """Tokens of the prompt that the model reads at once."""
    max_new_tokens: int = 400
    """Tokens to write at most."""
    temperature: float = 0.8
    """Below 1 the likely becomes likelier; 0 always takes the likeliest token."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0 is all."""
    seed: int = 0
    """Of the choices."""

    def __post_init__(self) -> None:
        _require_text(self, "model")
        require_at_least(1, prefill_size=self.prefill_size, max_new_tokens=self.max_new_tokens)
        require_at_least(0, temperature=self.temperature, top_k=self.top_k)
        _require_seed(self.seed)
        if self.prompt and self.prompt_file is not None:
            raise ValueError(f"prompt is {self.prompt!r} and prompt_file {self.prompt_file!r}, expected one of them")


def _require_text(config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name):
            raise ValueError(f"{name} is '', expected a path or a name")


def _require_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}, expected 0 to {2**32 - 1}")
