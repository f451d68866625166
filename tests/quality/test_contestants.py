"""Equal state, equal parameters: what makes a comparison one."""

from dataclasses import replace

import pytest
import torch
from benchmarks.quality.contestants import CONTESTANTS, TOLERANCE, Shell, size_for, state_size
from benchmarks.quality.controls import FrozenCenters, LinearRouter
from benchmarks.quality.probe import REFERENCE_WIDTH, Probe, Run, build, inherit, learn, lessons_of
from benchmarks.quality.studies import STUDIES
from benchmarks.quality.tiers import TIERS

EXPERIMENTS = {f"{tier}, {one.study}, {one.state}": one for tier, experiments in TIERS.items() for one in experiments}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_state_and_parameters_are_matched_within_two_percent(name):
    experiment = EXPERIMENTS[name]
    vocab_size = STUDIES[experiment.study].vocab_size
    models = {mixer: build(experiment.run(mixer, 1e-2, 0), vocab_size) for mixer in experiment.mixers}
    wanted = build(experiment.run("splats", 1e-2, 0), vocab_size).num_parameters()
    for mixer, model in models.items():
        assert abs(model.num_parameters() - wanted) <= TOLERANCE * wanted, mixer
        if CONTESTANTS[mixer].sized:
            assert abs(state_size(model.mixers[0], 64) - experiment.state) <= TOLERANCE * experiment.state, mixer


@pytest.mark.parametrize("name", CONTESTANTS)
def test_the_state_of_all_but_softmax_does_not_grow(name):
    shell = Shell()
    mixer = CONTESTANTS[name].build(shell, 4)
    assert (state_size(mixer, 5) == state_size(mixer, 71)) == (name != "softmax")


def test_a_window_is_counted_as_keys_and_values():
    mixer = CONTESTANTS["window only"].build(Shell(conv_size=0), 7)
    assert state_size(mixer, 50) == 2 * 7 * 64


@pytest.mark.parametrize("name", CONTESTANTS)
def test_convolution_and_output_gate_are_on_or_off_for_all(name):
    def mixer(**options):
        return CONTESTANTS[name].build(Shell(**options), 4)

    def parameters(**options):
        return sum(parameter.numel() for parameter in mixer(**options).parameters())

    plain = parameters(conv_size=0)
    heard = 2 * getattr(mixer(), "value_dim", 32)
    assert parameters(conv_size=3) > plain
    assert parameters(conv_size=0, output_gate=True) == plain + 64 * heard


def test_a_state_that_no_size_gives_is_refused():
    with pytest.raises(ValueError, match="Based cannot remember 1040 numbers within 2%"):
        size_for("Based", Shell(), 1040)


@pytest.mark.parametrize("name", ["splats", "gated delta net"])
def test_a_run_begins_with_the_same_weights_whatever_was_drawn_before(name):
    run = Run("recall", name, 1632, rate=1e-2, seed=3, steps=1)
    first = build(run, 64)
    torch.randn(5)
    again, other = build(run, 64), build(Run("recall", name, 1632, rate=1e-2, seed=4, steps=1), 64)
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_a_linear_router_routes_by_scores():
    torch.manual_seed(0)
    router = LinearRouter(22, 2, 7)
    torch.nn.init.normal_(router.log_amplitudes)
    positions = torch.randn(3, 5, 2, 11)
    from splatflow.ops.routing import route

    scores = torch.einsum("BTHP,HMP->BTHM", positions, router.centers) + router.log_amplitudes
    torch.testing.assert_close(route(positions, router.splats, "mixture"), scores.softmax(-1))


def test_a_linear_router_starts_as_the_splats_do():
    layers = []
    for kind in (LinearRouter, CONTESTANTS["splats"].build(Shell(), 5).__class__):
        torch.manual_seed(0)
        layers.append(kind(22, 2, 7))
    hidden = torch.randn(3, 5, 22)
    torch.testing.assert_close(*(layer(hidden)[0] for layer in layers), rtol=1e-4, atol=1e-5)


def test_frozen_centers_do_not_learn():
    layer = FrozenCenters(22, 2, 7)
    layer(torch.randn(3, 5, 22))[0].sum().backward()
    assert layer.centers.grad is layer.log_scales.grad is layer.log_amplitudes.grad is None
    assert layer.projections.send_proj.weight.grad is not None


@pytest.mark.parametrize(("name", "knows_tokens"), [("splats, token table", True), ("splats, place table", False)])
def test_a_table_says_something_of_each_token_or_of_its_place(name, knows_tokens):
    model = build(Run("recall", name, 1632, rate=1e-2, seed=3, steps=1), 64)
    torch.nn.init.normal_(model.tables[1].weight)
    inputs = torch.tensor([[7, 5] * 40, [5, 7] * 40])
    biases = model.biases(1, inputs)["token_bias"]
    assert list(biases.shape) == [2, 80, 2, 16]
    assert torch.equal(biases[0, 0], biases[1, 1]) == knows_tokens
    assert torch.equal(biases[0], biases[1]) != knows_tokens
    assert torch.equal(biases[:, 0], biases[:, 64])
    without = build(Run("recall", "splats", 1632, rate=1e-2, seed=3, steps=1), 64)
    assert without.biases(1, inputs) == {}


def test_a_strategy_moves_splats_and_half_of_them_are_kept():
    study = STUDIES["short recall"]

    def learnt(name, steps=2):
        run = Run("short recall", name, 1632, rate=1e-2, seed=3, steps=steps)
        return learn(build(run, study.vocab_size), study, run, None, torch.device("cpu"))

    plain, moved, half = map(learnt, ("splats", "splats, k-means start", "splats, half kept"))
    assert not torch.equal(plain.mixers[0].centers, moved.mixers[0].centers)
    assert list(half.mixers[0].centers.shape) == [2, 8, 32]
    assert all((row == plain.mixers[0].centers[0]).all(-1).any() for row in half.mixers[0].centers[0])


@pytest.mark.parametrize(
    ("name", "before"), [("splats, attention start", "softmax"), ("splats, twice as long", "splats")]
)
def test_an_heir_begins_where_the_other_one_ended(name, before):
    study = STUDIES["short recall"]
    run, run_before = (Run("short recall", mixer, 1632, rate=1e-2, seed=3, steps=2) for mixer in (name, before))
    heir, forebear = build(run, study.vocab_size), Probe(run_before, study.vocab_size, REFERENCE_WIDTH)
    _, batch, _ = next(lessons_of(study, run, None, torch.device("cpu")))
    fresh = heir.mixers[1].centers.clone()
    inherit(heir, forebear, batch)
    assert not torch.equal(heir.mixers[1].centers, fresh)
    for name, value in forebear.named_parameters():
        if "log_scale" not in name and "centers" not in name:
            assert torch.equal(value, heir.get_parameter(name)), name
    if before == "splats":
        torch.testing.assert_close(heir(**batch), forebear(**batch))


def test_an_heir_learns_as_long_again_on_other_lessons():
    study, device = STUDIES["short recall"], torch.device("cpu")
    run = Run("short recall", "splats, twice as long", 1632, rate=1e-2, seed=3, steps=2)
    before, after, longer = (
        [batch["inputs"] for _, batch, _ in lessons_of(study, one, None, device, first)]
        for one, first in ((run, 0), (run, 2), (replace(run, steps=4), 0))
    )
    assert all(map(torch.equal, [*before, *after], longer))
    heir, once = (
        learn(build(one, study.vocab_size), study, one, None, device) for one in (run, replace(run, mixer="splats"))
    )
    assert not torch.equal(heir.embedding.weight, once.embedding.weight)
