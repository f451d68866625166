"""Who is timed: splat attention by each backend, softmax attention, and the mixers of flash-linear-attention.

A contender is one row of `contenders()`. All take the same numbers, in the layout that each likes best.
"""

# B batch, T token, H head, D width of positions, values, queries and keys, K width of keys, M splat or slot

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from splatflow.diagnostics.speed import random_splats
from splatflow.ops import BACKENDS, Splats, splat_attention

from .cases import STORES, Case

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Tensors = tuple["Tensor", ...]

SLOTS = 32  # of gated slot attention, which keeps a key and a value in each: as much as 64 splats hold
DEFINITIONS = ("reference", "recurrent")  # backends that are there to be read, and timed on short sequences only
LONGEST_DEFINITION, LONGEST_STORED = 128, 2048


class Drawn:
    """One set of random inputs, made as they are asked for. Contenders that take the same share it."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.dtype = case, getattr(torch, case.dtype)
        self.generator = torch.Generator(case.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.case.device, dtype=dtype or self.dtype)

    @cached_property
    def qkv(self) -> tuple[Tensor, ...]:
        """Queries or receive positions, keys or send positions, and values, each [B, T, H, D]."""
        shape = (self.case.batch, self.case.seq_len, self.case.num_heads, self.case.head_dim)
        return tuple(self.normal(*shape) for _ in range(3))

    @cached_property
    def output_gradient(self) -> Float[Tensor, "B T H D"]:
        return self.normal(*self.qkv[2].shape)

    @cached_property
    def heads_first(self) -> tuple[Tensor, ...]:
        return tuple(part.transpose(1, 2).contiguous() for part in self.qkv)

    @cached_property
    def unit_keys(self) -> tuple[Tensor, ...]:
        """The same with queries and keys of length 1, without which a delta rule has no bound."""
        queries, keys, values = self.qkv
        return F.normalize(queries, dim=-1), F.normalize(keys, dim=-1), values

    def log_decay(self, *width: int) -> Tensor:
        """fp32, as the kernels want it: the running sums of a long sequence."""
        return F.logsigmoid(4 + self.normal(*self.qkv[0].shape[:3], *width, dtype=torch.float32))

    def splats(self, num_splats: int) -> Splats:
        drawn = random_splats(self.case.num_heads, num_splats, self.case.head_dim, torch.Generator().manual_seed(0))
        return Splats(*(part.to(self.case.device) for part in drawn[:3]))


class Contender(NamedTuple):
    """`function(*arguments(drawn, num_splats), causal=)` gives the output, as do all the others.

    `state` is how many numbers it remembers of a head after T tokens, given M, D and T; `power` how its work grows with
    the length; `supports(case)` is None, or why not. `heads_first`: its tensors are [B, H, T, D].
    """

    arguments: Callable[[Drawn, int], Tensors]
    function: Callable[..., Tensor]
    state: Callable[[int, int, int], int]
    supports: Callable[[Case], str | None]
    power: int = 1
    heads_first: bool = False
    backend: str | None = None


def contenders() -> dict[str, Contender]:
    """All, in the order in which tables show them."""
    return {**{splat_name(backend): splats(backend) for backend in backends()}, **PEERS}


def backends() -> list[str]:
    """Rows of `BACKENDS`, but for kernels under Triton's interpreter: it takes minutes, and tests of its own."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return [name for name in BACKENDS if not (name == "triton" and interpreted)]


def splat_name(backend: str) -> str:
    return f"splats ({backend})"


def splats(backend: str, decay: bool = False) -> Contender:
    def arguments(drawn: Drawn, num_splats: int) -> Tensors:
        forgotten = (drawn.log_decay(),) if decay else ()
        return (*drawn.qkv, *drawn.splats(num_splats)[:3], *forgotten)

    def function(queries: Tensor, keys: Tensor, values: Tensor, *rest: Tensor, causal: bool) -> Tensor:
        log_decay = rest[3] if decay else None
        of_splats = Splats(*rest[:3])
        options: dict[str, Any] = {"causal": causal, "log_decay": log_decay, "backend": backend}
        return splat_attention(keys, queries, values, of_splats, **options)[0]

    supports = partial(refusal, backend, decay)
    power = 2 if backend == "reference" else 1
    return Contender(arguments, function, lambda M, D, T: M * D + M, supports, power, backend=backend)


def refusal(backend: str, decay: bool, case: Case) -> str | None:
    """Why a backend cannot do this case, found out by asking it with two tokens."""
    if backend in DEFINITIONS and case.seq_len > LONGEST_DEFINITION:
        return f"it is a definition, timed up to {LONGEST_DEFINITION} tokens"
    if decay and not case.causal:
        return "a decay needs an order of tokens"
    row = splats(backend, decay)
    few = row.arguments(Drawn(case._replace(batch=1, seq_len=2), 0), case.num_splats)
    return reason_of_refusal(lambda: row.function(*few, causal=case.causal), backend)


def reason_of_refusal(call: Callable[[], object], backend: str) -> str | None:
    """None, or what the operator says when a backend cannot do what it was asked.

    Raises whatever else goes wrong.
    """
    try:
        call()
    except ValueError as error:
        prefix = f"backend {backend!r} cannot do this: "
        if not str(error).startswith(prefix):
            raise
        return str(error).removeprefix(prefix)
    return None


