"""ChatGPT's data export, conversations.json: chats as trees of messages; an answer may have been written again.

The export holds no verdicts. Of several answers to one message, the one on the path to `current_node` is where the
person went on; it makes a pair with each of the others, of half the weight of a verdict that was given in words.
"""

from __future__ import annotations

from edge_align.errors import InputError
from edge_align.feedback.fields import Format, optional_text, Record, text, timestamp
from edge_align.records import FeedbackRow, Message, ROLES

NAME = "chatgpt"
IMPLICIT = 0.5  # weight of a preference that nobody stated


def matches(record: Record) -> bool:
    return isinstance(record.get("mapping"), dict) and "current_node" in record


def read(record: Record) -> list[FeedbackRow]:
    tree = {key: node for key, node in record["mapping"].items() if isinstance(node, dict)}
    path = path_to(tree, text(record.get("current_node"), "current_node"))
    before: list[Message] = []
    rows: list[FeedbackRow] = []
    for step in path:
        turn = turn_of(tree[step])
        if turn is None:
            continue
        if turn.role == "assistant" and before and before[-1].role == "user":
            rows += pairs(tree, step, turn.content, tuple(before))
        before.append(turn)
    if not rows:
        raise InputError("the chat carries no preference: none of its answers was written again and gone on from")
    return rows


def path_to(tree: dict[str, Record], node: str) -> list[str]:
    """Ids from the root to `node`."""
    path: list[str] = []
    step: object = node
    while step is not None:
        if not isinstance(step, str) or step not in tree:
            raise InputError("the chat lacks its current message or one before it")
        if len(path) >= len(tree):
            raise InputError("the messages of the chat form a circle")
        path.append(step)
        step = tree[step].get("parent")
    return path[::-1]


def turn_of(node: Record) -> Message | None:
    """The message of a node; None for one without text: the root, hidden settings, tools, pictures."""
    message = node.get("message")
    author = message.get("author") if isinstance(message, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(author, dict) or not isinstance(content, dict) or content.get("content_type") != "text":
        return None
    parts = content.get("parts")
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        return None
    joined = "".join(parts)
    role = author.get("role")
    return Message(role, joined) if role in ROLES and joined.strip() else None


def pairs(tree: dict[str, Record], chosen: str, answer: str, asked: tuple[Message, ...]) -> list[FeedbackRow]:
    """The answer that was gone on from, against each other one to the same message."""
    parent = tree[chosen].get("parent")
    rows = []
    for key, node in tree.items():
        other = turn_of(node) if key != chosen and node.get("parent") == parent else None
        if other is None or other.role != "assistant" or other.content == answer:
            continue
        message = node["message"]
        metadata = message.get("metadata")
        model = metadata.get("model_slug") if isinstance(metadata, dict) else None
        rows.append(
            FeedbackRow(
                asked,
                chosen=answer,
                rejected=other.content,
                origin="siblings",
                weight=IMPLICIT,
                ts=timestamp(message.get("create_time"), "create_time"),
                model=optional_text(model, "model_slug"),
                id=f"{chosen}:{key}",
                source=NAME,
            )
        )
    return rows


FORMAT = Format(NAME, matches, read)
