"""What a splat makes of its content before it is received: a linear map of rank one beside the identity.

    A_m = I + say_m listen_m^T

It commutes with the sums, so it holds for every state of a splat, at every token, and costs as much as the mix does.
"""

# B batch, H head, M splat, D value width

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Transform(NamedTuple):
    """For each splat, what it listens for in its content, and what it says as much as it hears of that."""

    listen: Float[Tensor, "H M D"]
    say: Float[Tensor, "H M D"]


def transformed(contents: Float[Tensor, "*B H M D"], transform: Transform | None) -> Float[Tensor, "*B H M D"]:
    """A_m of the content of each splat, or of its total.

    Example:
        >>> import torch
        >>> first, second = torch.eye(2).view(2, 1, 1, 2)
        >>> transformed(torch.tensor([[[[3.0, 5.0]]]]), Transform(listen=first, say=10 * second)).tolist()
        [[[[3.0, 35.0]]]]
    """
    if transform is None:
        return contents
    heard = (contents * transform.listen).sum(-1, keepdim=True)
    return contents + heard * transform.say
