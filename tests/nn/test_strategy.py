"""Strategies change splats between steps and nothing else; models compile and recompute with each of them."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from splatflow.nn import STRATEGIES, SplatAttention, Strategy, overlap_loss, usage
from splatflow.nn.geometry import DORMANT, distances, is_awake
from splatflow.nn.strategy import (
    Curriculum,
    MinimumDistance,
    OverlapLoss,
    Repulsion,
    SplitAndPrune,
    by_splat,
    moments_of,
    parameters_of_splats,
    put_to_sleep,
    split,
)
from splatflow.nn.usage import splat_layers

B, T, C, H, M = 2, 19, 24, 2, 7
STEPS = 5
# settings with which a strategy acts within a few steps, where its own do not
SOON = {"split_and_prune": {"every": 2}, "curriculum": {"first": 2, "until": 4}, "min_distance": {"distance": 7.0}}

SHARED = {"num_heads": 3 * H, "num_key_value_heads": H}  # senders

every_strategy = pytest.mark.parametrize("name", STRATEGIES)
senders_shared_or_not = pytest.mark.parametrize("options", [{}, SHARED], ids=["each sends", "senders are shared"])


def make_layer(**options: Any) -> SplatAttention:
    return SplatAttention(**{"hidden_size": C, "num_heads": H, "num_splats": M, **options})


class Stack(nn.Module):
    """Layers of splats with all that splats can own."""

    def __init__(self, *, num_layers: int = 2, recompute: bool = False, **options: Any) -> None:
        super().__init__()
        options = {"decay": "splat", "write_gate": True, "window_size": 4, "conv_size": 3, **options}
        self.layers = nn.ModuleList(make_layer(**options) for _ in range(num_layers))
        for layer in self.layers:
            # something for strategies to do; equal centers would part by rounding, in any direction
            layer.centers.data[:, 1] = layer.centers.data[:, 0] + 0.02
        self.recompute = recompute

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            run = partial(checkpoint, layer, use_reentrant=False) if self.recompute else layer
            hidden_states = hidden_states + run(hidden_states)[0]
        return hidden_states


def strategy_of(name):
    return STRATEGIES[name](**SOON.get(name, {}))


def random_tokens(seed=0, length=T):
    return torch.randn(B, length, C, generator=torch.Generator().manual_seed(seed))


def train(strategy, wrap=lambda model: model, **options):
    """A model after a few steps towards nothing in particular, and its optimizer."""
    torch.manual_seed(0)
    model = Stack(**options)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    callable_model = wrap(model)
    strategy.begin(model, optimizer, random_tokens())
    for step in range(1, STEPS + 1):
        batch = random_tokens(step)
        optimizer.zero_grad()
        (callable_model(batch) - batch.roll(1, 1)).square().mean().backward()
        strategy.after_backward(model, optimizer, step)
        optimizer.step()
        strategy.after_step(model, optimizer, step, batch)
    return model, optimizer


def trained_layer(dtype=torch.float64, **options):
    """A layer whose parameters and moments are all different, and its optimizer."""
    torch.manual_seed(0)
    layer = make_layer(**options).to(dtype)
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        layer(random_tokens(step).to(dtype))[0].square().sum().backward()
        optimizer.step()
    return layer, optimizer


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@every_strategy
@senders_shared_or_not
def test_a_strategy_does_something_and_changes_no_shape(name, options):
    plain, _ = train(Strategy(), **options)
    model, optimizer = train(strategy_of(name), **options)
    ours, theirs = weights_of(model), weights_of(plain)
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(value.isfinite().all() for value in ours.values())
    assert all(len(moments_of(optimizer, parameter)) == 2 for parameter in model.parameters())


@every_strategy
def test_recomputing_in_the_backward_pass_changes_nothing(name):
    expected = weights_of(train(strategy_of(name))[0])
    actual = weights_of(train(strategy_of(name), recompute=True)[0])
    for key, value in actual.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5)


@every_strategy
def test_one_compiled_graph_serves_from_the_first_step_to_the_last(name):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    wrap = partial(torch.compile, fullgraph=True, backend=backend)
    compiled, expected = (
        weights_of(train(strategy_of(name), how, num_layers=1)[0]) for how in (wrap, lambda model: model)
    )
    assert len(graphs) == 1
    for key, value in compiled.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5)


def test_usage_of_a_compiled_model_is_that_of_the_model():
    torch.compiler.reset()
    model = Stack(num_layers=1)
    expected = usage(model, random_tokens())
    compiled = torch.compile(model, backend="eager")
    compiled(random_tokens())
    shares = usage(compiled, random_tokens())
    assert list(shares) == [f"_orig_mod.{name}" for name in expected]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(shares.values(), expected.values(), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay": "splat", "write_gate": True, "window_size": 5},
        {"routing": "gaussian", "decay": "head"},
        {"transform": "linear", "hops": 1},
        {"transform": "lagged", "lag": 3, "decay": "head"},
        {"decay": "splat", "write_gate": True, "window_size": 4, **SHARED},
    ],
)
def test_two_halves_do_what_the_whole_did(options):
    layer, optimizer = trained_layer(**options)
    heads, parents, children = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 5]), torch.tensor([4, 6, 3])
    put_to_sleep(layer, optimizer, torch.zeros(H, M, dtype=torch.bool).index_put((heads, children), torch.tensor(True)))
    expected = layer(random_tokens(9).double())[0]
    split(layer, optimizer, heads, parents, children, seed=0, jitter=0.0)
    assert is_awake(layer.splats).all()
    torch.testing.assert_close(layer(random_tokens(9).double())[0], expected, rtol=0, atol=1e-10)


def test_a_child_takes_over_the_moments_and_all_else_that_its_parent_owns():
    layer, optimizer = trained_layer(decay="splat", write_gate=True)
    before = {parameter: moments_of(optimizer, parameter)[0].clone() for parameter in parameters_of_splats(layer)}
    assert len(before) == 9
    split(layer, optimizer, torch.tensor([1]), torch.tensor([2]), torch.tensor([4]), seed=0)
    for parameter, first in before.items():
        rows = by_splat(moments_of(optimizer, parameter)[0], layer)
        assert torch.equal(rows[1, 4], by_splat(first, layer)[1, 2])
        assert torch.equal(rows[1, 2], by_splat(first, layer)[1, 2])
        assert torch.equal(rows[0], by_splat(first, layer)[0])
        if parameter is not layer.centers:
            assert torch.equal(by_splat(parameter, layer)[1, 4], by_splat(parameter, layer)[1, 2])
    gap = (layer.centers[1, 4] - layer.centers[1, 2]).norm() / layer.log_scales[1, 2].exp()
    assert 0.5 < gap <= 1.0 + 1e-9  # two jitters, less the part along the center
    lengths = layer.centers[1, [2, 4]].norm(dim=-1)
    torch.testing.assert_close(lengths[0], lengths[1])


@pytest.mark.parametrize("routing", ["mixture", "gaussian", "compact"])
def test_a_sleeping_splat_gets_nothing_and_nothing_wakes_it(routing):
    layer, optimizer = trained_layer(torch.float32, routing=routing, decay="splat", write_gate=True)
    asleep = torch.zeros(H, M, dtype=torch.bool).index_fill(1, torch.tensor([1, 4]), True)
    put_to_sleep(layer, optimizer, asleep)
    for step in range(20):
        optimizer.zero_grad()
        layer(random_tokens(step))[0].square().mean().backward()
        for parameter in parameters_of_splats(layer):
            assert not by_splat(parameter.grad, layer)[asleep].any()
        optimizer.step()  # its weights decay, the sleeping amplitudes too
        for parameter in parameters_of_splats(layer):
            assert not any(by_splat(moment, layer)[asleep].any() for moment in moments_of(optimizer, parameter))
    assert (layer.log_amplitudes[asleep] < 0.9 * DORMANT).all()
    assert torch.equal(is_awake(layer.splats), ~asleep)
    assert not usage(layer, random_tokens())[""][asleep].any()


def test_overlap_loss_pulls_at_centers_by_its_gradient_and_at_nothing_else():
    model = Stack()
    (model(random_tokens())).square().mean().backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    OverlapLoss(weight=3.0).after_backward(model, torch.optim.SGD(model.parameters()), 1)
    for name, layer in splat_layers(model).items():
        (expected,) = torch.autograd.grad(3.0 * overlap_loss(layer.splats), layer.centers)
        torch.testing.assert_close(layer.centers.grad, before.pop(f"{name}.centers") + expected)
    assert all(torch.equal(model.get_parameter(name).grad, gradient) for name, gradient in before.items())


@pytest.mark.parametrize("biased", [False, True])
@senders_shared_or_not
def test_repulsion_moves_by_the_learning_rate_and_keeps_lengths(options, biased):
    model = Stack(routing_bias=biased, **options)
    layer = model.layers[0]
    before = layer.centers.detach().clone()
    optimizer = torch.optim.SGD([{"params": model.parameters(), "lr": 0.0}])
    Repulsion(5.0).after_step(model, optimizer, 1, random_tokens())
    torch.testing.assert_close(layer.centers.data, before)
    optimizer.param_groups[0]["lr"] = 1e-2
    loss = overlap_loss(layer.splats)
    Repulsion(5.0).after_step(model, optimizer, 1, random_tokens())
    assert overlap_loss(layer.splats) < loss
    assert 0 < (layer.centers - before).norm(dim=-1).max() <= 5.0 * 1e-2
    torch.testing.assert_close(layer.centers.norm(dim=-1), before.norm(dim=-1))


def test_minimum_distance_parts_awake_splats_only():
    model = Stack()
    optimizer = torch.optim.SGD(model.parameters())
    for layer in model.layers:
        layer.centers.data.copy_(layer.centers[:, :1].expand_as(layer.centers))
        put_to_sleep(layer, optimizer, torch.arange(M).expand(H, M) >= 4)
    MinimumDistance(0.5).after_step(model, optimizer, 1, random_tokens())
    for layer in model.layers:
        gaps = distances(layer.centers[:, :4]) + 9 * torch.eye(4)
        assert gaps.min() >= 0.5
        assert torch.equal(layer.centers[:, 4:], layer.centers[:, :1].expand(H, 3, -1))


@senders_shared_or_not
def test_dead_splats_and_duplicates_are_moved_onto_the_busiest(options):
    torch.manual_seed(0)
    layer = make_layer(**options)
    layer.log_amplitudes.data[:, 3] = 2.0  # the busiest
    layer.log_amplitudes.data[:, 6] = -20.0  # dead
    layer.centers.data[:, 1] = layer.centers.data[:, 0]  # a duplicate
    optimizer = torch.optim.AdamW(layer.parameters())
    before, shares = weights_of(layer), usage(layer, random_tokens())[""]
    strategy = SplitAndPrune(every=3)
    strategy.after_step(layer, optimizer, 2, random_tokens())
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    strategy.after_step(layer, optimizer, 3, random_tokens())
    for head in range(H):
        busiest, second = shares[head].index_fill(0, torch.tensor([1, 6]), 0.0).topk(2).indices.tolist()
        near = distances(layer.centers)[head] < 1.01 * layer.log_scales[head, 0].exp()
        assert near[6, busiest]  # the least used to the most used
        assert near[1, second]
        for parent, child in ((busiest, 6), (second, 1)):
            expected = before["log_amplitudes"][head, parent] - math.log(2)
            torch.testing.assert_close(layer.log_amplitudes[head, [parent, child]], expected.expand(2))
        others = [splat for splat in range(M) if splat not in (1, 6, busiest, second)]
        assert torch.equal(layer.centers[head, others], before["centers"][head, others])


def test_a_collapsed_head_comes_apart_by_doubling():
    torch.manual_seed(0)
    layer = make_layer()
    layer.centers.data.copy_(layer.centers[:, :1].expand_as(layer.centers))
    optimizer = torch.optim.AdamW(layer.parameters())
    distinct = []
    for step in (1, 2):
        SplitAndPrune(every=1).after_step(layer, optimizer, step, random_tokens())
        places = [{tuple(center.tolist()) for center in head} for head in layer.centers]
        distinct.append([len(head) for head in places])
    assert distinct == [[3, 3], [7, 7]]  # two halves and those left behind; then each of the three is split


def test_a_curriculum_wakes_splats_in_doublings_until_all_are_awake():
    model = Stack()
    optimizer = torch.optim.AdamW(model.parameters())
    strategy, counts = Curriculum(first=2, until=6), []
    strategy.begin(model, optimizer, random_tokens())
    for step in range(1, 8):
        strategy.after_step(model, optimizer, step, random_tokens(step))
        counts.append({int(count) for layer in model.layers for count in is_awake(layer.splats).sum(-1)})
    assert counts == [{2}, {2}, {4}, {4}, {4}, {7}, {7}]
    assert [strategy.num_awake(M, step) for step in range(1, 8)] == [2, 2, 4, 4, 4, 7, 7]


@pytest.mark.parametrize(
    ("strategy", "settings", "message"),
    [
        (OverlapLoss, {"weight": -1.0}, "weight is -1.0, expected at least 0"),
        (Repulsion, {"strength": math.nan}, "strength is nan"),
        (MinimumDistance, {"distance": -0.5}, "distance is -0.5"),
        (SplitAndPrune, {"every": 0}, "every is 0, expected at least 1"),
        (Curriculum, {"first": 0}, "first is 0"),
        (Curriculum, {"until": 0}, "until is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(strategy, settings, message):
    with pytest.raises(ValueError, match=message):
        strategy(**settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"routing_bias": True}, "routing_bias is True"), ({"routing": "lattice", "num_splats": 9}, "'lattice'")],
)
def test_splats_that_cannot_take_each_others_place_are_left_alone(options, message):
    layer = SplatAttention(12, 2, **{"num_splats": 5, **options})
    optimizer = torch.optim.SGD(layer.parameters())
    with pytest.raises(ValueError, match=message):
        put_to_sleep(layer, optimizer, torch.zeros(2, layer.num_splats, dtype=torch.bool))
    places = (torch.tensor([0]), torch.tensor([1]), torch.tensor([2]))
    with pytest.raises(ValueError, match=message):
        split(layer, optimizer, *places, seed=0)
