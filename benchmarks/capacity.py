"""How many pairs do fixed centers keep apart? `python -m benchmarks.capacity --record benchmarks/results/<file>.json`

Nothing is trained. N pairs of a position and a value are stored by `splat_attention`, and one key is asked again. A
pair is *alone* if a head gives back exactly its value; it is *nearest* if, of the N values, its own correlates most
with what all heads give back. One pair is asked of each filling, so that the counts are binomial.
"""

# B filling, N pair, H head, M splat, P position width, D value width

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from splatflow.diagnostics import write_record
from splatflow.ops import Splats, SplatState, log_affinity, splat_attention

SHARP = 1e-5  # a scale so small that every token belongs to one splat, in fp64
BLOCK = 250  # fillings at once
NARROW = 4  # dimensions in which random centers have cells of very unequal size
VOCABULARY = 256  # values there are in all, those that were not stored included


def chance_alone(num_splats: int, num_heads: int, num_pairs: int) -> float:
    """Chance that a pair is alone in its splat in some head, if all splats are equally likely.

    >>> chance_alone(2, 1, 2)
    0.5
    """
    return 1 - (1 - (1 - 1 / num_splats) ** (num_pairs - 1)) ** num_heads


def chance_alone_in_cells(shares: Tensor, num_pairs: int) -> float:
    """The same for splats that attract the shares [H, M] of all tokens.

    >>> chance_alone_in_cells(torch.tensor([[0.5, 0.5]]), 2)
    0.5
    """
    alone = (shares * (1 - shares) ** (num_pairs - 1)).sum(-1)  # [H]
    return 1 - (1 - alone).prod().item()


def binomial_interval(chance: float, trials: int, level: float = 0.999) -> tuple[float, float]:
    """Smallest and largest share of successes that a two-sided exact test at this level does not reject."""
    counts = torch.arange(trials + 1, dtype=torch.float64)
    every = torch.tensor(trials, dtype=torch.float64)
    ways = torch.lgamma(every + 1) - torch.lgamma(counts + 1) - torch.lgamma(every - counts + 1)
    chance_of = torch.tensor(chance, dtype=torch.float64)
    masses = (ways + torch.xlogy(counts, chance_of) + torch.xlogy(every - counts, 1 - chance_of)).exp()
    tail = (1 - level) / 2
    kept = counts[(masses.cumsum(0) > tail) & (masses.flip(0).cumsum(0).flip(0) > tail)]
    return kept.min().item() / trials, kept.max().item() / trials


def pairs_by_bits(num_numbers: int, bits_per_number: int, vocab_size: int) -> int:
    """The most values out of a vocabulary that so many numbers can tell apart.

    >>> pairs_by_bits(2, 32, 256)
    8
    """
    return int(num_numbers * bits_per_number / math.log2(vocab_size))


def on_sphere(generator: torch.Generator, *shape: int) -> Tensor:
    """Random directions of length sqrt(P), as a layer's positions are."""
    return F.rms_norm(torch.randn(shape, generator=generator, dtype=torch.float64), shape[-1:])


def rotation(generator: torch.Generator, width: int) -> Tensor:
    """A random orthogonal matrix: a QR factor with the signs that make it uniform."""
    directions, triangle = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return directions * triangle.diagonal().sign()


def axes(generator: torch.Generator, num_heads: int, num_splats: int) -> Tensor:
    """Centers [H, M, M/2] at both ends of the axes, turned at random in each head: on the sphere, equally likely."""
    width = num_splats // 2
    ends = math.sqrt(width) * torch.eye(width, dtype=torch.float64)
    return torch.stack([torch.cat([ends, -ends]) @ rotation(generator, width) for _ in range(num_heads)])


def gaussians(centers: Tensor, scale: float) -> Splats:
    """Splats of one scale and no preference."""
    flat = torch.zeros(centers.shape[:2], dtype=centers.dtype)
    return Splats(centers, flat + math.log(scale), flat)


def layer_scale(width: int) -> float:
    """The scale that a layer starts with: sigma^2 = sqrt(P) / 2."""
    return math.sqrt(math.sqrt(width) / 2)


