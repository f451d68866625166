"""The scan by kernels, in segments of rows whose events are put in order, is what it is in torch."""

# N sequence and head, M row of the table, T token, p event of a token, X row width

import importlib.util
from unittest.mock import patch

import pytest
import torch
from cases import relative_error

from splatflow.ops import scan as scan_module
from splatflow.ops import sparse as sparse_module
from splatflow.ops.scan import scan

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from kernel_cases import DEVICE, EVENTS_OF_SEGMENT, few_events_and_poisoned, sparse_by_kernels

from splatflow.ops.triton import launch_sparse
from splatflow.ops.triton import sparse as operators

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets, of what is not selected


@pytest.fixture(autouse=True)
def _small_and_poisoned():
    with few_events_and_poisoned():
        yield


def events(seed, N, M, T, p, X):
    """Table, rows, and where events write and read; half of them at the first rows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

    def places():
        keys = torch.rand(N, T, M, generator=generator) - 0.7 * (torch.arange(M) < p).float()
        return keys.argsort(-1)[..., :p].flatten(1).to(DEVICE)

    return normal(N, M, X), normal(N, T * p, X), places(), places()


@pytest.mark.parametrize("clock", [False, True])
@pytest.mark.parametrize(
    ("N", "M", "T", "p", "X"),
    [
        (1, 5, 19, 2, 5),
        (2, 1, 37, 1, 4),  # one row, of more segments than a tile has events
        (1, 100, 5, 4, 3),  # many rows that are used once
        (2, 3, EVENTS_OF_SEGMENT, 3, 9),
        (1, 2, EVENTS_OF_SEGMENT + 1, 1, 1),
        (1, 5, 1, 2, 6),
    ],
)
def test_a_scan_by_kernels_is_a_scan(N, M, T, p, X, clock):
    table, rows, write_at, read_at = events(T, N, M, T, p, X)
    log_kept = None
    if clock:
        steps = -torch.rand(N, T, dtype=torch.float64, device=DEVICE)
        steps[:, T // 2] = sparse_module.FORGOTTEN
        log_kept = steps.cumsum(1)

    def found_and_gradients(dtype):
        parts = [part.detach().to(dtype).requires_grad_() for part in (table, rows)]
        times = [] if log_kept is None else [log_kept.detach().requires_grad_()]
        found, after = scan(parts[0] + 0.0, parts[1], write_at, read_at, *(times or [None]), p)
        loss = (found * found.detach().sin()).sum() + (after * after.detach().cos()).sum()
        return found, after, *torch.autograd.grad(loss, [*parts, *times])

    expected = found_and_gradients(torch.float64)
    with sparse_by_kernels(), patch.object(scan_module, "pieces_of", None):
        actual = found_and_gradients(torch.float32)
    for here, there in zip(actual, expected, strict=True):
        assert relative_error(here, there) <= 1e-6 * (10 if here.dtype == torch.float64 else 1)


def test_a_slow_decay_over_many_segments_is_exact():
    """Products of rounded decays would be off by as many roundings as there are events."""
    T = 600
    table, rows, place, _ = events(0, 1, 1, T, 1, 1)
    log_kept = torch.full((1, T), -1e-4, dtype=torch.float64, device=DEVICE).cumsum(1)
    table, rows = torch.ones_like(table), torch.zeros_like(rows)
    rows[:, 0] = 1.0
    with sparse_by_kernels(), patch.multiple(launch_sparse, TILE=16, SEGMENT=64, LOOKED_UP=64):
        found, _ = scan(table.float(), rows.float(), place, place, log_kept, 1)
    expected = log_kept.exp() + (log_kept - log_kept[:, :1]).exp()
    torch.testing.assert_close(found[..., 0].double(), expected, rtol=1e-6, atol=0)


def test_blocks_are_longer_where_kernels_scan():
    table = torch.zeros(2, 9, 5)
    assert sparse_module.block_of(table, top_p=4) == sparse_module.BLOCK_TOKENS
    with sparse_by_kernels():
        assert sparse_module.block_of(table, top_p=4) == sparse_module.EVENTS_AT_ONCE // 8
        assert sparse_module.block_of(table.double(), top_p=4) == sparse_module.BLOCK_TOKENS


@pytest.mark.parametrize("fades", [False, True])
def test_operators_of_torch(fades):
    table, rows, write_at, read_at = events(0, 1, 1, EVENTS_OF_SEGMENT + 1, 1, 4)
    table, rows = table.float(), rows.float()
    times = -torch.arange(rows.shape[1], device=DEVICE).double()[None] if fades else None
    edge = None if times is None else times[:, 0].contiguous()
    order = operators.in_order(write_at)
    last = operators.last_before(read_at, order.sorted_at, order.by, 1)
    given = (rows, order.by, order.rank, operators.starts_of(order, 1), times)
    sums = operators.running_sums(*given)
    torch.library.opcheck(operators.running_sums, given)
    torch.library.opcheck(operators.look_up, (table, sums, order.by, times, edge, read_at, last))
    torch.library.opcheck(operators.add_last, (table, sums, order.sorted_at, order.by, times, edge))
