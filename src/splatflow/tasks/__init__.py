"""Tasks that ask for one ability: a seed -> inputs and labels."""

from .recall import IGNORED, multi_query_recall

# A new task is one file and one row here.
TASKS = {"recall": multi_query_recall}

__all__ = ["IGNORED", "TASKS", "multi_query_recall"]
