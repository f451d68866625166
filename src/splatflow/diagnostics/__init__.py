"""Measurements of splat attention, their records, and the page that shows them."""

from splatflow.diagnostics.measure import commit, machine, peak_memory, time_calls
from splatflow.diagnostics.page import (
    COLORS,
    Section,
    drawing,
    escape,
    figure_learning_curves,
    figure_scaling,
    name_at_right_edge,
    page,
    svg_text,
    table,
)
from splatflow.diagnostics.records import read_records, write_record

__all__ = [
    "COLORS",
    "Section",
    "commit",
    "drawing",
    "escape",
    "figure_learning_curves",
    "figure_scaling",
    "machine",
    "name_at_right_edge",
    "page",
    "peak_memory",
    "read_records",
    "svg_text",
    "table",
    "time_calls",
    "write_record",
]
