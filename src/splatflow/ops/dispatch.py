"""The one entry to splat attention: checks what it was given, then hands it to a backend.

A new backend is one module and one row of `BACKENDS`.
"""

# B batch (N documents if packed), T target token, S source token, H head that receives, G head that sends, M splat,
# P position width, D value width, R numbers of a bias

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from . import triton
from .chunked import chunked
from .documents import Mix, over_documents, without_padding
from .heads import with_copies
from .reach import reach
from .recurrent import recurrent
from .reference import reference
from .routing import ROUTINGS, Router
from .sparse import sparse
from .splats import Lattice, Sources, Splats, SplatState, Targets, inner_dtype, per_splat
from .transform import Transform
from .validate import check_arguments

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class Backend(NamedTuple):
    """One way to compute the operator: `function(sources, targets, router, state, causal=)`.

    `supports(router, sources, targets)` returns None, or why not. `packed(boundaries, ...)` is for packed documents;
    without it they are cut out and laid side by side.
    """

    function: Mix
    supports: Callable[..., str | None]
    packed: Mix | None = None


def _always(router: Router, sources: Sources, targets: Targets) -> None:
    return None


def _few_touched(router: Router, sources: Sources, targets: Targets) -> str | None:
    if router.top_p is None:
        return "it touches few splats a token, and top_p is None"
    if router.mixing is not None:
        return "it reads few splats a token, and with receive_mixing a token reads all"
    if sources.log_decay is not None and sources.log_decay.shape[-1] > 1:
        return "it forgets by heads, and log_decay has a number for each splat"
    return None


def _within_reach(router: Router, sources: Sources, targets: Targets) -> str | None:
    if not router.routing.ends:
        return "it skips splats that are out of reach, and this routing's have no reach"
    return None if router.mixing is None else "it reads splats within reach, and with receive_mixing a token reads all"


BACKENDS: dict[str, Backend] = {
    "reference": Backend(with_copies(reference), _always),  # dense T x T, the definition
    "recurrent": Backend(recurrent, _always),  # token by token, the decoding step
    "sparse": Backend(with_copies(sparse), _few_touched),  # many splats, of which a token touches few
    "reach": Backend(with_copies(reach), _within_reach),  # Gaussians that end, and splats that are far from most tokens
    "triton": Backend(triton.fused, triton.supports, triton.fused_over_documents),  # fused kernels, on CUDA
    "chunked": Backend(chunked, _always),  # the portable fast path
}


