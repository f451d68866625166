"""Measurements of splat attention, their records, and the page that shows them."""

from splatflow.diagnostics.measure import commit, machine, peak_memory, time_calls
from splatflow.diagnostics.page import Section, escape, figure_learning_curves, figure_scaling, page, table
from splatflow.diagnostics.records import read_records, write_record

__all__ = [
    "Section",
    "commit",
    "escape",
    "figure_learning_curves",
    "figure_scaling",
    "machine",
    "page",
    "peak_memory",
    "read_records",
    "table",
    "time_calls",
    "write_record",
]
