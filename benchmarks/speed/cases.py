"""What is measured, and in which order: sizes for each kind of machine, the most important cases first."""

# B batch, T token, S token of a context, H head, D width of positions and values in a head, M splat

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

FORWARD, BOTH = "forward", "forward and backward"


class Case(NamedTuple):
    """One figure of the ledger. `seq_len` is the length of a sequence, or of the context of a token that is decoded."""

    subject: str
    what: str
    num_splats: int
    causal: bool
    passes: str
    batch: int
    seq_len: int
    num_heads: int
    head_dim: int
    device: str
    dtype: str


class Scale(NamedTuple):
    """How much a machine is asked for.

    `sizes`, `contexts`, `trainings` and `generations` hold pairs of a batch and a length; the first two `sizes` are the
    most important. `stored` are lengths at which attention that stores its matrix is compared in memory with splats at
    ten times the length. A call that is expected to take more than `limit` seconds is not made; `seconds` are spent on
    the rounds of a group.
    """

    dtype: torch.dtype
    num_heads: int
    head_dim: int
    num_splats: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    stored: tuple[int, ...]
    contexts: tuple[tuple[int, int], ...]
    model: Mapping[str, int]
    trainings: tuple[tuple[int, int], ...]
    generations: tuple[tuple[int, int], ...]
    limit: float
    seconds: float
    flushed: int  # bytes written between two calls, so that the next begins with cold caches


def of_tokens(tokens: int, *lengths: int) -> tuple[tuple[int, int], ...]:
    """
    >>> of_tokens(1024, 128, 2048)
    ((8, 128), (1, 2048))
    """
    return tuple((max(1, tokens // length), length) for length in lengths)


SMALL_MODEL = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_splats": 32}
LARGER_MODEL = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "num_splats": 64}
TINY_MODEL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_splats": 7}

SCALES = {
    "cpu": Scale(
        dtype=torch.float32,
        num_heads=8,
        head_dim=64,
        num_splats=(16, 32, 64, 128),
        sizes=of_tokens(16_384, 16_384, 8192, 65_536, 1024, 128, 4096, 131_072),
        stored=(1024, 4096),
        contexts=tuple((1, length) for length in (1024, 16_384, 262_144, 4096, 65_536, 1_048_576)),
        model=SMALL_MODEL,
        trainings=of_tokens(16_384, 1024, 16_384, 4096, 65_536, 131_072),
        generations=tuple((1, length) for length in (1024, 16_384, 131_072, 4096, 65_536)),
        limit=8.0,
        seconds=3.0,
        flushed=64 * 2**20,
    ),
    "cuda": Scale(
        dtype=torch.bfloat16,
        num_heads=8,
        head_dim=64,
        num_splats=(16, 32, 64, 128),
        sizes=of_tokens(2**20, 8192, 2**20, 131_072, 1024, 32_768, 128, 2**18, 2048, 512, 2**19),
        stored=(4096, 16_384),
        contexts=tuple((8, length) for length in (1024, 2**20, 65_536, 2**18, 16_384, 4096)),
        model=LARGER_MODEL,
        trainings=of_tokens(65_536, 4096, 131_072, 32_768, 1024),
        generations=tuple((8, length) for length in (1024, 131_072, 32_768, 4096)),
        limit=4.0,
        seconds=1.5,
        flushed=256 * 2**20,
    ),
    # a dry run: everything once, as small as it goes
    "tiny": Scale(
        dtype=torch.float32,
        num_heads=2,
        head_dim=16,
        num_splats=(16,),
        sizes=((3, 37), (2, 67)),
        stored=(13,),
        contexts=((2, 101),),
        model=TINY_MODEL,
        trainings=((2, 37),),
        generations=((2, 41),),
        limit=2.0,
        seconds=0.05,
        flushed=2**20,
    ),
}

# (subject, causal) -> who takes part, with how many splats
Names = Callable[[str, bool], Iterator[tuple[str, int]]]


def groups(scale: Scale, device: str, names: Names) -> list[list[Case]]:
    """Cases that are measured in turn, group by group, the most important first."""
    first = [("operator", causal, passes, size) for size in scale.sizes[:2] for causal, passes in KINDS[:-1]]
    others = [("operator", causal, passes, size) for size in scale.sizes[2:] for causal, passes in KINDS[:-1]]
    last = [("operator", *KINDS[-1], size) for size in scale.sizes]
    lengths = [length for stored in scale.stored for length in (stored, LONGER * stored)]
    memory = [("memory", True, BOTH, (1, length)) for length in lengths]
    decode = [("decode", True, FORWARD, size) for size in scale.contexts]
    training = [("training", True, BOTH, size) for size in scale.trainings]
    generation = [("generation", True, FORWARD, size) for size in scale.generations]
    ordered = [*first, *memory, *decode, *training[:2], *generation, *others, *training[2:], *last]
    made = []
    for subject, causal, passes, (batch, length) in ordered:
        rest = (
            causal,
            passes,
            batch,
            length,
            *shape_of(subject, scale),
            device,
            str(scale.dtype).removeprefix("torch."),
        )
        of_group = [Case(subject, what, num_splats, *rest) for what, num_splats in names(subject, causal)]
        made.append([case for case in of_group if takes_part(case, scale)])
    return [group for group in made if group]


# causal, passes; the last is the least important
KINDS = ((False, FORWARD), (True, BOTH), (True, FORWARD), (False, BOTH))
LONGER = 10  # times, which splats are said to reach in the memory of attention that stores its matrix
STORES = "softmax that stores its matrix"


def shape_of(subject: str, scale: Scale) -> tuple[int, int]:
    """Heads, and their width."""
    if subject not in ("training", "generation"):
        return scale.num_heads, scale.head_dim
    num_heads = scale.model["num_attention_heads"]
    return num_heads, scale.model["hidden_size"] // num_heads


def takes_part(case: Case, scale: Scale) -> bool:
    """In memory, attention that stores its matrix is compared with what splats need at ten times the length."""
    return case.subject != "memory" or (case.what == STORES) == (case.seq_len in scale.stored)


def label(case: Case) -> str:
    """
    >>> label(Case("decode", "splats (auto)", 16, True, FORWARD, 1, 128, 2, 64, "cpu", "float32"))
    'splats (auto), M = 16'
    """
    return f"{case.what}, M = {case.num_splats}" if case.num_splats else case.what


def size_of(case: Case) -> str:
    return f"{case.batch:,} x {case.seq_len:,}"


def kind_of(case: Case) -> tuple[Any, ...]:
    """What two cases share that differ in size alone."""
    return case._replace(batch=0, seq_len=0)
