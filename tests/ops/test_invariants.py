"""What mathematics promises of the operator, whichever backend computes it."""

import pytest
import torch
from cases import (
    OF_SPLATS,
    attend,
    every_backend,
    every_route,
    fit,
    make_arguments,
    relative_error,
    results,
    skip_unless,
    supports,
)

from splatflow.ops import ROUTINGS, Splats, log_affinity

T = 37


def matrix_of(arguments, **options):
    """The token-token matrix of every head [B, H, T, S], and what the initial state adds to a row [B, T, H]."""
    batch, length, num_heads, _ = arguments["values"].shape
    values = torch.eye(length, dtype=torch.float64)[None, :, None].expand(batch, length, num_heads, length)
    of_tokens = {**arguments, "values": values}
    of_state = {**arguments, "values": torch.zeros_like(values[..., :1])}
    if "mass" in arguments:
        mass = arguments["mass"][..., None]
        of_tokens["total"] = torch.zeros_like(mass).expand(*mass.shape[:-1], length)
        of_state["total"] = mass  # every splat says 1
    matrix, _ = attend(of_tokens, **options)
    share, _ = attend(of_state, **options)
    return matrix.transpose(1, 2), share[..., 0]


@every_backend
@every_route
@pytest.mark.parametrize(
    "kinds", [{}, {"decay": "splat"}, {"gate": "head"}, {"state": True, "decay": "head"}, {"mixing": True}], ids=str
)
@pytest.mark.parametrize("causal", [True, False])
def test_rows_sum_to_one(backend, route, kinds, causal):
    if not causal:
        kinds = {name: kind for name, kind in kinds.items() if name != "decay"}
    skip_unless(backend, route, kinds.get("decay"), "mixing" in kinds)
    if not ROUTINGS[route["routing"]].running_mean:
        pytest.skip("plain sums")
    partial = route != {"routing": "mixture"}
    arguments = make_arguments(T=T, routing=route["routing"], **{**kinds, "state": partial or "state" in kinds})
    if partial and "decay" in kinds:  # a splat that nobody has sent to, or that forgot it all, would say nothing
        arguments["log_decay"] = arguments["log_decay"].clamp_min(-1.0)
    matrix, share = matrix_of(arguments, causal=causal, backend=backend, **route)
    torch.testing.assert_close(matrix.sum(-1) + share.transpose(1, 2), torch.ones(2, 3, T, dtype=torch.float64))
    assert matrix.min() >= 0
    if causal:
        assert not matrix.triu(1).any()


@every_backend
@every_route
def test_rank_is_at_most_the_number_of_splats(backend, route):
    skip_unless(backend, route)
    num_splats = 5
    arguments = make_arguments(T=T, M=num_splats, routing=route["routing"])
    both_ways, _ = matrix_of(arguments, causal=False, backend=backend, **route)
    assert torch.linalg.matrix_rank(both_ways, rtol=1e-10).max() <= num_splats
    causal, _ = matrix_of(arguments, causal=True, backend=backend, **route)
    for cut in range(1, T):
        assert torch.linalg.matrix_rank(causal[..., cut:, :cut], rtol=1e-10).max() <= num_splats
    assert torch.linalg.matrix_rank(causal, rtol=1e-10).min() > num_splats  # so the test can fail


@every_backend
@every_route
@pytest.mark.parametrize("causal", [True, False])
def test_the_order_of_splats_means_nothing(backend, route, causal):
    decay = ("head" if backend == "sparse" else "splat") if causal else None
    mixing = supports(backend, route, mixing=True)
    skip_unless(backend, route)
    lattice = route["routing"] == "lattice"
    arguments = make_arguments(
        T=T,
        M=9 if lattice else 7,
        state=True,
        gate="splat",
        decay=decay,
        bias=True,
        mixing=mixing,
        transform=True,
        routing=route["routing"],
    )
    order = torch.tensor([2, 0, 1]) if lattice else torch.tensor([3, 0, 6, 1, 5, 2, 4])
    of_points, of_splats = order, order
    if lattice:  # the points of the first half, and with them rows of the splats
        of_splats = (3 * order[:, None] + torch.arange(3)).flatten()
        of_points = torch.cat([order, torch.arange(3, 6)])
    permuted = dict(arguments)
    for name in arguments.keys() & set(OF_SPLATS):
        part = arguments[name]
        moved = part[:, :1].index_select(2, order) if lattice else part.index_select(1, order)
        permuted[name] = torch.cat([moved, part[:, 1:]], 1) if lattice else moved
    axes = {"mass": 2, "total": 2, "write_gate": 3, "log_decay": 3, "send_bias": 3, "receive_bias": 3}
    if decay == "head":
        del axes["log_decay"]
    for name in arguments.keys() & axes.keys():
        which = of_points if name.endswith("bias") else of_splats
        permuted[name] = arguments[name].index_select(axes[name], which)
    if mixing:
        permuted["receive_mixing"] = arguments["receive_mixing"][:, of_splats][:, :, of_splats]
    permuted |= {name: arguments[name][:, of_splats] for name in ("listen", "say")}
    options = {"causal": causal, "backend": backend, **route}
    (output, state), (again, after) = attend(arguments, **options), attend(permuted, **options)
    assert relative_error(again, output) <= 1e-12
    assert relative_error(after.mass, state.mass[:, :, of_splats]) <= 1e-12
    assert relative_error(after.total, state.total[:, :, of_splats]) <= 1e-12


