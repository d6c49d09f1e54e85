"""HuggingFaceH4/ultrafeedback_binarized: the prompt as text, and whole conversations (question included) as answers."""

from __future__ import annotations

from edge_align.errors import InputError
from edge_align.feedback import turns
from edge_align.feedback.fields import Format, number, Record
from edge_align.records import FeedbackRow


def matches(record: Record) -> bool:
    return {"chosen", "rejected", "score_chosen", "score_rejected"} <= record.keys()


def read(record: Record) -> list[FeedbackRow]:
    row = turns.pair(record, source="ultrafeedback_binarized")
    if number(record["score_chosen"], "score_chosen") <= number(record["score_rejected"], "score_rejected"):
        raise InputError("score_chosen is not above score_rejected, so there is no preference")
    return [row]


FORMAT = Format("ultrafeedback_binarized", matches, read)
