"""OpenAI preference fine-tuning: `input.messages`, `preferred_output`, `non_preferred_output`."""

from __future__ import annotations

from edge_align.errors import InputError
from edge_align.feedback import turns
from edge_align.feedback.fields import Format, kind, Record, with_extras
from edge_align.records import FeedbackRow


def matches(record: Record) -> bool:
    return {"input", "preferred_output", "non_preferred_output"} <= record.keys()


def read(record: Record) -> list[FeedbackRow]:
    given = record["input"]
    if not isinstance(given, dict):
        raise InputError(f"input is {kind(given)}; it must be an object with messages")
    asked = turns.messages(given.get("messages"), "input.messages")
    chosen = output(record["preferred_output"], "preferred_output")
    rejected = output(record["non_preferred_output"], "non_preferred_output")
    return [with_extras(FeedbackRow(asked, chosen=chosen, rejected=rejected, source="openai"), record)]


def output(value: object, name: str) -> str:
    """The one assistant message of an output."""
    before, text = turns.answer(value, name)
    if before:
        raise InputError(f"{name} holds more than one message")
    return text


FORMAT = Format("openai", matches, read)
