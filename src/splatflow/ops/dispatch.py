"""The one entry to splat attention: checks what it was given, then hands it to a backend.

A new backend is one module and one row of `BACKENDS`.
"""

# B batch (N documents if packed), T target token, S source token, H head, M splat, P position width, D value width

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .chunked import chunked
from .documents import Mix, over_documents, without_padding
from .recurrent import recurrent
from .reference import reference
from .splats import Splats, SplatState, inner_dtype
from .validate import check_arguments

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class Backend(NamedTuple):
    """One way to compute the operator. `supports(causal=, routing=)` returns None, or why not."""

    function: Mix
    supports: Callable[..., str | None]


def _always(**_: Any) -> None:
    return None


BACKENDS: dict[str, Backend] = {
    "reference": Backend(reference, _always),  # dense T x T, the definition
    "recurrent": Backend(recurrent, _always),  # token by token, the decoding step
    "chunked": Backend(chunked, _always),  # the portable fast path
}


def splat_attention(
    send_positions: Float[Tensor, "B S H P"],
    receive_positions: Float[Tensor, "B T H P"],
    values: Float[Tensor, "B S H D"],
    splats: Splats,
    *,
    causal: bool = True,
    routing: str = "mixture",
    log_decay: Float[Tensor, "B S H"] | Float[Tensor, "B S H M"] | None = None,
    write_gate: Float[Tensor, "B S H"] | Float[Tensor, "B S H M"] | None = None,
    padding_mask: Bool[Tensor, "B S"] | None = None,
    state: SplatState | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T H D"], SplatState]:
    """Each token sends its value to the splats near it, and receives from the splats near it what they hold.

        mass_im = decay(i, 0) mass0_m  + sum_{j <= i} decay(i, j) send_jm
        total_im = decay(i, 0) total0_m + sum_{j <= i} decay(i, j) send_jm v_j
        y_i = sum_m receive_im total_im / mass_im

    Without a causal mask the sums run over all tokens, and targets may be other tokens than sources. Positions and
    scales share one unit of length, which is the caller's. Inputs may be fp64, fp32, bf16 or fp16; sums are kept in
    fp32 (fp64 for fp64), and the output has the dtype of the values.

    Args:
        send_positions: where each source token lies when it sends.
        receive_positions: where each target token lies when it receives. The same tensor ties the two.
        values: what is sent.
        splats: `Splats(centers [H, M, P], log_scales [H, M], log_amplitudes [H, M])`.
        causal: a target hears itself and what came before; T must equal S.
        routing: "mixture" (softmax over splats, running means) or "gaussian" (raw Gaussians, plain sums).
        log_decay: <= 0, how much all that came before is forgotten when a token arrives, as a natural logarithm, per
            head or per splat. 0 forgets nothing, -inf everything. Causal only.
        write_gate: in [0, 1], multiplies what a token sends, per head or per splat.
        padding_mask: False for a source token that does not exist: it sends nothing and nothing is forgotten.
        state: what the splats hold before the first token: what an earlier piece of the sequence left, or a prior.
            None: nothing. With `cu_seqlens` one state a document.
        cu_seqlens: boundaries [0, ..., T] of documents packed end to end in a batch of one; none hears another.
        backend: "auto", "chunked", "recurrent" or "reference"; all give the same.

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
    check_arguments(
        send_positions,
        receive_positions,
        values,
        splats,
        causal=causal,
        routing=routing,
        log_decay=log_decay,
        write_gate=write_gate,
        padding_mask=padding_mask,
        state=state,
        cu_seqlens=cu_seqlens,
    )
    splats = Splats(*splats)  # a plain tuple will do
    state = None if state is None else SplatState(*state)
    function = _choose(backend, values.shape[1], causal=causal, routing=routing)
    mix = partial(_call, function, splats, causal, routing)
    dtype = inner_dtype(values.dtype)
    log_decay, write_gate = _per_splat(log_decay, dtype), _per_splat(write_gate, dtype)
    if state is None:
        num_sequences = values.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        state = SplatState.empty(values, num_sequences, splats.centers.shape[1])
    with torch.autocast(values.device.type, enabled=False):  # sums and affinities are never narrower than fp32
        if cu_seqlens is not None:
            boundaries = cu_seqlens.tolist()
            output, state = over_documents(
                mix, boundaries, send_positions, receive_positions, values, log_decay, write_gate, state
            )
        else:
            sources = (send_positions, values, log_decay, write_gate)
            if padding_mask is not None:
                sources = without_padding(padding_mask, *sources)
            output, state = mix(sources[0], receive_positions, *sources[1:], state)
    return output.to(values.dtype), state


def _choose(backend: str, num_tokens: int, *, causal: bool, routing: str) -> Mix:
    if backend == "auto":
        backend = "recurrent" if causal and num_tokens == 1 else "chunked"
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {['auto', *BACKENDS]}")
    reason = BACKENDS[backend].supports(causal=causal, routing=routing)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot do this: {reason}")
    return BACKENDS[backend].function


def _call(
    function: Mix,
    splats: Splats,
    causal: bool,
    routing: str,
    send_positions: Tensor,
    receive_positions: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    state: SplatState,
) -> tuple[Tensor, SplatState]:
    """A backend with the tensors that change from call to call in one order."""
    return function(
        send_positions,
        receive_positions,
        values,
        splats,
        causal=causal,
        routing=routing,
        log_decay=log_decay,
        write_gate=write_gate,
        state=state,
    )


def _per_splat(factor: Tensor | None, dtype: torch.dtype) -> Float[Tensor, "B S H #M"] | None:
    """One layout for what may be given per head or per splat."""
    if factor is None:
        return None
    return (factor if factor.ndim == 4 else factor[..., None]).to(dtype)
