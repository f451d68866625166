"""Two memories at once: near tokens are heard in the window, far ones through the splats; a token is in one of them.

It is sent to the splats when it leaves the window, with all that it was given at its own time.
"""

# B batch, T token, W window_size, H head, P position width, D value width

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from . import triton
from .dispatch import splat_attention
from .lagged import Attend
from .routing import ROUTINGS, Router
from .splats import Lattice, Splats, SplatState, Targets
from .transform import Transform
from .window_state import WindowState, each_part, hear_window, slide

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
    receive_mixing: Float[Tensor, "H M M"] | None = None,
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
        ValueError: a backend that cannot do this, with the reason.

    Source: `docs/mathematics.md`, section 3.
    """
    router = Router(ROUTINGS[routing], splats, top_p, receive_mixing, transform)
    if _in_one_launch(backend, router, targets, tokens, log_scale, window, state):
        near, far, after, left = triton.window_step(router, targets, tokens, log_scale, window, state)
        return Heard(near, far, after, left, each_part(lambda part: part[:, :1], window))
    reach, leaving, after = slide(window, tokens)
    near = hear_window(targets.positions, reach, log_scale)
    how: dict[str, Any] = {"routing": routing, "top_p": top_p, "receive_mixing": receive_mixing, "transform": transform}
    far, left = hear_splats(splat_attention, targets, leaving, state, splats=splats, padded=True, **how)
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


def _in_one_launch(backend: str, router: Router, targets: Targets, tokens: WindowState, *given: Any) -> bool:
    if backend not in ("auto", "portable", "triton"):
        raise ValueError(f"backend is {backend!r}, expected one of ['auto', 'portable', 'triton']")
    if backend == "portable" or (backend == "auto" and tokens.values.device.type != "cuda"):
        return False
    reason = triton.supports_step(router, targets, tokens, *given)
    if backend == "triton" and reason is not None:
        raise ValueError(f"backend 'triton' cannot do this: {reason}")
    return reason is None
