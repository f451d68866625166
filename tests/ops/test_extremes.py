"""Nothing finite makes a NaN or an infinity, in the output or in a gradient."""

import pytest
import torch
from cases import every_backend, every_route, fit, make_arguments, results, skip_unless
from hypothesis import given, settings
from hypothesis import strategies as st

FARTHEST = 100.0  # in units of sigma, so that distance^2 / sigma^2 reaches 1e4


def all_finite(outcome):
    return {name: bool(part.isfinite().all()) for name, part in outcome.items()}


@every_backend
@settings(max_examples=180)
@given(
    seed=st.integers(0, 10_000),
    causal=st.booleans(),
    length=st.sampled_from((1, 2, 31, 67)),
    log10_scales=st.lists(st.floats(-8, 8), min_size=1, max_size=7),
    distance=st.one_of(st.none(), st.floats(0.0, FARTHEST)),
    duplicate=st.booleans(),
    silent=st.sampled_from(("no token", "every token", "every second token", "padding")),
    state=st.booleans(),
)
def test_extreme_splats(backend, seed, causal, length, log10_scales, distance, duplicate, silent, state):
    """Scales from 1e-8 to 1e8 under ordinary positions (no distance), or every token that many scales from a splat."""
    scales = 10.0 ** torch.tensor(log10_scales)
    num_splats = len(log10_scales)
    sizes, options = fit(backend, {}, {"routing": "mixture"})
    arguments = make_arguments(seed=seed, T=length, M=num_splats, state=state, dtype=torch.float32, **sizes)
    arguments["log_scales"] = scales.log().expand(3, -1).contiguous()
    if duplicate:
        arguments["centers"] = arguments["centers"][:, :1].repeat(1, num_splats, 1)
    if distance is not None:
        generator = torch.Generator().manual_seed(seed)
        for name in ("send_positions", "receive_positions"):
            direction = torch.nn.functional.normalize(arguments[name], dim=-1)
            nearest = torch.randint(num_splats, (length,), generator=generator)
            centers = arguments["centers"][:, nearest].transpose(0, 1)
            arguments[name] = centers + direction * distance * scales[nearest, None, None]
    gates = torch.ones(2, length, 3)
    if silent == "padding":
        arguments["padding_mask"] = torch.zeros(2, length, dtype=torch.bool)
    elif silent != "no token":
        arguments["write_gate"] = gates.index_fill(1, torch.arange(0, length, 1 + (silent != "every token")), 0.0)
    finite = all_finite(results(arguments, causal=causal, backend=backend, **options))
    assert all(finite.values()), finite


@every_backend
@every_route
@pytest.mark.parametrize("causal", [True, False])
def test_a_splat_that_hardly_any_mass_reached(backend, route, causal):
    """Tokens send to one splat and receive from another, at every distance between the two."""
    skip_unless(backend, route)
    lattice = route["routing"] == "lattice"
    for distance in range(5, 101, 5):
        arguments = make_arguments(
            B=1, T=3, H=1, M=4 if lattice else 2, P=1 + lattice, routing=route["routing"], dtype=torch.float32
        )
        points = torch.tensor([0.0, float(distance)])
        arguments["centers"] = points.view(1, 1, 2, 1).repeat(1, 2, 1, 1) if lattice else points.view(1, 2, 1)
        arguments["send_positions"] = torch.zeros(1, 3, 1, 1 + lattice)
        arguments["receive_positions"] = torch.full((1, 3, 1, 1 + lattice), float(distance))
        arguments["log_scales"] = torch.zeros_like(arguments["log_scales"])
        finite = all_finite(results(arguments, causal=causal, backend=backend, **route))
        assert all(finite.values()), (distance, finite)


@every_backend
@pytest.mark.parametrize("silence", ["gates", "padding"])
def test_splats_that_nobody_sent_to_say_nothing(backend, silence):
    sizes, options = fit(backend, {}, {"routing": "mixture"})
    arguments = make_arguments(T=7, dtype=torch.float32, **sizes)
    if silence == "gates":
        arguments["write_gate"] = torch.zeros(2, 7, 3)
    else:
        arguments["padding_mask"] = torch.zeros(2, 7, dtype=torch.bool)
    outcome = results(arguments, backend=backend, **options)
    assert not outcome["output"].any()
    assert all(all_finite(outcome).values())
