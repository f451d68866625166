"""Two memories at once: near tokens are heard in the window, far ones through the splats; a token is in one of them.

It is sent to the splats when it leaves the window, with all that it was given at its own time.
"""

# B batch, T token, W window_size, H head, G head that sends, M splat, P position width, D value width

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import triton
from .dispatch import splat_attention
from .lagged import Attend
from .routing import ROUTINGS, Router
from .splats import Lattice, Splats, SplatState, Targets
from .transform import Transform
from .validate import check_arguments
from .window_state import WindowState, check_window, each_part, hear_window, slide

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Heard(NamedTuple):
    """What T tokens hear of each memory, both memories after them, and the T tokens that went from one to the other."""

    near: Float[Tensor, "B T H D"]
    far: Float[Tensor, "B T H D"]
    window: WindowState
    splats: SplatState
    leaving: WindowState


def hybrid_attention(
    targets: Targets,
    tokens: WindowState,
    log_scale: Float[Tensor, " H"],
    splats: Splats | Lattice,
    window: WindowState,
    state: SplatState,
    *,
    routing: str = "mixture",
    top_p: int | None = None,
    receive_mixing: Float[Tensor, "G M M"] | None = None,
    transform: Transform | None = None,
    backend: str = "auto",
) -> Heard:
    """T tokens hear the last W, themselves included, in the window, and those before through the splats.

        near_i = sum_j softmax_j(exp(log_scale) <R_i x_i, R_j u_j> / sqrt(P)) v_j,    i - W < j <= i and real, or j = i
        far_i = `splat_attention` of all j <= i - W

    x and u are receive and send positions, R_i the rotary embedding. The weighing of the two is the caller's.

    Args:
        targets: where the T tokens receive.
        tokens: the same tokens as the splats will want them when they leave the window.
        log_scale: of the scores in the window, a head.
        splats, routing, top_p, receive_mixing, transform: as `splat_attention` has them.
        window, state: both memories before the first token. `empty_window` has no tokens yet.
        backend: "triton", on CUDA or interpreted, decodes a token in one launch (`triton.supports_step` says what it is
            built for); "portable" works out one memory after the other; "auto" is the first, if it can, on CUDA.

    Raises:
        ValueError, TypeError: as `splat_attention`; a window of other tokens than these; a backend that cannot do this,
            with the reason.

    Source: `docs/mathematics.md`, section 3.
    """
    how: dict[str, Any] = {"routing": routing, "top_p": top_p, "receive_mixing": receive_mixing, "transform": transform}
    check_window(window, tokens, log_scale, targets.positions.shape[2])
    if _in_one_launch(backend, tokens.values.device):
        _check_token(targets, tokens, splats, state, **how)
        router = Router(ROUTINGS[routing], ROUTINGS[routing].kind(*splats), top_p, receive_mixing, transform)
        step = router, targets, tokens, log_scale, window, state
        reason = triton.supports_step(*step)
        if reason is None:
            near, far, after, left = triton.window_step(*step)
            return Heard(near, far, after, left, each_part(lambda part: part[:, :1], window))
        if backend == "triton":
            raise ValueError(f"backend 'triton' cannot do this: {reason}")
    reach, leaving, after = slide(window, tokens)
    far, left = hear_splats(splat_attention, targets, leaving, state, splats=splats, padded=True, **how)
    near = hear_window(targets.positions, reach, log_scale)
    return Heard(near, far, after, left, leaving)


def hear_splats(
    attend: Attend, targets: Targets, tokens: WindowState, state: SplatState, *, padded: bool, **options: Any
) -> tuple[Float[Tensor, "B T H D"], SplatState]:
    """What targets receive of splats to which these tokens are sent. Not `padded`: all tokens are real."""
    return attend(
        tokens.send_positions,
        targets.positions,
        tokens.values,
        send_bias=tokens.send_bias,
        receive_bias=targets.bias,
        log_decay=tokens.log_decay,
        write_gate=tokens.write_gate,
        padding_mask=tokens.real if padded else None,
        state=state,
        **options,
    )


def _in_one_launch(backend: str, device: torch.device) -> bool:
    """Whether the kernel is to be tried."""
    if backend not in ("auto", "portable", "triton"):
        raise ValueError(f"backend is {backend!r}, expected one of ['auto', 'portable', 'triton']")
    return backend == "triton" or (backend == "auto" and device.type == "cuda")


def _check_token(
    targets: Targets, tokens: WindowState, splats: Splats | Lattice, state: SplatState, **how: Any
) -> None:
    """What `splat_attention` checks, where it is not called."""
    check_arguments(
        tokens.send_positions,
        targets.positions,
        tokens.values,
        splats,
        causal=True,
        send_bias=tokens.send_bias,
        receive_bias=targets.bias,
        log_decay=tokens.log_decay,
        write_gate=tokens.write_gate,
        padding_mask=tokens.real,
        state=state,
        cu_seqlens=None,
        **how,
    )
