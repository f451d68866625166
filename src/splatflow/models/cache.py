"""What a model remembers between calls, and how `generate()` gets hold of it.

This is the one file that knows the cache internals of `transformers`. The library thinks of a cache as keys and values
that grow with the text. Here it is whatever state each layer's mixer returned, held as it is: the splats' state has
the same size after ten tokens and after a million.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import Cache, GenerationConfig, GenerationMixin

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


class SplatFlowCache(Cache):
    """One mixer state per layer, and the number of tokens they have seen.

    A state is a nested tuple of tensors whose first axis is the batch, or None before the first token. A model that is
    given a cache updates it in place; use `copy.deepcopy` to continue one text in two ways. `num_real_tokens`, how many
    tokens of each sequence were no padding, is counted by models that look up places in a text, and else None.

    >>> cache = SplatFlowCache(num_layers=2)
    >>> cache.get_seq_length(), cache.nbytes
    (0, 0)
    """

    def __init__(self, num_layers: int) -> None:
        # The library's own layers hold keys and values, so there are none.
        super().__init__(layers=[])
        self.states: list[Any] = [None] * num_layers
        self.num_tokens = 0
        self.num_real_tokens: Int[Tensor, " B"] | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_layers={len(self)}, num_tokens={self.num_tokens}, nbytes={self.nbytes})"

    def advance(
        self, states: Sequence[Any], num_new_tokens: int, num_real_tokens: Int[Tensor, " B"] | None = None
    ) -> None:
        """Replace the state of every layer, and the count if there is one, by those after `num_new_tokens` more."""
        self.states, self.num_real_tokens = list(states), num_real_tokens
        self.num_tokens += num_new_tokens

    def tensors(self) -> list[Tensor]:
        leaves = tree_leaves((self.states, self.num_real_tokens))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the cache keeps alive: a view counts with the whole of what it looks into."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in self.tensors()}
        return sum(storage.nbytes() for storage in storages.values())

    @property
    def batch_size(self) -> int:
        """Number of sequences, or -1 before the first token."""
        return next((tensor.shape[0] for tensor in self.tensors()), -1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens seen, padding included."""
        return self.num_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1, the library's sign for "no limit"."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of a mask over everything seen and `query_length` new tokens."""
        return self.num_tokens + query_length, 0

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: raises `NotImplementedError`."""
        raise NotImplementedError(
            f"crop({tokens_to_remove}) on a cache of {self.num_tokens} tokens: a state cannot forget its last tokens; "
            "keep a copy.deepcopy of the cache from before them"
        )

    def reset(self) -> None:
        """Back to the start of a sequence."""
        self.states = [None] * len(self)
        self.num_tokens, self.num_real_tokens = 0, None

    def reorder_cache(self, beam_idx: Int[Tensor, " beams"]) -> None:
        """Let sequence i go on from what was sequence `beam_idx[i]`."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences that `indices`, integers or booleans, selects."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times, copies side by side."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        remembered = (self.states, self.num_real_tokens)
        self.states, self.num_real_tokens = tree_map_only(torch.Tensor, function, remembered)


class StatefulGenerationMixin(GenerationMixin):
    """`GenerationMixin` for models whose memory is a `SplatFlowCache`."""

    # The library then refuses assisted generation, which has to take tokens back.
    _is_stateful = True

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        cache = model_kwargs.get("past_key_values")
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}, expected None: "
                "the size and the place of the state follow from the model"
            )
        if cache is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = SplatFlowCache(self.config.num_hidden_layers)
        elif cache is not None and cache.get_seq_length() and generation_config.prefill_chunk_size:
            # The library would feed the tokens that the cache has seen a second time.
            raise ValueError(
                f"prefill_chunk_size is {generation_config.prefill_chunk_size}, expected None with a cache that "
                f"already holds {cache.get_seq_length()} tokens"
            )
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