def store_and_ask(positions: Tensor, values: Tensor, splats: Splats) -> tuple[Tensor, SplatState]:
    """All pairs are stored, then the first key of each filling is read: ([B, H, D], what the splats hold)."""
    output, state = splat_attention(positions, positions[:, :1], values, splats, causal=False)
    return output[:, 0], state


def is_alone(heard: Tensor, values: Tensor) -> Tensor:
    """[B], whether a head gave back exactly the first value."""
    return ((heard - values[:, 0]).abs().amax(-1) < 1e-9).any(-1)


def is_nearest(heard: Tensor, values: Tensor, others: Tensor | None = None) -> Tensor:
    """[B], whether of all values, and of others [K, H, D], the first correlates most with what was heard.

    Values have one length and are white, so the linear map of least squares from what was heard to the value is the
    identity, but for a factor a head.
    """
    closeness = torch.einsum("BHD,BNHD->BN", heard, values)
    if others is not None:
        closeness = torch.cat([closeness, torch.einsum("BHD,KHD->BK", heard, others)], -1)
    return closeness.argmax(-1) == 0


def ask_knowing_all_keys(positions: Tensor, values: Tensor, splats: Splats) -> Tensor:
    """[B, H, D], the best linear reading of each head's contents: least squares over the weights of its M splats."""
    batch, num_pairs, num_heads, _ = values.shape
    _, state = store_and_ask(positions, values, splats)
    whose = torch.eye(num_pairs, dtype=values.dtype)[None, :, None].expand(batch, -1, num_heads, -1)
    _, parts = store_and_ask(positions, whose, splats)  # total [B, H, M, N]: how much of each pair a splat holds
    gram = parts.total @ parts.total.mT
    tiny = 1e-12 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]  # keeps the matrix invertible
    weights = torch.linalg.solve(gram + tiny * torch.eye(gram.shape[-1], dtype=gram.dtype), parts.total[..., :1])
    return (weights.mT @ state.total).squeeze(-2)


Filling = tuple[Tensor, Tensor]  # positions [B, N, H, P] and values [B, N, H, D]


def share(right: Callable[[Filling], Tensor], fill: Callable[[int], Filling], fillings: int) -> float:
    """Share of fillings, drawn block by block, whose first pair is read right."""
    blocks = [min(BLOCK, fillings - first) for first in range(0, fillings, BLOCK)]
    return sum(int(right(fill(block)).sum()) for block in blocks) / fillings


def filler(
    seed: int, num_pairs: int, num_heads: int, position_dim: int, value_dim: int, *, one_position: bool = False
) -> Callable[[int], Filling]:
    """Draws fillings. The heads of a token lie at independent places or, if asked, all at one."""
    generator = torch.Generator().manual_seed(seed)

    def fill(batch: int) -> Filling:
        heads = 1 if one_position else num_heads
        positions = on_sphere(generator, batch, num_pairs, heads, position_dim).expand(-1, -1, num_heads, -1)
        return positions, on_sphere(generator, batch, num_pairs, num_heads, value_dim)

    return fill


