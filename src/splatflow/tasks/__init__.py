"""Tasks that ask for one ability: a seed -> inputs and labels."""

from functools import partial

from .copying import copying, selective_copying
from .induction import induction
from .listops import listops
from .needle import needle
from .recall import IGNORED, multi_query_recall
from .text import consecutive_bytes, next_bytes, seen_before

# A new task is one function and one row here; all are called as task(seed, batch_size=..., seq_len=...).
TASKS = {
    "recall": multi_query_recall,
    "rebound recall": partial(multi_query_recall, num_rebound=4),
    "noisy recall": partial(multi_query_recall, num_noise=8),
    "copying": copying,
    "selective copying": selective_copying,
    "induction": induction,
    "listops": listops,
}
# Tasks that also need a text: task(seed, text=b"...", batch_size=..., seq_len=...).
TEXT_TASKS = {"needle": needle, "next byte": next_bytes}

__all__ = [
    "IGNORED",
    "TASKS",
    "TEXT_TASKS",
    "consecutive_bytes",
    "copying",
    "induction",
    "listops",
    "multi_query_recall",
    "needle",
    "next_bytes",
    "seen_before",
    "selective_copying",
]
