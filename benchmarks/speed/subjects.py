"""What a figure is of: the operator, its memory, the decoding of a token, a training step, a model that generates."""

# B batch, T token, S token of a context, H head, D width of a head, M splat, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from splatflow.ops import SplatState, splat_attention
from splatflow.presets import preset

from .cases import BOTH, Case, Scale
from .clock import Call
from .contenders import Drawn, contenders, names

if TYPE_CHECKING:
    from torch import Tensor

MOST_INPUT_BYTES = 2**30  # of all sets of inputs; a set that is larger than that is in no cache anyway
SETS = 3  # of inputs, that are taken in turn
TENSORS_MOVED = {"forward": 4, BOTH: 11}  # reads q k v and writes o; then reads q k v and do, and writes dq dk dv
SPLATS, KV_CACHE = "splats (auto)", "KV cache, softmax (torch)"
SPLAT_MODEL, HYBRID_MODEL, SOFTMAX_MODEL = "splat model", "splat model with a window", "softmax twin"


class Subject(NamedTuple):
    """`begin(case, scale, seed)` makes what a group shares, `call(shared, case)` the call that is measured.

    `least_bytes(case)` have to be moved by any way to do it; `tokens(case)` are worked on in a call.
    """

    names: Callable[[tuple[int, ...], bool], Iterator[tuple[str, int]]]
    begin: Callable[[Case, Scale, int], Any]
    call: Callable[[Any, Case], Call]
    least_bytes: Callable[[Case], int] | None
    tokens: Callable[[Case], int]
    timed: bool = True


def item_size(case: Case) -> int:
    return getattr(torch, case.dtype).itemsize


def bytes_of_operator(case: Case) -> int:
    numbers = case.batch * case.seq_len * case.num_heads * case.head_dim
    return TENSORS_MOVED[case.passes] * numbers * item_size(case)


