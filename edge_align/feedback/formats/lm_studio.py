"""LM Studio's chat files, *.conversation.json: each message in one or several versions, one of them selected.

The files hold no verdicts. The selected version of an answer makes a pair with each other one, of half the weight of a
verdict that was given in words.
"""

from __future__ import annotations

from edge_align.errors import InputError
from edge_align.feedback.fields import Format, kind, Record
from edge_align.records import FeedbackRow, Message, ROLES

NAME = "lm_studio"
IMPLICIT = 0.5  # weight of a preference that nobody stated


def matches(record: Record) -> bool:
    messages = record.get("messages")
    return isinstance(messages, list) and any(isinstance(one, dict) and "versions" in one for one in messages)


def read(record: Record) -> list[FeedbackRow]:
    before: list[Message] = []
    system = record.get("systemPrompt")
    if isinstance(system, str) and system.strip():
        before.append(Message("system", system))
    rows: list[FeedbackRow] = []
    for entry in record["messages"]:
        versions, selected = versions_of(entry)
        turn = turn_of(versions[selected])
        if turn is None:
            continue
        if turn.role == "assistant" and before and before[-1].role == "user":
            for version in versions:
                other = turn_of(version)
                if other is not None and other.role == "assistant" and other.content != turn.content:
                    rows.append(pair(tuple(before), turn.content, other.content))
        before.append(turn)
    if not rows:
        raise InputError("the chat carries no preference: none of its answers has a second version")
    return rows


def versions_of(entry: object) -> tuple[list[object], int]:
    """(all versions of a message, the number of the selected one)."""
    versions = entry.get("versions") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(versions, list) or not versions:
        raise InputError(f"messages holds {kind(entry)} without versions")
    selected = entry.get("currentlySelected", 0)
    if not isinstance(selected, int) or isinstance(selected, bool) or not 0 <= selected < len(versions):
        raise InputError("currentlySelected is not the number of a version")
    return versions, selected


def turn_of(version: object) -> Message | None:
    """The text of a version, in one step or several; None where there is none."""
    if not isinstance(version, dict) or version.get("role") not in ROLES:
        return None
    steps = version.get("steps")
    blocks = steps if isinstance(steps, list) else [version]
    parts = []
    for block in blocks:
        content = block.get("content") if isinstance(block, dict) and block.get("type") != "debugInfoBlock" else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
                parts.append(part["text"])
    joined = "".join(parts)
    return Message(version["role"], joined) if joined.strip() else None


def pair(asked: tuple[Message, ...], chosen: str, rejected: str) -> FeedbackRow:
    return FeedbackRow(asked, chosen=chosen, rejected=rejected, origin="siblings", weight=IMPLICIT, source=NAME)


FORMAT = Format(NAME, matches, read)
