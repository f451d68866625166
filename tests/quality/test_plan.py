"""Rates first, on one seed; then fresh seeds at the rate that was chosen; and nothing twice."""

import doctest

import pytest
from benchmarks.quality import intervals, plan, standings
from benchmarks.quality.plan import FIRST_RATES, RATES, Experiment, chosen_rate, fresh_rows, rate_to_try, runs_to_make

EXPERIMENT = Experiment("recall", ("splats", "softmax"), state=1632, steps=7)


def row(score):
    return {"scores": {"mean accuracy": score}}


def work_through(experiment, accuracy):
    """All runs of an experiment in the order in which they are made; `accuracy(run)` is what each gives."""
    rows, made = {}, []
    while runs := runs_to_make([experiment], rows):
        made += runs
        rows |= {run: row(accuracy(run)) for run in runs}
    return rows, made


def test_every_contestant_is_swept_and_then_run_on_fresh_seeds():
    rows, made = work_through(EXPERIMENT, lambda run: 0.5 - 10 * abs(run.rate - 1e-2))
    for mixer in EXPERIMENT.mixers:
        mine = [run for run in made if run.mixer == mixer]
        assert [run.rate for run in mine if run.seed == 0] == list(FIRST_RATES)
        assert [(run.rate, run.seed) for run in mine if run.seed] == [(1e-2, 1), (1e-2, 2), (1e-2, 3)]
        assert len(fresh_rows(EXPERIMENT, mixer, rows)) == 3
    assert len(set(made)) == len(made)


def test_what_the_ledger_holds_is_not_run_again():
    rows, made = work_through(EXPERIMENT, lambda run: 0.5)
    assert runs_to_make([EXPERIMENT], rows) == []
    some = {run: rows[run] for run in made[:3]}
    assert not set(runs_to_make([EXPERIMENT], some)) & set(some)
    assert runs_to_make([EXPERIMENT._replace(steps=8)], rows) != []  # other steps are other runs


@pytest.mark.parametrize(
    ("best", "tried"),
    [(8e-2, {4e-2, 8e-2}), (5e-4, {2e-3, 1e-3, 5e-4}), (1e-2, {1e-2})],
)
def test_a_best_rate_at_the_edge_makes_the_sweep_go_on(best, tried):
    rows, _ = work_through(EXPERIMENT, lambda run: 1 - abs(RATES.index(run.rate) - RATES.index(best)) / 10)
    rates = {run.rate for run in rows if run.mixer == "splats" and run.seed == 0}
    assert tried | set(FIRST_RATES) == rates
    assert {run.rate for run in rows if run.seed} == {best}


def test_a_flat_edge_does_not():
    assert rate_to_try(dict.fromkeys(FIRST_RATES, 0.3)) is None
    assert chosen_rate(dict.fromkeys(FIRST_RATES, 0.3)) == min(FIRST_RATES)


def test_fewer_bits_are_better():
    experiment = Experiment("wikitext bytes", ("splats", "softmax"), state=1632, steps=7)
    assert plan.decided(experiment, {"scores": {"bits per byte": 2.0}}) > plan.decided(
        experiment, {"scores": {"bits per byte": 2.1}}
    )
    assert plan.decided(experiment, {"scores": {"bits per byte": None}}) == -8.0


def test_a_standing_needs_an_interval_that_excludes_zero():
    def accuracy(ours):
        return lambda run: ours[run.seed - 1] if run.mixer == "splats" and run.seed else 0.5

    def verdict(*ours):
        rows, _ = work_through(EXPERIMENT, accuracy(ours))
        return standings.standing(
            "", EXPERIMENT, ("splats",), ("softmax",), rows, standings.partial(plan.decided, EXPERIMENT)
        ).verdict

    assert verdict(0.61, 0.62, 0.63) == "ahead"
    assert verdict(0.41, 0.42, 0.43) == "behind"
    assert verdict(0.41, 0.62, 0.63) == "no difference shown"


@pytest.mark.parametrize(
    ("scores", "pairs"),
    [
        ({"4 pairs": 0.8, "8 pairs": 0.95}, 0.0),
        ({"4 pairs": 0.95, "8 pairs": 0.90, "16 pairs": 0.5}, 8.0),
        ({"16 pairs": 0.8, "8 pairs": 1.0}, 8 * 2**0.5),
        ({"4 pairs": 1.0, "8 pairs": 1.0}, 8.0),
    ],
)
def test_pairs_at_90_percent(scores, pairs):
    assert standings.pairs_at({"scores": scores}) == pytest.approx(pairs)


@pytest.mark.parametrize("module", [intervals, plan, standings])
def test_examples_in_docstrings(module):
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed
