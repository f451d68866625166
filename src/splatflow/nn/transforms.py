"""What splats may make of their contents before tokens receive them."""

# B batch, H head, M splat, D value width

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from splatflow.ops import Lattice, Splats, SplatState
from splatflow.requirements import require_one_of

from .blocks import SwiGLU

# A linear map for each splat, or one MLP for all of them
ContentTransform = Literal["linear", "mlp"]
Attend = Callable[..., tuple[Tensor, SplatState]]
TRANSFORMS = (None, *get_args(ContentTransform))


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
        contents = state.contents(self.running_mean)
        made = self.mlp(contents.to(self.mlp.down_proj.weight.dtype))
        return SplatState(torch.ones_like(state.mass), contents + made)


def in_two_phases(attend: Attend, make: Callable[[SplatState], SplatState]) -> Attend:
    """`splat_attention` without a causal mask in which tokens receive from `make` of the state they left."""

    def send_then_receive(
        send_positions: Tensor,
        receive_positions: Tensor,
        values: Tensor,
        splats: Splats | Lattice,
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
        _, state = attend(send_positions, receive_positions[:, :0], values, splats, state=state, **how, **common)
        made = {"receive_bias": receive_bias, "state": make(state)}
        heard, _ = attend(send_positions[:, :0], receive_positions, values[:, :0], splats, **made, **common)
        return heard, state

    return send_then_receive


def require_transform(transform: str | None, causal: bool) -> None:
    """Raises ValueError for a transform that there is not, or that has no place in a causal layer."""
    require_one_of(TRANSFORMS, transform=transform)
    if transform == "mlp" and causal:
        raise ValueError(
            "transform is 'mlp', expected None or 'linear' if causal: an MLP for each token's past is too much"
        )