@every_backend
@pytest.mark.parametrize("causal", [True, False])
def test_the_output_stays_between_the_values(backend, causal):
    skip_unless(backend, {"routing": "mixture", "top_p": 7})
    kinds, options = fit(backend, {"decay": "head" if causal else None}, {"routing": "mixture", "top_p": 7})
    arguments = make_arguments(T=T, gate="splat", **kinds)
    output, _ = attend(arguments, causal=causal, backend=backend, **options)
    heard = arguments["values"].cummax(1).values if causal else arguments["values"].amax(1, keepdim=True)
    assert (output <= heard + 1e-12).all()


@every_backend
def test_gaussian_routing_is_the_formula_of_the_blueprint(backend):
    skip_unless(backend, {"routing": "gaussian"})
    arguments = make_arguments(T=T, tied=True)
    output, _ = attend(arguments, causal=False, routing="gaussian", backend=backend)
    expected = torch.zeros_like(output)
    for head in range(output.shape[2]):
        positions, values = arguments["send_positions"][:, :, head], arguments["values"][:, :, head]
        distances = torch.cdist(positions, arguments["centers"][head].expand(positions.shape[0], -1, -1))
        scales, amplitudes = (arguments[name][head].exp() for name in ("log_scales", "log_amplitudes"))
        affinities = amplitudes * torch.exp(-distances.square() / (2 * scales.square()))  # [B, T, M]
        expected[:, :, head] = affinities @ (affinities.mT @ values)
    assert relative_error(output, expected) <= 1e-12


@every_backend
@pytest.mark.parametrize("causal", [True, False])
@every_route
def test_every_token_adds_a_mass_of_one(backend, causal, route):
    skip_unless(backend, route)
    if not ROUTINGS[route["routing"]].running_mean:
        pytest.skip("plain sums")
    arguments = make_arguments(T=T, state=True, routing=route["routing"])
    _, state = attend(arguments, causal=causal, backend=backend, **route)
    torch.testing.assert_close(state.mass.sum(-1), arguments["mass"].sum(-1) + T)


@every_backend
@every_route
def test_one_splat_is_a_running_mean(backend, route):
    route = {**route, "top_p": 1} if "top_p" in route else route
    skip_unless(backend, route)
    if not ROUTINGS[route["routing"]].running_mean:
        pytest.skip("plain sums")
    arguments = make_arguments(T=T, M=1, routing=route["routing"])
    output, _ = attend(arguments, backend=backend, **route)
    counts = torch.arange(1, T + 1, dtype=torch.float64)[:, None, None]
    assert relative_error(output, arguments["values"].cumsum(1) / counts) <= 1e-12


@every_backend
def test_tied_positions_collect_both_gradients(backend):
    sizes, options = fit(backend, {}, {"routing": "mixture"})
    tied = make_arguments(T=T, tied=True, **sizes)
    apart = {**tied, "receive_positions": tied["send_positions"].clone()}
    together, each = results(tied, backend=backend, **options), results(apart, backend=backend, **options)
    both = each["d send_positions"] + each["d receive_positions"]
    assert relative_error(together["d send_positions"], both) <= 1e-12


def test_a_token_next_to_its_splat_is_still_drawn_to_it():
    """The square of a distance of 1e-4 is below the rounding of fp32; its gradient is not."""
    generator = torch.Generator().manual_seed(7)
    center = torch.rand(101, 1, 1, generator=generator) + 0.5
    splats = Splats(center[:1], torch.zeros(1, 1), torch.zeros(1, 1))
    positions = (center[0, 0, 0] + 1e-4 * torch.randn(1, 101, 1, 1, generator=generator)).requires_grad_()
    (gradient,) = torch.autograd.grad(log_affinity(positions, splats).sum(), positions)
    torch.testing.assert_close(gradient, (center[0, 0, 0] - positions).detach(), rtol=1e-5, atol=1e-6)
