r"""Anthropic hh-rlhf: two whole transcripts with "\n\nHuman: " and "\n\nAssistant: " turns that differ in the last."""

from __future__ import annotations

import re

from edge_align.errors import InputError
from edge_align.feedback.fields import Format, Record, text
from edge_align.records import FeedbackRow, Message, Prompt

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):(?: |(?=\n)|$)")


def matches(record: Record) -> bool:
    if "prompt" in record or not {"chosen", "rejected"} <= record.keys():
        return False
    chosen = record["chosen"]
    return isinstance(chosen, str) and chosen.lstrip("\n").startswith("Human:") and "\n\nAssistant:" in chosen


def read(record: Record) -> list[FeedbackRow]:
    *asked, chosen = transcript(record["chosen"], "chosen")
    *other, rejected = transcript(record["rejected"], "rejected")
    if asked != other:
        raise InputError("the two transcripts differ before their last answer")
    if chosen.role != "assistant" or rejected.role != "assistant":
        raise InputError("a transcript does not end with an answer of the assistant")
    return [FeedbackRow(tuple(asked), chosen=chosen.content, rejected=rejected.content, source="hh_rlhf")]


def transcript(value: object, name: str) -> Prompt:
    """The turns of a transcript, at least one."""
    parts = _TURN.split(text(value, name))  # [head, speaker, content, speaker, content, ...]
    if len(parts) < 3 or parts[0].strip():
        raise InputError(f"{name} is not a Human / Assistant transcript")
    return tuple(
        Message("user" if speaker == "Human" else "assistant", content)
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    )


FORMAT = Format("hh_rlhf", matches, read)