def splat_attention(
    send_positions: Float[Tensor, "B S G P"],
    receive_positions: Float[Tensor, "B T H P"],
    values: Float[Tensor, "B S G D"],
    splats: Splats | Lattice,
    *,
    causal: bool = True,
    routing: str = "mixture",
    top_p: int | None = None,
    send_bias: Float[Tensor, "B S G R"] | None = None,
    receive_bias: Float[Tensor, "B T H R"] | None = None,
    receive_mixing: Float[Tensor, "G M M"] | None = None,
    transform: Transform | None = None,
    log_decay: Float[Tensor, "B S G"] | Float[Tensor, "B S G M"] | None = None,
    write_gate: Float[Tensor, "B S G"] | Float[Tensor, "B S G M"] | None = None,
    padding_mask: Bool[Tensor, "B S"] | None = None,
    state: SplatState | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T H D"], SplatState]:
    """Each token sends its value to the splats near it, and receives from the splats near it what they hold.

        mass_im = decay(i, 0) mass0_m  + sum_{j <= i} decay(i, j) send_jm
        total_im = decay(i, 0) total0_m + sum_{j <= i} decay(i, j) send_jm v_j
        y_i = sum_m receive_im total_im / mass_im

    Without a causal mask the sums run over all tokens, and targets may be other tokens than sources. H receiving heads
    may share G sending ones, as in grouped-query attention: each H / G in turn read the splats of one. Positions and
    scales share one unit of length, which is the caller's. Inputs may be fp64, fp32, bf16 or fp16; sums are kept in
    fp32 (fp64 for fp64), and the output has the dtype of the values.

    Args:
        send_positions: where each source token lies when it sends.
        receive_positions: where each target token lies when it receives. The same tensor ties the two.
        values: what is sent.
        splats: `Splats(centers [G, M, P], log_scales [G, M], log_amplitudes [G, M])`; with `log_reaches` [G, M] for
            the routing "compact". For "lattice" `Lattice(centers [G, 2, K, P / 2], log_scales [G, 2, K],
            log_amplitudes [G, 2, K])`, which stands for M = K x K splats.
        causal: a target hears itself and what came before; T must equal S.
        routing: "mixture" (softmax over splats, running means), "gaussian" (raw Gaussians, plain sums), "compact"
            (Gaussians that end), "lattice" (very many splats) or "grouped" (many, found in two levels).
        top_p: how many splats, the nearest, a token sends to and receives from; None: all. Not for "compact"; needed
            for "grouped".
        send_bias, receive_bias: added to the log-affinities, R = M numbers a token and head; for "lattice" R = 2 K,
            those of the first half first.
        receive_mixing: what splats hand on of each other: with it a token receives from splat n
            sum_m receive_im receive_mixing_mn. Rows that sum to 1 keep means means; they are not checked.
        transform: `Transform(listen [G, M, D], say [G, M, D])`: splat m says A_m mean_m in place of its mean, with
            A_m = I + say_m listen_m^T. None: the mean itself.
        log_decay: <= 0, how much all that came before is forgotten when a token arrives, as a natural logarithm, per
            head or per splat. 0 forgets nothing, -inf everything. Causal only.
        write_gate: in [0, 1], multiplies what a token sends, per head or per splat.
        padding_mask: False for a source token that does not exist: it sends nothing and nothing is forgotten.
        state: what the splats hold before the first token: what an earlier piece of the sequence left, or a prior.
            None: nothing. With `cu_seqlens` one state a document.
        cu_seqlens: boundaries [0, ..., T] of documents packed end to end in a batch of one; none hears another.
        backend: "auto", "chunked", "triton", "sparse", "reach", "recurrent" or "reference"; all give the same. "sparse"
            needs a `top_p`, no `receive_mixing` and no `log_decay` per splat, and has no second derivatives; "reach"
            the routing "compact" and no `receive_mixing`; "triton" CUDA, the routing "mixture" with none of `top_p`,
            `receive_mixing`, `transform` and biases, and at most 128 (bf16) or 64 (fp16, fp32) splats and numbers of a
            position or value.

    Returns:
        The output [B, T, H, D], and the state after the last token, from which a next piece can go on.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name, with what was given and what was expected.

    Source: `docs/mathematics.md`, section 1.

    Example:
        >>> splats = Splats(torch.zeros(1, 1, 2), torch.zeros(1, 1), torch.zeros(1, 1))  # one splat: a running mean
        >>> positions, values = torch.zeros(1, 3, 1, 2), torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
        >>> output, state = splat_attention(positions, positions, values, splats)
        >>> output.flatten().tolist(), state.mass.item()
        ([1.0, 1.5, 3.0], 3.0)
    """
    boundaries = check_arguments(
        send_positions,
        receive_positions,
        values,
        splats,
        causal=causal,
        routing=routing,
        top_p=top_p,
        send_bias=send_bias,
        receive_bias=receive_bias,
        receive_mixing=receive_mixing,
        transform=transform,
        log_decay=log_decay,
        write_gate=write_gate,
        padding_mask=padding_mask,
        state=state,
        cu_seqlens=cu_seqlens,
    )
    dtype = inner_dtype(values.dtype)
    if transform is not None:
        transform = Transform(*(part.to(dtype) for part in transform))
    splats = ROUTINGS[routing].kind(*splats)  # a plain tuple will do
    router = Router(ROUTINGS[routing], splats, top_p, receive_mixing, transform)
    log_decay, write_gate = per_splat(log_decay, dtype), per_splat(write_gate, dtype)
    sources = Sources(send_positions, values, send_bias, log_decay, write_gate)
    targets = Targets(receive_positions, receive_bias)
    chosen = _choose(backend, router, sources, targets, causal)
    mix = partial(chosen.function, causal=causal)
    if state is None:
        num_sequences = values.shape[0] if boundaries is None else len(boundaries) - 1
        state = SplatState.empty(values, num_sequences, router.splats.num_splats)
    state = SplatState(*state)
    with torch.autocast(values.device.type, enabled=False):  # sums and affinities are never narrower than fp32
        if boundaries is not None:
            over = partial(over_documents, mix) if chosen.packed is None else partial(chosen.packed, causal=causal)
            output, state = over(boundaries, sources, targets, router, state)
        else:
            sources = sources if padding_mask is None else without_padding(padding_mask, sources)
            output, state = mix(sources, targets, router, state)
    return output.to(values.dtype), state


def _choose(backend: str, router: Router, sources: Sources, targets: Targets, causal: bool) -> Backend:
    values = sources.values

    def can(name: str) -> bool:
        return BACKENDS[name].supports(router, sources, targets) is None

    if backend == "auto":
        backend = "chunked"
        if values.device.type == "cuda" and can("triton"):
            backend = "triton"
        elif causal and values.shape[1] == 1 and router.top_p is None:
            backend = "recurrent"
        elif can("sparse"):
            backend = "sparse"
        elif can("reach") and _may_look(values):
            backend = "reach"
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {['auto', *BACKENDS]}")
    reason = BACKENDS[backend].supports(router, sources, targets)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot do this: {reason}")
    return BACKENDS[backend]


def _may_look(values: Tensor) -> bool:
    """Whether numbers may decide what is computed: a GPU would wait for all queued work, a compiled graph break."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()