def sets_of_inputs(case: Case, scale: Scale, seed: int) -> list[Drawn]:
    of_one = 4 * case.batch * case.seq_len * case.num_heads * case.head_dim * item_size(case)
    return [Drawn(case, seed + number) for number in range(max(1, min(SETS, MOST_INPUT_BYTES // of_one)))]


def operator_call(sets: list[Drawn], case: Case) -> Call:
    row = contenders()[case.what]
    given = [row.arguments(drawn, case.num_splats) for drawn in sets]
    if case.passes != BOTH:

        def forward(number: int) -> None:
            with torch.no_grad():
                row.function(*given[number % len(given)], causal=case.causal)

        return forward

    leaves = [[part.detach().requires_grad_() for part in parts] for parts in given]
    gradients = [
        drawn.output_gradient.transpose(1, 2).contiguous() if row.heads_first else drawn.output_gradient
        for drawn in sets
    ]

    def forward_and_backward(number: int) -> None:
        index = number % len(leaves)
        output = row.function(*leaves[index], causal=case.causal)
        torch.autograd.grad(output, leaves[index], gradients[index])

    return forward_and_backward


def decoders(num_splats: tuple[int, ...], causal: bool) -> Iterator[tuple[str, int]]:
    yield from ((SPLATS, count) for count in num_splats)
    yield KV_CACHE, 0


def remembered_numbers(case: Case) -> int:
    """Of all sequences and heads."""
    numbers = case.num_splats * (case.head_dim + 1) if case.num_splats else 2 * case.seq_len * case.head_dim
    return case.batch * case.num_heads * numbers


def bytes_of_decode(case: Case) -> int:
    """A cache is read; the splats, fp32, are read and written."""
    return remembered_numbers(case) * (2 * 4 if case.num_splats else item_size(case))


def decode_call(sets: list[Drawn], case: Case) -> Call:
    """A token that comes after `seq_len` others. The cache is full already: nothing is copied to make it longer."""
    drawn = sets[0]
    shape = (case.batch, case.num_heads, case.head_dim)
    tokens = [drawn.normal(3, *shape) for _ in range(SETS)]
    if case.what == KV_CACHE:
        keys, values = (drawn.normal(*shape[:2], case.seq_len, case.head_dim) for _ in range(2))

        def attend(number: int) -> None:
            with torch.no_grad():
                F.scaled_dot_product_attention(tokens[number % SETS][0][:, :, None], keys, values)

        return attend

    splats = drawn.splats(case.num_splats)
    mass = drawn.normal(*shape[:2], case.num_splats, dtype=torch.float32).exp() * case.seq_len / case.num_splats
    state = SplatState(mass, drawn.normal(*shape[:2], case.num_splats, case.head_dim, dtype=torch.float32))

    def mix(number: int) -> None:
        with torch.no_grad():
            splat_attention(*tokens[number % SETS][:, :, None], splats, state=state)

    return mix


def one_set(case: Case, scale: Scale, seed: int) -> list[Drawn]:
    return [Drawn(case, seed)]


def models(num_splats: tuple[int, ...], causal: bool) -> Iterator[tuple[str, int]]:
    yield from ((SPLAT_MODEL, 0), (SOFTMAX_MODEL, 0))


def generators(num_splats: tuple[int, ...], causal: bool) -> Iterator[tuple[str, int]]:
    yield from ((SPLAT_MODEL, 0), (HYBRID_MODEL, 0), (SOFTMAX_MODEL, 0))


class Models:
    """The models of a scale, each built when it is asked for; that with a window has what its preset says."""

    def __init__(self, case: Case, scale: Scale, seed: int) -> None:
        self.settings, self.device, self.dtype, self.seed = scale.model, case.device, scale.dtype, seed
        self.network = cache(self.build)

    def build(self, what: str) -> Any:
        from splatflow.models import SplatFlowConfig, SplatFlowForCausalLM

        torch.manual_seed(self.seed)
        settings = {**self.settings, **(preset("hybrid") if what == HYBRID_MODEL else {})}
        config = SplatFlowConfig(mixer="softmax" if what == SOFTMAX_MODEL else "splat", **settings)
        return SplatFlowForCausalLM(config).to(self.device, self.dtype)

    def tokens(self, batch: int, length: int) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(self.seed)
        return [
            torch.randint(256, (batch, length), generator=generator, device=self.device, dtype=torch.long)
            for _ in range(SETS)
        ]


def training_call(shared: Models, case: Case) -> Call:
    """A step of AdamW on `batch` texts of `seq_len` bytes."""
    network, texts = shared.network(case.what).train(), shared.tokens(case.batch, case.seq_len)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step(number: int) -> None:
        text = texts[number % SETS]
        network(text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def generation_call(shared: Models, case: Case) -> Call:
    """One more byte of `batch` texts that have `seq_len` each. The twin's cache is filled with random numbers."""
    from splatflow.models import SplatFlowCache
    from splatflow.nn.softmax_attention import SoftmaxAttentionState

    network, tokens = shared.network(case.what).eval(), shared.tokens(case.batch, 1)
    num_layers, few = shared.settings["num_hidden_layers"], 8

    def filled(state: Any) -> Any:
        if not isinstance(state, SoftmaxAttentionState):
            return state  # of the same size after any number of tokens
        shape = (case.batch, case.seq_len, case.num_heads, case.head_dim)
        keys, values = (torch.randn(shape, device=case.device).to(shared.dtype) for _ in range(2))
        return state._replace(keys=keys, values=values, real=torch.ones_like(keys[..., 0, 0], dtype=torch.bool))

    with torch.no_grad():
        first = network(shared.tokens(case.batch, few)[0], use_cache=True).past_key_values
    states = [filled(state) for state in first.states]

    def decode(number: int) -> None:
        remembered = SplatFlowCache(num_layers)
        remembered.advance(states, case.seq_len)
        with torch.no_grad():
            network(tokens[number % SETS], past_key_values=remembered, use_cache=True)

    return decode


def tokens_of(case: Case) -> int:
    return case.batch * case.seq_len


def one_each(case: Case) -> int:
    return case.batch


SUBJECTS: dict[str, Subject] = {
    "operator": Subject(names, sets_of_inputs, operator_call, bytes_of_operator, tokens_of),
    "memory": Subject(names, one_set, operator_call, bytes_of_operator, tokens_of, timed=False),
    "decode": Subject(decoders, one_set, decode_call, bytes_of_decode, one_each),
    "training": Subject(models, Models, training_call, None, tokens_of),
    "generation": Subject(generators, Models, generation_call, None, one_each),
}


def power_of(case: Case) -> int:
    """How the work of a case grows with its length."""
    if case.subject in ("operator", "memory"):
        return contenders()[case.what].power
    return 2 if (case.subject, case.what) == ("training", SOFTMAX_MODEL) else 1


def state_of(case: Case) -> int | None:
    """Numbers remembered of one sequence in one head; None for whole models."""
    if case.subject in ("operator", "memory"):
        return contenders()[case.what].state(case.num_splats or case.head_dim, case.head_dim, case.seq_len)
    return remembered_numbers(case) // (case.batch * case.num_heads) if case.subject == "decode" else None
