"""The scenes of `examples/two_views.py`, and who can hear whom in each arrangement."""

import pytest
import torch
from examples.two_views import ARRANGEMENTS, NUM_KINDS, PLACE_ERROR, TwoViews, draw_scenes

BATCH = 13


def scenes():
    return draw_scenes(BATCH, torch.Generator().manual_seed(5))


def test_what_is_asked_of_a_view_is_what_the_other_one_sees():
    drawn = scenes()
    both = drawn.seen[0] & drawn.seen[1]
    for view in range(2):
        shown = drawn.views[1 - view][..., 2:].argmax(-1)
        assert torch.equal(drawn.asked[view] >= 0, both)
        assert torch.equal(drawn.asked[view][both], shown[both])
    apart = (drawn.views[0] - drawn.views[1])[..., :2]
    assert 0 < apart.abs().max() < 10 * PLACE_ERROR


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_a_view_hears_the_other_one_unless_they_are_apart(arrangement):
    torch.manual_seed(0)
    model, drawn = TwoViews(arrangement).eval(), scenes()
    answers = model(drawn)
    assert [answer.shape for answer in answers] == 2 * [(BATCH, *drawn.seen[0].shape[1:], NUM_KINDS)]
    for view in range(2):
        views = list(drawn.views)
        views[1 - view] = views[1 - view].flip(0)
        changed = model(drawn._replace(views=views))[view]
        assert torch.equal(changed, answers[view]) == (arrangement == "apart")


def test_all_arrangements_but_the_doubled_ones_remember_equally_much():
    shared = ARRANGEMENTS["shared"][1]
    for arrangement, (make, num_splats) in ARRANGEMENTS.items():
        made = [parameter for name, parameter in make().named_parameters() if name.endswith("centers")]
        assert sum(centers.shape[1] for centers in made) == num_splats
        assert num_splats == shared * (2 if arrangement in ("exchanged, twice the state", "apart") else 1)
