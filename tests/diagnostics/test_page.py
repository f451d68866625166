"""The page is whole, safe and the same every time; the pictures say what they were given."""

import re
import sys
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splatflow.diagnostics.page import (
    Section,
    escape,
    figure_learning_curves,
    figure_scaling,
    page,
    short_count,
    spread,
    table,
)

CURVES = {"splats": [(0, 8.0), (1000, 2.5), (2000, 2.0)], "soft<max": [(0, 8.1), (1000, 2.6), (2000, 2.01)]}
LEVELS = {"xz -9": 2.3, "5-gram": 2.1}
SCALING = [
    {"mixer": mixer, "seq_len": seq_len, "seconds": 1e-9 * seq_len**power, "bytes": 4096 * seq_len}
    for mixer, power in (("splats", 1), ("softmax", 2))
    for seq_len in (256, 512, 1024, 2048, 4096, 8192, 16384)
]


class Elements(HTMLParser):
    """Collects tags, text and identifiers, and checks that what opens closes in order."""

    NEVER_CLOSED = frozenset({"meta"})

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.identifiers, self.attributes, self._open = [], [], [], [], []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.NEVER_CLOSED:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.identifiers += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def whole_page():
    return page(
        "Splats & others",
        [
            Section("Held <out>", table(["model", "bits"], [["splats", 1.5], ["a<b", "1 & 2"]])),
            Section("Learning", figure_learning_curves(CURVES, LEVELS)),
            Section("Scaling", figure_scaling(SCALING)),
        ],
    )


def test_the_page_is_well_formed_and_says_everything():
    elements = Elements(whole_page())
    assert elements.tags.count("svg") == 3
    assert elements.tags.count("h2") == 3
    for text in ("Splats & others", "Held <out>", "a<b", "1 & 2", "1.5", "splats", "soft<max", *LEVELS):
        assert text in elements.texts


def test_the_page_needs_nothing_from_outside():
    elements = Elements(whole_page())
    assert not {"script", "link", "img", "iframe", "image"} & set(elements.tags)
    links = [value for name, value in elements.attributes if name in ("src", "href", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"@import|url\((?!#)", whole_page())


def test_identifiers_within_a_picture_are_unique_and_references_lead_somewhere():
    for picture in (figure_learning_curves(CURVES, LEVELS), figure_scaling(SCALING[:7]).partition("</svg>")[0]):
        identifiers = re.findall(r' id="([^"]+)"', picture)
        assert len(identifiers) == len(set(identifiers))
        assert set(re.findall(r'(?:href="|url\()#([\w.]+)', picture)) <= set(identifiers)


def test_the_same_numbers_give_the_same_bytes():
    assert whole_page() == whole_page()


def test_sequence_lengths_read_as_they_are_spoken():
    texts = Elements(figure_scaling(SCALING)).texts
    for tick in ("256", "1k", "4k", "16k", "milliseconds", "peak memory, MiB"):
        assert tick in texts


@pytest.mark.parametrize(
    ("count", "text"), [(7, "7"), (256, "256"), (1024, "1k"), (1536, "1.5k"), (131072, "128k"), (2**20, "1M")]
)
def test_short_count(count, text):
    assert short_count(count) == text


def test_a_picture_of_one_point_can_be_drawn():
    assert "<svg" in figure_scaling(SCALING[:1])
    assert "<svg" in figure_learning_curves({"splats": [(1000, 2.0)]})


@given(st.lists(st.floats(-1, 2), max_size=11))
def test_spread_keeps_the_gap_the_order_and_the_middle(positions):
    moved = spread(positions, 0.125)
    ordered = sorted(moved)
    assert all(above - below >= 0.125 - 1e-9 for below, above in pairwise(ordered))
    assert sum(moved) == pytest.approx(sum(positions), abs=1e-9)
    for first, moved_first in zip(positions, moved, strict=True):
        assert all(moved_first < other for low, other in zip(positions, moved, strict=True) if first < low)


def test_spread_leaves_alone_what_is_far_apart():
    assert spread([0.75, 0.25, 0.5], 0.25) == [0.75, 0.25, 0.5]


def test_escape_is_enough_for_a_section():
    assert "<script>" not in page("t", [Section("s", f"<pre>{escape('<script>')}</pre>")])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: table(["one", "two"], [[1, 2], [1]]), r"rows\[1\] has 1 cells, headers has 2"),
        (lambda: figure_learning_curves({}), "curves is empty"),
        (lambda: figure_learning_curves({"splats": []}), r"curves\['splats'\] is empty"),
        (lambda: figure_scaling([]), "rows is empty"),
        (lambda: figure_scaling([{"mixer": "splats", "seconds": 1.0}]), r"rows\[0\] lacks bytes, seq_len"),
        (lambda: figure_scaling([{**SCALING[0], "bytes": 0}]), r"rows\[0\]\['bytes'\] is 0"),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'splatflow\[viz\]'"):
        figure_scaling(SCALING)
