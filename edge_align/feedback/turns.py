"""Conversations in foreign records: message lists, answers, and the prompt two answers share."""

from __future__ import annotations

from edge_align.errors import InputError
from edge_align.feedback.fields import brief, kind, label, Record, text
from edge_align.records import FeedbackRow, Message, Prompt, ROLES, user_prompt


def content(value: object, name: str) -> str:
    """The text of a message: a string, or a list of `{"type": "text", "text": ...}` parts."""
    if not isinstance(value, list):
        return text(value, name)
    parts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise InputError(f"{name} holds something other than text")
        parts.append(text(part.get("text"), name))
    return "".join(parts)


def message(value: object, name: str) -> Message:
    """One `{"role", "content"}` object; tool calls and roles other than system, user, assistant are refused."""
    if not isinstance(value, dict):
        raise InputError(f"{name} holds {kind(value)} where a message belongs")
    role = value.get("role")
    if role not in ROLES:
        raise InputError(f"{name} has a message of role {brief(role)}; only {', '.join(ROLES)} can be learnt from")
    if value.get("tool_calls"):
        raise InputError(f"{name} holds tool calls; only text can be learnt from")
    return Message(role, content(value.get("content"), name))


def messages(value: object, name: str) -> Prompt:
    """A list of messages."""
    if not isinstance(value, list):
        raise InputError(f"{name} is {kind(value)}; it must be text or a list of messages")
    return tuple(message(item, name) for item in value)


def prompt(value: object) -> Prompt:
    """A prompt: text becomes one user message."""
    return user_prompt(value) if isinstance(value, str) else messages(value, "prompt")


def answer(value: object, name: str) -> tuple[Prompt, str]:
    """(turns before the answer, the answer) of a text or of a list of messages that ends with the assistant's."""
    if isinstance(value, str):
        return (), value
    turns = messages(value, name)
    if not turns or turns[-1].role != "assistant":
        raise InputError(f"{name} does not end with an answer of the assistant")
    return turns[:-1], turns[-1].content


def merge(given: Prompt | None, before: Prompt, name: str) -> Prompt:
    """The prompt, from its own column and from the turns that `name` repeats before its answer."""
    if not before:
        if given is None:
            raise InputError("there is no prompt; add a prompt column")
        return given
    if given is None or given == before:
        return before
    # A text prompt beside whole conversations repeats one question of them, as in ultrafeedback_binarized.
    if len(given) == 1 and any(m.role == "user" and m.content.strip() == given[0].content.strip() for m in before):
        return before
    raise InputError(f"the turns before the answer in {name} are not the prompt")


def split_common(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two texts that begin alike, cut where a word ends.

    Words are not cut ("bl|ue" against "bl|ack"), so the answers begin with the space before their first word.
    """
    limit = min(len(chosen), len(rejected))
    cut = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    while cut and not (chosen[cut : cut + 1].isspace() and rejected[cut : cut + 1].isspace()):
        cut -= 1
    head = chosen[:cut]
    cut = len(head.rstrip())
    if not cut:
        raise InputError("there is no prompt, and chosen and rejected do not begin alike; add a prompt column")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def pair(record: Record, *, source: str) -> FeedbackRow:
    """A row from `chosen` and `rejected` (texts or message lists), with `prompt` given or implied."""
    given = None if record.get("prompt") is None else prompt(record["prompt"])
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if given is None and isinstance(chosen, str) and isinstance(rejected, str):
        if chosen == rejected:
            raise InputError("chosen and rejected are the same text")
        head, chosen, rejected = split_common(chosen, rejected)
        return FeedbackRow(user_prompt(head), chosen=chosen, rejected=rejected, source=source)
    before, better = answer(chosen, "chosen")
    other, worse = answer(rejected, "rejected")
    turns = merge(given, before, "chosen")
    if merge(given, other, "rejected") != turns:
        raise InputError("chosen and rejected differ before their last answer")
    return FeedbackRow(turns, chosen=better, rejected=worse, source=source)


def rating(record: Record, *, source: str) -> FeedbackRow:
    """A row from `prompt`, `completion` and `label`."""
    verdict = label(record.get("label"))
    given = None if record.get("prompt") is None else prompt(record["prompt"])
    before, completion = answer(record.get("completion"), "completion")
    turns = merge(given, before, "completion")
    return FeedbackRow(turns, completion=completion, label=verdict, origin="thumb", source=source)
