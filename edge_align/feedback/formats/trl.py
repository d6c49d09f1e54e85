"""TRL's preference and unpaired types, standard and conversational, with explicit or implicit prompt.

Shapes: huggingface.co/docs/trl/dataset_formats. KTO data sets are the unpaired type with their own label spellings.
"""

from __future__ import annotations

from edge_align.feedback import turns
from edge_align.feedback.fields import Format, Record, with_extras
from edge_align.records import FeedbackRow


def matches(record: Record) -> bool:
    return {"chosen", "rejected"} <= record.keys() or {"prompt", "completion", "label"} <= record.keys()


def read(record: Record) -> list[FeedbackRow]:
    build = turns.pair if {"chosen", "rejected"} <= record.keys() else turns.rating
    return [with_extras(build(record, source="trl"), record)]


FORMAT = Format("trl", matches, read)