def cell_shares(centers: Tensor, seed: int, samples: int = 200_000) -> Tensor:
    """[H, M], the share of the sphere that is nearest to each center, by counting random positions."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_splats, width = centers.shape
    counts = torch.zeros(num_heads, num_splats, dtype=torch.float64)
    for _ in range(samples // 5000):
        positions = on_sphere(generator, 1, 5000, 1, width).expand(-1, -1, num_heads, -1)
        nearest = log_affinity(positions, gaussians(centers, 1.0)).argmax(-1)[0]  # [5000, H]
        counts += F.one_hot(nearest, num_splats).sum(0)
    return counts / counts.sum(-1, keepdim=True)


def share_alone(fill: Callable[[int], Filling], centers: Tensor, fillings: int) -> float:
    """Share of pairs that are alone in their splat in some head, with one-hot routing."""
    splats = gaussians(centers, SHARP)
    return share(lambda filling: is_alone(store_and_ask(*filling, splats)[0], filling[1]), fill, fillings)


def measure(num_splats: int, num_heads: int, num_pairs: int, *, width: int, fillings: int, seed: int) -> dict:
    """One row: the formula, and what the operator does in its place."""
    generator = torch.Generator().manual_seed(seed)
    equal = axes(generator, num_heads, num_splats)
    narrow, wide = (on_sphere(generator, num_heads, num_splats, size) for size in (NARROW, width))
    others = on_sphere(generator, max(0, VOCABULARY - num_pairs), num_heads, width)
    sharp, soft = gaussians(wide, SHARP), gaussians(wide, layer_scale(width))

    def alone(centers: Tensor, one_position: bool = False) -> float:
        fill = filler(seed + 1, num_pairs, num_heads, centers.shape[-1], width, one_position=one_position)
        return share_alone(fill, centers, fillings)

    def exact(centers: Tensor) -> float:
        return chance_alone_in_cells(cell_shares(centers, seed), num_pairs)

    def heard(positions: Tensor, values: Tensor, splats: Splats) -> Tensor:
        return store_and_ask(positions, values, splats)[0]

    def nearest(read: Callable[..., Tensor], splats: Splats, others: Tensor | None = None) -> float:
        fill = filler(seed + 1, num_pairs, num_heads, width, width)
        return share(lambda filling: is_nearest(read(*filling, splats), filling[1], others), fill, fillings)

    formula = chance_alone(num_splats, num_heads, num_pairs)
    low, high = binomial_interval(formula, fillings)
    numbers = num_heads * num_splats * (width + 1)
    return {
        "splats": num_splats,
        "heads": num_heads,
        "pairs": num_pairs,
        "formula": formula,
        "low": low,
        "high": high,
        "equal cells": alone(equal),
        "equal cells, one position for all heads": alone(equal, one_position=True),
        "random centers": alone(wide),
        "random centers, exact": exact(wide),
        f"random centers, P = {NARROW}": alone(narrow),
        f"random centers, P = {NARROW}, exact": exact(narrow),
        "nearest of N, one-hot": nearest(heard, sharp),
        "nearest of N, soft": nearest(heard, soft),
        "nearest of N, soft, all keys known": nearest(ask_knowing_all_keys, soft),
        f"nearest of {VOCABULARY}, one-hot": nearest(heard, sharp, others),
        f"nearest of {VOCABULARY}, soft": nearest(heard, soft, others),
        f"nearest of {VOCABULARY}, soft, all keys known": nearest(ask_knowing_all_keys, soft, others),
        "state numbers": numbers,
        f"pairs by bits, fp32, vocabulary {VOCABULARY}": pairs_by_bits(numbers, 32, VOCABULARY),
        "pairs by bits, fp32, vocabulary 50,000": pairs_by_bits(numbers, 32, 50_000),
    }


@dataclass(frozen=True)
class Options:
    """`width` is that of values, and of positions where centers are random; the axes have M / 2 dimensions."""

    splats: tuple[int, ...] = (16, 64)
    heads: tuple[int, ...] = (1, 2, 4)
    pairs: tuple[int, ...] = (4, 8, 16, 32, 64)
    width: int = 32
    fillings: int = 12_000
    seed: int = 0
    record: str | None = None


def main(options: Options) -> None:
    torch.set_num_threads(1)
    rows, seeds = [], []
    for num_splats, num_heads, num_pairs in itertools.product(options.splats, options.heads, options.pairs):
        seeds.append(options.seed + 1000 * len(rows))  # rows share no chance
        start = time.perf_counter()
        row = measure(num_splats, num_heads, num_pairs, width=options.width, fillings=options.fillings, seed=seeds[-1])
        rows.append(row)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
        print(f"{shown} ({time.perf_counter() - start:.1f} s)", flush=True)
    if options.record is not None:
        notes = (
            f"Nothing is trained. {options.fillings} fillings a row, one pair asked of each; low and high bound the "
            "share that the formula admits at 99.9 %. Random centers are one draw a row; their exact chance uses cell "
            "sizes counted on 200,000 positions."
        )
        command = f"python -m benchmarks.capacity  # {options}"
        write_record(options.record, command=command, rows=rows, seeds=seeds, notes=notes)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
