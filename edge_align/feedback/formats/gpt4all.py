"""Rated chats in the shape of the GPT4All datalake.

A message may carry `rating` ("positive", "negative") or `edited_content`.
An edited answer becomes a pair (the edit is preferred); a rated one without an edit is unpaired feedback.
"""

from __future__ import annotations

from edge_align.errors import InputError
from edge_align.feedback import turns
from edge_align.feedback.fields import Format, label, optional_text, Record, text
from edge_align.records import FeedbackRow, Message

_RATINGS = {"positive": True, "negative": False}
_VERDICT = {"rating", "edited_content"}


def matches(record: Record) -> bool:
    if "role" in record:  # a message on its own
        return not _VERDICT.isdisjoint(record.keys())
    return any(isinstance(turn, dict) and not _VERDICT.isdisjoint(turn.keys()) for turn in conversation(record))


def conversation(record: Record) -> list[object]:
    """The list of messages, or nothing."""
    value = record.get("conversation", record.get("messages"))
    return value if isinstance(value, list) else []


def read(record: Record) -> list[FeedbackRow]:
    if "role" in record:
        raise InputError("this is one rated message without its question; export the whole conversation")
    model = optional_text(record.get("agent_id"), "agent_id")
    before: list[Message] = []
    rows = []
    for value in conversation(record):
        turn = turns.message(value, "conversation")
        if isinstance(value, dict) and turn.role == "assistant" and not _VERDICT.isdisjoint(value.keys()):
            rows += verdict(tuple(before), turn.content, value, model)
        before.append(turn)
    if not rows:
        raise InputError("no answer of the conversation is rated or edited")
    return rows


def verdict(asked: tuple[Message, ...], written: str, turn: Record, model: str | None) -> list[FeedbackRow]:
    """The row of one rated or edited answer; none where both fields are empty."""
    edited = turn.get("edited_content")
    if edited and edited != written:
        better = text(edited, "edited_content")
        return [FeedbackRow(asked, chosen=better, rejected=written, origin="edit", model=model, source="gpt4all")]
    rating = turn.get("rating")
    if rating is None:
        return []
    good = _RATINGS[rating] if isinstance(rating, str) and rating in _RATINGS else label(rating, "rating")
    return [FeedbackRow(asked, completion=written, label=good, origin="thumb", model=model, source="gpt4all")]


FORMAT = Format("gpt4all", matches, read)
