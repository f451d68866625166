"""What splats may make of their contents before tokens receive them."""

# B batch, T token, H head, M splat, D value width

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from splatflow.ops import SplatState
from splatflow.ops.lagged import Attend, LaggedState, hear_chunks, slots_of, states_after_chunks
from splatflow.ops.splats import Targets, each
from splatflow.ops.window_state import WindowState, sources_of
from splatflow.requirements import require_one_of

from .blocks import SwiGLU

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

# A linear map for each splat, or one MLP for all of them, of what they hold at the end or before each chunk
ContentTransform = Literal["linear", "mlp", "lagged"]
# The values of `causal` with which each goes
TRANSFORMS = {None: (True, False), "linear": (True, False), "mlp": (False,), "lagged": (True,)}


class ContentMLP(nn.Module):
    """content + SwiGLU(content), for every splat alike; at the start the content itself.

    Example:
        >>> state = SplatState(mass=torch.full((1, 1, 2), 4.0), total=torch.ones(1, 1, 2, 3))
        >>> ContentMLP(value_dim=3, running_mean=True)(state).total[0, 0, 0].tolist()
        [0.25, 0.25, 0.25]
    """

    def __init__(self, value_dim: int, running_mean: bool) -> None:
        super().__init__()
        self.running_mean = running_mean
        self.mlp = SwiGLU(value_dim, 2 * value_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.mlp.down_proj.weight)

    def forward(self, state: SplatState) -> SplatState:
        """Splats of mass 1 that hold what has been made of the contents of `state`: for receiving, not for sending."""
        added = self.added(state)
        return added._replace(total=state.contents(self.running_mean) + added.total)

    def added(self, state: SplatState) -> SplatState:
        """The same without the contents themselves: what the MLP adds to them."""
        contents = state.contents(self.running_mean)
        added = self.mlp(contents.to(self.mlp.down_proj.weight.dtype))
        return SplatState(torch.ones_like(state.mass), added.to(contents.dtype))


def in_two_phases(attend: Attend, make: Callable[[SplatState], SplatState]) -> Attend:
    """`attend` without a causal mask in which tokens receive from `make` of the state they left."""

    def send_then_receive(
        send_positions: Tensor,
        receive_positions: Tensor,
        values: Tensor,
        *,
        receive_bias: Tensor | None,
        state: SplatState,
        send_bias: Tensor | None,
        write_gate: Tensor | None,
        log_decay: Tensor | None,
        padding_mask: Tensor | None,
        **common: Any,
    ) -> tuple[Tensor, SplatState]:
        how = {"send_bias": send_bias, "write_gate": write_gate, "log_decay": log_decay, "padding_mask": padding_mask}
        _, state = attend(send_positions, receive_positions[:, :0], values, state=state, **how, **common)
        made = {"receive_bias": receive_bias, "state": make(state)}
        heard, _ = attend(send_positions[:, :0], receive_positions, values[:, :0], **made, **common)
        return heard, state

    return send_then_receive


def hear_lagged(
    attend: Attend,
    mlp: ContentMLP,
    lag: int,
    tokens: WindowState,
    targets: Targets,
    exists: Bool[Tensor, "B T"],
    before: SplatState,
    after: SplatState,
    lagged: LaggedState | None,
) -> tuple[Float[Tensor, "B T H D"], LaggedState]:
    """What each token hears beside the present contents: what `mlp` adds to those from before its chunk.

    Args:
        tokens: what the splats are sent while the `targets` receive.
        exists: which places have a number; in the others there is neither a target nor one of the tokens.
        before, after: what the splats hold before and after these tokens.
        lagged: None at the beginning of a text.
    """
    lagged = LaggedState.first(before) if lagged is None else lagged
    if lagged.num_tokens.is_cpu and not torch.compiler.is_compiling() and (lagged.num_tokens >= lag).any():
        raise ValueError(f"state.lagged.num_tokens is {lagged.num_tokens.tolist()}, expected less than lag, {lag}")
    slots = slots_of(exists, lagged.num_tokens, lag)
    if exists.shape[1] == 1:
        later = SplatState(*(part[:, None] for part in after))
    else:
        later = states_after_chunks(attend, each(slots.put, sources_of(tokens)), slots.num_chunks, before)
    states = SplatState(*(torch.cat([old[:, None], new], 1) for old, new in zip(lagged.splats, later, strict=True)))
    heard = hear_chunks(attend, mlp.added, slots, targets, states)
    return heard.masked_fill(~exists[..., None, None], 0.0), lagged.after(exists, states, lag)


def require_transform(transform: str | None, causal: bool) -> None:
    """Raises ValueError for a transform that there is not, or not with such a mask, TypeError for no such mask.

    >>> require_transform("mlp", causal=True)
    Traceback (most recent call last):
    ValueError: transform is 'mlp', expected None, 'linear' or 'lagged' with causal=True
    """
    require_one_of(TRANSFORMS, transform=transform)
    if not isinstance(causal, bool):
        raise TypeError(f"causal is {causal!r}, expected True or False")
    if causal not in TRANSFORMS[transform]:
        *others, last = (repr(name) for name, values in TRANSFORMS.items() if causal in values)
        raise ValueError(f"transform is {transform!r}, expected {', '.join(others)} or {last} with causal={causal}")
