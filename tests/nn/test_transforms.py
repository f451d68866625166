"""What splats make of their contents: nothing at the start, and later what the formula says."""

import pytest
import torch
from torch.nn.functional import silu

from splatflow.nn import SplatAttention
from splatflow.ops import ROUTINGS
from splatflow.ops.routing import route

B, T, C, H, M = 2, 23, 12, 3, 7


def random_tokens():
    return torch.randn(B, T, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def layer_of(transform, **options):
    torch.manual_seed(5)
    return SplatAttention(C, H, M, transform=transform, lag=5, **options).double()


@pytest.mark.parametrize(
    ("transform", "causal"), [("linear", True), ("linear", False), ("mlp", False), ("lagged", True)]
)
def test_at_the_start_nothing_is_changed_and_a_step_changes_it(transform, causal):
    tokens = random_tokens()
    layer, plain = layer_of(transform, causal=causal), layer_of(None, causal=causal)
    plain.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(tokens)[0], plain(tokens)[0])
    layer(tokens)[0].square().sum().backward()
    begins = layer.say if transform == "linear" else layer.content_mlp.mlp.down_proj.weight
    assert begins.grad.any()
    with torch.no_grad():
        begins -= begins.grad
    assert (layer(tokens)[0] - plain(tokens)[0]).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("transform", "causal", "others"),
    [("mlp", True, "None, 'linear' or 'lagged'"), ("lagged", False, "'linear' or 'mlp'")],
)
def test_each_mlp_has_its_mask(transform, causal, others):
    with pytest.raises(ValueError, match=f"transform is '{transform}', expected .*{others} with causal={causal}"):
        layer_of(transform, causal=causal)


@pytest.mark.parametrize("routing", ["mixture", "gaussian"])
def test_the_mlp_is_applied_to_what_each_splat_holds(routing):
    tokens = random_tokens()
    layer = layer_of("mlp", causal=False, routing=routing)
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    send_positions, receive_positions, values, _ = layer.projections(tokens)
    send, receive = (route(part, layer.splats, routing) for part in (send_positions, receive_positions))
    mass, total = layer.initial_state(B)
    mass, total = mass + send.sum(1), total + torch.einsum("bthm,bthd->bhmd", send, values)
    contents = total / mass[..., None] if ROUTINGS[routing].running_mean else total
    mlp = layer.content_mlp.mlp
    gate, up, down = (part.weight for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    contents = contents + (silu(contents @ gate.T) * (contents @ up.T)) @ down.T
    heard = torch.einsum("bthm,bhmd->bthd", receive, contents)
    output, state = layer(tokens)
    torch.testing.assert_close(output, layer.output(heard, tokens))
    torch.testing.assert_close(state.splats.total, total)  # what is remembered is what was sent
