"""Open WebUI's feedback export: rated messages, each with a snapshot of its chat as a tree of messages.

The prompt of a rated message is its path to the root. Two answers under one parent with opposite verdicts become a
pair; other verdicts stay unpaired. A verdict's weight comes from the 1..10 rating a person may add to the thumb:
distance from the middle of the scale over its mean, |rating - 5.5| / 2.5, so 6..10 (or 5..1 for a thumb down) give
0.2, 0.6, 1, 1.4, 1.8; a rating on the wrong side of the thumb counts as the weakest, none as 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from edge_align.errors import InputError
from edge_align.feedback import turns
from edge_align.feedback.fields import (
    brief,
    Format,
    number,
    optional_text,
    Record,
    tags,
    text,
    timestamp,
)
from edge_align.records import FeedbackRow, Prompt

NAME = "open_webui"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One rated message, taken out of its snapshot."""

    record: int  # line or index in the file
    user: str | None
    chat: str
    message: str
    parent: str
    prompt: Prompt
    completion: str
    label: bool
    weight: float
    time: float  # when it was last changed, for ordering only
    reason: str | None
    tags: tuple[str, ...]
    ts: str | None
    model: str | None
    id: str | None
    annotated: tuple[Verdict, ...] = ()  # siblings that the snapshot itself marks as rated

    def key(self) -> tuple[str | None, str, str]:
        return self.user, self.chat, self.message

    def order(self) -> tuple[float, int]:
        return self.time, self.record


def matches(record: Record) -> bool:
    if record.get("type") == "rating" and ("data" in record or "meta" in record):
        return True
    data = record.get("data")
    return isinstance(data, dict) and "rating" in data and "meta" in record


def read(record: Record) -> list[FeedbackRow]:
    """The rows of one record on its own; a whole export goes through `parse` and `resolve`."""
    return [row for _, row in resolve([parse(record)])[0]]


def parse(record: Record, number_in_file: int = 1) -> Verdict:
    """The verdict of one record; InputError says why there is none."""
    data, meta = record.get("data"), record.get("meta")
    if not isinstance(data, dict) or not isinstance(meta, dict):
        raise InputError("data or meta is not an object")
    if not record.get("snapshot"):
        raise InputError("there is no snapshot of the chat, so its texts are unknown; export again with the chats")
    verdict = thumb(data.get("rating"))
    tree, chat = messages_of(record["snapshot"])
    message = text(meta.get("message_id"), "meta.message_id")
    path = path_to(tree, message)
    if len(path) < 2:
        raise InputError("the rated message has no question before it")
    changed = record.get("updated_at") or record.get("created_at")
    reasons = [optional_text(data.get(name), name) for name in ("reason", "comment")]
    parent = text(tree[message].get("parentId"), "parentId")
    found = Verdict(
        record=number_in_file,
        user=optional_text(record.get("user_id"), "user_id"),
        chat=optional_text(meta.get("chat_id"), "meta.chat_id") or chat or "",
        message=message,
        parent=parent,
        prompt=tuple(turns.message(tree[step], "the chat") for step in path[:-1]),
        completion=answer(tree[message]),
        label=verdict,
        weight=weight(verdict, data.get("details")),
        time=number(changed, "updated_at") if isinstance(changed, int | float) else 0.0,
        reason=": ".join(part for part in reasons if part) or None,
        tags=tags(data.get("tags")),
        ts=timestamp(changed, "updated_at"),
        model=optional_text(meta.get("model_id") or data.get("model_id"), "model_id"),
        id=optional_text(record.get("id"), "id"),
    )
    lone_row(found)  # refuses texts that make no row, here where the record is still known
    return with_annotated(found, tree)


def messages_of(snapshot: object) -> tuple[dict[str, Record], str | None]:
    """(messages by id, chat id) of a snapshot."""
    outer = snapshot.get("chat") if isinstance(snapshot, dict) else None
    chat = outer.get("chat") if isinstance(outer, dict) else None
    history = chat.get("history") if isinstance(chat, dict) else None
    found = history.get("messages") if isinstance(history, dict) else None
    if not isinstance(outer, dict) or not isinstance(found, dict):
        raise InputError("the snapshot holds no chat.chat.history.messages")
    tree = {key: value for key, value in found.items() if isinstance(value, dict)}
    return tree, optional_text(outer.get("id"), "snapshot.chat.id")


def path_to(tree: dict[str, Record], message: str) -> list[str]:
    """Ids from the root to `message`."""
    path: list[str] = []
    step: object = message
    while step is not None:
        if not isinstance(step, str) or step not in tree:
            raise InputError("the snapshot lacks the rated message or one before it")
        if len(path) >= len(tree):
            raise InputError("the messages of the snapshot form a circle")
        path.append(step)
        step = tree[step].get("parentId")
    return path[::-1]


def answer(node: Record) -> str:
    """The text of an assistant message."""
    turn = turns.message(node, "the chat")
    if turn.role != "assistant":
        raise InputError("the rated message is not an answer of the assistant")
    return turn.content


