"""The numbers and choices that define a splatflow language model, checked where they are given."""

# No `from __future__ import annotations`: `@strict` checks types, which that import would turn into strings.

from typing import Any, ClassVar, Self

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from splatflow.nn import MIXERS
from splatflow.nn.splat_attention import GRAINS
from splatflow.nn.splat_set import require_routing
from splatflow.nn.super_splats import require_hops
from splatflow.nn.transforms import require_transform
from splatflow.presets import preset
from splatflow.requirements import (
    require_at_least,
    require_even_positions,
    require_heads,
    require_no_order,
    require_no_routing,
    require_one_of,
    share_of_heads,
)


@strict
class SplatFlowConfig(PreTrainedConfig):
    """Configuration of `SplatFlowModel` and of the models that put a head on it.

    `mixer` names a row of `splatflow.nn.MIXERS`: "splat", or "softmax", its twin in the same block. Each mixer takes
    from this configuration the options that its constructor names, so `num_splats`, say, means nothing to the twin.

    `causal=False` lets every token hear all others. A window and a decay need an order of tokens, so such a model is
    asked for with `causal=False, decay=None`; it has no cache.

    Sizes count numbers or tokens. `intermediate_size=None` stands for 8/3 of `hidden_size`, rounded up to a multiple
    of 16; `num_key_value_heads` heads send, and have splats, from which the attention heads receive in turn (None: as
    many); `window_size` is the exact near memory in tokens (0: none for "splat", everything for "softmax");
    `position_bias` is the number of rows of a table that says which splats tokens prefer by their place in the text (0:
    no table), the first of which comes again behind the last; `splat_top_p` is a mixer's `top_p`, which is another
    thing where texts are generated; `lag` is the length of a chunk of tokens, for `transform="lagged"`;
    `position_dim=None` lets the mixer choose the width of the space of the splats. The default vocabulary is the 256
    bytes and one mark, 256, which begins, ends and pads a text.

    Raises:
        StrictDataclassError: at construction, naming the argument and what was given, for a value of the wrong type, a
            size that is not positive, `hidden_size` not divisible by `num_attention_heads`, an unknown choice, or a
            window or decay without a causal mask.

    >>> SplatFlowConfig(hidden_size=48, num_attention_heads=3).intermediate_size
    128
    """

    model_type = "splatflow"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 257
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    mixer: str = "splat"
    causal: bool = True
    num_splats: int = 64
    window_size: int = 0
    routing: str = "mixture"
    splat_top_p: int | None = None
    routing_bias: bool = False
    token_bias: bool = False
    position_bias: int = 0
    hops: int = 0
    num_super_splats: int | None = None
    transform: str | None = None
    lag: int = 64
    decay: str | None = "head"
    write_gate: bool = False
    conv_size: int = 4
    head_norm: bool = False
    output_gate: bool = False
    value_skip: bool = False
    position_dim: int | None = None
    value_dim: int | None = None
    tied_positions: bool = False
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 256
    eos_token_id: int | list[int] | None = 256
    pad_token_id: int | None = 256

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> Self:
        """The settings of a row of `splatflow.presets.PRESETS`, with `options` beside them and in their place.

        >>> config = SplatFlowConfig.from_preset("hybrid", hidden_size=48, num_splats=7)
        >>> config.window_size, config.num_splats
        (32, 7)
        """
        return cls(**{**preset(name), **options})

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = round_up(8 * self.hidden_size, 3 * 16) // 3
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Called by `@strict` once the types are right."""
        require_heads(self.hidden_size, num_attention_heads=self.num_attention_heads)
        tied = self.tied_positions and self.mixer == "splat"
        share_of_heads(self.num_attention_heads, self.num_key_value_heads, tied=tied)
        assert self.intermediate_size is not None, "filled in above"
        require_at_least(
            1,
            vocab_size=self.vocab_size,
            num_hidden_layers=self.num_hidden_layers,
            intermediate_size=self.intermediate_size,
            num_splats=self.num_splats,
            lag=self.lag,
        )
        require_at_least(0, window_size=self.window_size, conv_size=self.conv_size, position_bias=self.position_bias)
        require_one_of(MIXERS, mixer=self.mixer)
        require_one_of(GRAINS, decay=self.decay)
        for name in ("position_dim", "value_dim"):
            if getattr(self, name) is not None:
                require_at_least(1, **{name: getattr(self, name)})
        head_dim = self.hidden_size // self.num_attention_heads
        width = self.position_dim or head_dim
        require_routing(self.routing, self.num_splats, width, self.splat_top_p, "splat_top_p")
        require_hops(self.hops, self.num_super_splats, self.routing, self.num_splats)
        require_transform(self.transform, self.causal)
        if self.window_size or self.mixer == "softmax":
            require_even_positions(head_dim if self.mixer == "softmax" else self.position_dim or head_dim)
        if self.mixer != "splat":
            require_no_routing(self.mixer, token_bias=self.token_bias, position_bias=self.position_bias)
        if not self.causal:
            require_no_order(window_size=self.window_size, decay=self.decay)
        for name in ("norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number above 0")


def round_up(number: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple
