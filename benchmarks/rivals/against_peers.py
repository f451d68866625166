"""Are the rivals what their authors mean? Every operator of ours beside flash-linear-attention's own, to 1e-5.

To be run in an environment of its own, for beside flash-linear-attention transformers loses its plain gated delta net:

    python -m venv peers && peers/bin/pip install -c constraints.txt torch transformers numpy tqdm
    peers/bin/pip install --no-deps flash-linear-attention fla-core einops triton
    PYTHONPATH=src:. peers/bin/python -m benchmarks.rivals.against_peers [RECORD]

On a CPU only the peers' naive functions run; `benchmarks.rivals.kernels` calls their kernels with the same arguments.
With a path, the greatest error of each is written there.
"""

# B batch, T token, H head, P key width, D value width, M slot

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version

import torch
import torch.nn.functional as F
from fla.ops.abc.naive import naive_cumsum_abc
from fla.ops.based.naive import naive_parallel_based
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.gsa.naive import naive_recurrent_gsa
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

from splatflow.diagnostics import write_record

from . import operators

B, H, P, D, M = 2, 3, 8, 16, 5
LENGTHS = (1, 7, 32, 33, 130)
TOLERANCE = 1e-5


def heads_first(function: Callable, *tensors: torch.Tensor, **options: object) -> torch.Tensor:
    """A peer that wants [B, H, T, X]."""
    output = function(*(part.transpose(1, 2) for part in tensors), **options)
    return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)


def abc(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Our slots, given what an ABC layer makes of its slot logits."""
    running = logits.logcumsumexp(1)
    log_decay = torch.cat([running[:, :1], running[:, :-1]], 1) - running
    return operators.slot_attention(queries, keys, values, (logits - running).exp(), log_decay)


# name -> (ours, the peer's, what they take besides queries, keys and values)
COMPARISONS: dict[str, tuple[Callable, Callable, tuple[str, ...]]] = {
    "linear attention": (
        operators.linear_attention,
        lambda q, k, v: naive_recurrent_linear_attn(F.elu(q) + 1, F.elu(k) + 1, v, scale=1.0, normalize=True)[0],
        (),
    ),
    "Based": (operators.based, lambda *qkv: heads_first(naive_parallel_based, *qkv, scale=1.0), ()),
    "Mamba-2, simple GLA": (
        lambda q, k, v, g: operators.gated_linear_attention(q, k, v, g[..., None]),
        lambda q, k, v, g: naive_recurrent_simple_gla(q, k, v, g=g, scale=1.0)[0],
        ("decay",),
    ),
    "GLA": (
        operators.gated_linear_attention,
        lambda q, k, v, g: naive_recurrent_gla(q * P**0.5, k, v, g)[0],  # it divides by sqrt(P)
        ("decay of keys",),
    ),
    "gated delta net": (
        operators.gated_delta_rule,
        lambda q, k, v, g, b: naive_recurrent_gated_delta_rule(q, k, v, b, g, scale=1.0)[0],
        ("decay", "share"),
    ),
    "ABC": (abc, lambda *qkvs: heads_first(lambda q, *r: naive_cumsum_abc(q * P**0.5, *r), *qkvs), ("logits",)),
    "Gated Slot Attention, Raven": (
        operators.slot_attention,
        lambda q, k, v, w, g: naive_recurrent_gsa(q, k, v, w, g, scale=1.0)[0],
        ("share of slots", "decay of slots"),
    ),
}


def drawn(extras: tuple[str, ...], length: int) -> list[torch.Tensor]:
    def normal(*width: int) -> torch.Tensor:
        return torch.randn(B, length, H, *width)

    kinds: dict[str, Callable[[], torch.Tensor]] = {
        "decay": lambda: F.logsigmoid(normal()),
        "decay of keys": lambda: F.logsigmoid(normal(P)),
        "decay of slots": lambda: F.logsigmoid(normal(M)),
        "share": lambda: normal().sigmoid(),
        "share of slots": lambda: normal(M).sigmoid(),
        "logits": lambda: normal(M),
    }
    queries, keys = (F.normalize(normal(P), dim=-1) for _ in range(2))
    return [part.requires_grad_() for part in (queries, keys, normal(D), *(kinds[extra]() for extra in extras))]


def with_gradients(function: Callable, tensors: list[torch.Tensor], weights: torch.Tensor) -> list[torch.Tensor]:
    output = function(*tensors)
    gradients = torch.autograd.grad((output * weights).sum(), tensors, materialize_grads=True, allow_unused=True)
    return [output, *gradients]


def greatest_error(ours: Callable, theirs: Callable, extras: tuple[str, ...]) -> float:
    """Of the output and all gradients, relative to the largest number of each."""
    errors = []
    for seed, length in enumerate(LENGTHS):
        torch.manual_seed(seed)
        tensors, weights = drawn(extras, length), torch.randn(B, length, H, D)
        pairs = zip(with_gradients(ours, tensors, weights), with_gradients(theirs, tensors, weights), strict=True)
        # where all is 0 but for rounding, as gradients of a sequence of one token are, 1 is the size of things
        errors += [((mine - other).abs().max() / other.abs().max().clamp_min(1.0)).item() for mine, other in pairs]
    return max(errors)


def main() -> int:
    peer = f"flash-linear-attention {version('flash-linear-attention')}"
    errors = {name: greatest_error(*comparison) for name, comparison in COMPARISONS.items()}
    for name, error in errors.items():
        print(f"{name:<28} {error:.1e} {'' if error <= TOLERANCE else 'TOO LARGE'}")
    if sys.argv[1:]:
        write_record(
            sys.argv[1],
            command="python -m benchmarks.rivals.against_peers",
            rows=[{"operator": name, "greatest_relative_error": error} for name, error in errors.items()],
            seeds=range(len(LENGTHS)),
            notes=f"fp32, outputs and all gradients, lengths {LENGTHS}; beside the naive functions of {peer}",
        )
    return int(max(errors.values()) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