def thumb(value: object) -> bool:
    """1 or -1, as a number or as text; unlike other formats, 0 is no verdict here."""
    if isinstance(value, int | str) and not isinstance(value, bool) and value in (1, -1, "1", "-1"):
        return value in (1, "1")
    raise InputError(f"rating is {brief(value)}; it must be 1 or -1")


def weight(verdict: bool, details: object) -> float:
    """How much a verdict counts: see the module docstring."""
    rating = details.get("rating") if isinstance(details, dict) else None
    if rating is None:
        return 1.0
    scale = number(rating, "details.rating")
    if not 1.0 <= scale <= 10.0:
        raise InputError("details.rating is not between 1 and 10")
    distance = scale - 5.5 if verdict else 5.5 - scale
    return max(0.2, distance / 2.5)


def with_annotated(found: Verdict, tree: dict[str, Record]) -> Verdict:
    """`found` with the siblings that carry an annotation of the opposite sign."""
    siblings = []
    for key, node in tree.items():
        annotation = node.get("annotation")
        if key == found.message or node.get("parentId") != found.parent or not isinstance(annotation, dict):
            continue
        try:
            verdict = thumb(annotation.get("rating"))
            rated = replace(
                found,
                message=key,
                completion=answer(node),
                label=verdict,
                weight=weight(verdict, annotation.get("details")),
                model=optional_text(node.get("model"), "model"),
            )
            lone_row(rated)
        except InputError:
            continue  # a sibling only helps; the rated message stands without it
        if verdict != found.label:
            siblings.append(rated)
    return replace(found, annotated=tuple(siblings))


def choose_user(verdicts: Sequence[Verdict], user: str | None, *, name: str) -> None:
    """Raise InputError when it is not clear whose verdicts are meant."""
    users = sorted({verdict.user for verdict in verdicts if verdict.user is not None})
    shown = ", ".join(users[:5]) + (", ..." if len(users) > 5 else "")
    if user is None and len(users) > 1:
        raise InputError(f"{name} holds the feedback of {len(users)} users ({shown}); choose one with --user ID")
    if user is not None and users and user not in users:
        raise InputError(f"{name} holds no feedback of user {user!r}; it has {shown}")


def resolve(verdicts: Iterable[Verdict]) -> tuple[list[tuple[int, FeedbackRow]], list[tuple[int, str]]]:
    """Rows, oldest first, and reasons, each with its record; the last rating of a message replaces the others."""
    last: dict[tuple[str | None, str, str], Verdict] = {}
    dropped = []
    for verdict in sorted(verdicts, key=Verdict.order):
        older = last.pop(verdict.key(), None)
        if older is not None:
            dropped.append((older.record, "a later rating of the same message replaces this one"))
        last[verdict.key()] = verdict
    groups: dict[tuple[str | None, str, str], list[Verdict]] = defaultdict(list)
    for verdict in last.values():
        groups[verdict.user, verdict.chat, verdict.parent].append(verdict)
    rows: list[tuple[tuple[float, int], FeedbackRow]] = []
    for group in groups.values():
        rows += rows_of(group, last)
    return [(record, row) for (_, record), row in sorted(rows, key=lambda entry: entry[0])], dropped


def rows_of(
    group: list[Verdict], last: dict[tuple[str | None, str, str], Verdict]
) -> list[tuple[tuple[float, int], FeedbackRow]]:
    """Pairs of opposite verdicts under one parent, and the verdicts left over, each with its place in time."""
    annotated = {s.key(): s for verdict in group for s in verdict.annotated if s.key() not in last}
    everyone = [*group, *annotated.values()]
    paired: set[tuple[str | None, str, str]] = set()
    rows = []
    for up in (verdict for verdict in everyone if verdict.label):
        for down in (verdict for verdict in everyone if not verdict.label):
            both_annotated = up.key() in annotated and down.key() in annotated
            if both_annotated or up.completion == down.completion:
                continue
            newest = max((up, down), key=Verdict.order)
            rows.append((newest.order(), pair_row(up, down, newest)))
            paired |= {up.key(), down.key()}
    rows += [(verdict.order(), lone_row(verdict)) for verdict in group if verdict.key() not in paired]
    return rows


def pair_row(up: Verdict, down: Verdict, newest: Verdict) -> FeedbackRow:
    return FeedbackRow(
        newest.prompt,
        chosen=up.completion,
        rejected=down.completion,
        origin="siblings",
        weight=(up.weight + down.weight) / 2,
        reason=newest.reason,
        tags=newest.tags,
        ts=newest.ts,
        model=up.model,
        id=newest.id,
        source=NAME,
    )


def lone_row(verdict: Verdict) -> FeedbackRow:
    return FeedbackRow(
        verdict.prompt,
        completion=verdict.completion,
        label=verdict.label,
        origin="thumb",
        weight=verdict.weight,
        reason=verdict.reason,
        tags=verdict.tags,
        ts=verdict.ts,
        model=verdict.model,
        id=verdict.id,
        source=NAME,
    )


FORMAT = Format(NAME, matches, read)