def _in_rows(drawn: Drawn, num_splats: int) -> Tensors:
    return drawn.qkv


def _in_heads(drawn: Drawn, num_splats: int) -> Tensors:
    return drawn.heads_first


def softmax(kernel: SDPBackend | None, *tensors: Tensor, causal: bool) -> Tensor:
    if kernel is None:
        return F.scaled_dot_product_attention(*tensors, is_causal=causal)
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(*tensors, is_causal=causal)


def stored_softmax(queries: Tensor, keys: Tensor, values: Tensor, *, causal: bool) -> Tensor:
    scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return scores.softmax(-1) @ values


def flash_attention_3(*tensors: Tensor, causal: bool) -> Tensor:
    output = import_module("flash_attn_interface").flash_attn_func(*tensors, causal=causal)
    return output[0] if isinstance(output, tuple) else output


def of_flash_linear_attention(module: str, name: str, *extras: str) -> Callable[..., Tensor]:
    """A kernel `fla.ops.<module>.<name>(queries, keys, values, <extras>)`, causal, without its final state."""

    def function(queries: Tensor, keys: Tensor, values: Tensor, *others: Tensor, causal: bool) -> Tensor:
        options: dict[str, Any] = {"scale": 1.0, **dict(zip(extras, others, strict=True))}
        if name == "chunk_linear_attn":
            options["normalize"] = False  # its quickest form
        return getattr(import_module(f"fla.ops.{module}"), name)(queries, keys, values, **options)[0]

    return function


def _always(case: Case) -> None:
    return None


def _on_cuda(case: Case) -> str | None:
    return None if case.device == "cuda" else "it needs a GPU"


def _with_flash_3(case: Case) -> str | None:
    return _on_cuda(case) or (None if find_spec("flash_attn_interface") else "flash_attn_interface is not installed")


def _with_peers(case: Case) -> str | None:
    if find_spec("fla") is None:
        return "flash-linear-attention is not installed"
    return _on_cuda(case) or (None if case.causal else "it has no form without a causal mask")


def _short(case: Case) -> str | None:
    return None if case.subject == "memory" or case.seq_len <= LONGEST_STORED else "it is meant for short sequences"


def _gated(name: str, draw: Callable[[Drawn], Tensors], state: Callable[[int, int, int], int] | None = None) -> Any:
    module, function, *extras = name.split()
    called = of_flash_linear_attention(module, function, *extras)
    return Contender(lambda drawn, M: draw(drawn), called, state or (lambda M, D, T: D * D), _with_peers)


def _growing(M: int, D: int, T: int) -> int:
    return 2 * T * D


PEERS: dict[str, Contender] = {
    "splats with decay": splats("auto", decay=True),
    "softmax (torch)": Contender(_in_heads, partial(softmax, None), _growing, _always, power=2, heads_first=True),
    "softmax (torch, flash)": Contender(
        _in_heads, partial(softmax, SDPBackend.FLASH_ATTENTION), _growing, _on_cuda, power=2, heads_first=True
    ),
    "softmax (torch, cuDNN)": Contender(
        _in_heads, partial(softmax, SDPBackend.CUDNN_ATTENTION), _growing, _on_cuda, power=2, heads_first=True
    ),
    "softmax (FlashAttention-3)": Contender(_in_rows, flash_attention_3, _growing, _with_flash_3, power=2),
    STORES: Contender(_in_heads, stored_softmax, _growing, _short, power=2, heads_first=True),
    # keys of the width D: with values of the same width their state is that of D splats
    "linear attention (fla)": _gated("linear_attn chunk_linear_attn", lambda drawn: drawn.qkv),
    "simple GLA (fla)": _gated("simple_gla chunk_simple_gla g", lambda drawn: (*drawn.qkv, drawn.log_decay())),
    "GLA (fla)": _gated("gla chunk_gla g", lambda drawn: (*drawn.qkv, drawn.log_decay(drawn.case.head_dim))),
    "GSA (fla)": _gated(
        "gsa chunk_gsa s g",
        lambda drawn: (*drawn.qkv, *shares_and_decays(drawn)),
        lambda M, D, T: 2 * SLOTS * D,
    ),
    "gated delta rule (fla)": _gated(
        "gated_delta_rule chunk_gated_delta_rule g beta",
        lambda drawn: (*drawn.unit_keys, drawn.log_decay(), drawn.normal(*drawn.qkv[0].shape[:3]).sigmoid()),
    ),
}


def shares_and_decays(drawn: Drawn) -> Tensors:
    """What each token writes into each slot, and how much the slot forgets of itself for that."""
    log_decay = drawn.log_decay(SLOTS)
    return (1 - log_decay.exp()).to(drawn.dtype), log_decay


def names(num_splats: tuple[int, ...], causal: bool) -> Iterator[tuple[str, int]]:
    """Who takes part, with which numbers of splats."""
    for name, row in contenders().items():
        if row.backend is None:
            yield name, 0
        elif row.backend in DEFINITIONS:
            yield name, num_splats[0]
        elif row.backend == "auto":
            yield name, num_splats[len(num_splats) // 2]
        else:
            yield from ((name, count) for count in num_splats)
