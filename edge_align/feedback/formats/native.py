"""Our own format: TRL's columns plus `edited`, `origin`, `weight`, `reason`, `tags`, `ts` (all optional).

`{"prompt", "completion", "edited"}` is a correction: the edited text is preferred to what the model wrote.
"""

from __future__ import annotations

from edge_align.errors import InputError
from edge_align.feedback import turns
from edge_align.feedback.fields import Format, Record, text, with_extras
from edge_align.feedback.formats import trl
from edge_align.records import FeedbackRow

OWN = frozenset({"edited", "origin", "weight", "reason", "tags", "ts"})


def matches(record: Record) -> bool:
    if {"prompt", "completion", "edited"} <= record.keys():
        return True
    return trl.matches(record) and not OWN.isdisjoint(record.keys())


def read(record: Record) -> list[FeedbackRow]:
    if {"chosen", "rejected"} <= record.keys():
        row = turns.pair(record, source="native")
    elif record.get("edited") is None:
        row = turns.rating(record, source="native")
    else:
        row = correction(record)
    return [with_extras(row, record)]


def correction(record: Record) -> FeedbackRow:
    """An edit as a pair; an edit that changed nothing counts as its label, if there is one."""
    edited = text(record["edited"], "edited")
    before, written = turns.answer(record.get("completion"), "completion")
    if edited == written:
        if record.get("label") is None:
            raise InputError("edited is the same text as completion")
        return turns.rating(record, source="native")
    given = None if record.get("prompt") is None else turns.prompt(record["prompt"])
    asked = turns.merge(given, before, "completion")
    return FeedbackRow(asked, chosen=edited, rejected=written, origin="edit", source="native")


FORMAT = Format("native", matches, read)
