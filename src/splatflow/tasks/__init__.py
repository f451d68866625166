"""Tasks that ask for one ability: a seed -> inputs and labels."""

from functools import partial

from .copying import copying, selective_copying
from .induction import induction
from .recall import IGNORED, multi_query_recall

# A new task is one function and one row here; all are called as task(seed, batch_size=..., seq_len=...).
TASKS = {
    "recall": multi_query_recall,
    "rebound recall": partial(multi_query_recall, num_rebound=4),
    "noisy recall": partial(multi_query_recall, num_noise=8),
    "copying": copying,
    "selective copying": selective_copying,
    "induction": induction,
}

__all__ = ["IGNORED", "TASKS", "copying", "induction", "multi_query_recall", "selective_copying"]
