"""Lines of a CSV file with the columns prompt, chosen, rejected or prompt, completion, label (or edited).

The native metadata columns (weight, reason, tags, ts, model, id) may stand beside them. An empty cell is a
missing value.
"""

from __future__ import annotations

from dataclasses import replace

from edge_align.errors import InputError
from edge_align.feedback.fields import Format, Record
from edge_align.feedback.formats import native
from edge_align.records import FeedbackRow

COLUMNS = (("prompt", "chosen", "rejected"), ("prompt", "completion", "label"), ("prompt", "completion", "edited"))


def matches(record: Record) -> bool:
    return any(record.keys() >= set(columns) for columns in COLUMNS)


def read(record: Record) -> list[FeedbackRow]:
    filled = {name: value for name, value in record.items() if value != ""}
    paired = {"chosen", "rejected"} & filled.keys()
    needed = ("prompt", "chosen", "rejected") if paired else ("prompt", "completion")
    for name in needed:
        if name not in filled:
            raise InputError(f"{name} is empty")
    if not paired and "edited" not in filled and "label" not in filled:
        raise InputError("label is empty")
    return [replace(row, source="csv") for row in native.read(filled)]


FORMAT = Format("csv", matches, read)
