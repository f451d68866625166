"""Events of a scan: when they happen, and the order in which they are summed up."""

# N sequence and head, E event

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class Clock(NamedTuple):
    """When each event happens, and when the scan begins and ends. What is left after a while is exp(then - before)."""

    times: Float[Tensor, "N E"]
    begin: Float[Tensor, " N"]
    end: Float[Tensor, " N"]


class Order(NamedTuple):
    """Writing events in the order of (row, time)."""

    sorted_at: Int[Tensor, "N E"]  # the rows, in order
    by: Int[Tensor, "N E"]  # which event stands there
    rank: Int[Tensor, "N E"]  # how many events of the same row stand before it
    is_last: Bool[Tensor, "N E"]  # of the events of its row


def in_order(write_at: Int[Tensor, "N E"]) -> Order:
    """The order of events that write there, of which later ones stand later.

    Example:
        >>> [part.tolist() for part in in_order(torch.tensor([[4, 2, 4]]))]
        [[[2, 4, 4]], [[1, 0, 2]], [[0, 0, 1]], [[True, False, True]]]
    """
    heads, num_events = write_at.shape
    sorted_at, by = write_at.sort(dim=1, stable=True)
    here = torch.arange(num_events, device=write_at.device)
    begins = torch.ones(heads, num_events + 1, dtype=torch.bool, device=write_at.device)
    begins[:, 1:-1] = sorted_at[:, 1:] != sorted_at[:, :-1]
    rank = here - torch.where(begins[:, :-1], here, 0).cummax(1).values
    return Order(sorted_at, by, rank, begins[:, 1:])


def last_before(
    read_at: Int[Tensor, "N E"], sorted_at: Int[Tensor, "N E"], by: Int[Tensor, "N E"], per_token: int
) -> Int[Tensor, "N E"]:
    """Which of the ordered events is the last at the row of each reading event and not later; -1 if there is none."""
    num_events = read_at.shape[1]
    now = torch.arange(num_events, device=read_at.device) // per_token
    keys = (sorted_at * num_events + by // per_token).contiguous()
    found = torch.searchsorted(keys, (read_at * num_events + now).contiguous(), right=True) - 1
    hit = (found >= 0) & (sorted_at.gather(1, found.clamp_min(0)) == read_at)
    return torch.where(hit, found, -1)
