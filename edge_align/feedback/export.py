"""Writing feedback so that TRL trains on it and `read_feedback` gives the same rows back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edge_align.records import FeedbackRow


def to_trl(row: FeedbackRow) -> dict[str, Any]:
    """`row` as TRL's conversational preference or unpaired-preference type, explicit prompt.

    The columns after those (origin, weight, reason, tags, ts, model, id, source) are ours; trainers ignore them.
    """
    record: dict[str, Any] = {"prompt": [{"role": m.role, "content": m.content} for m in row.prompt]}
    if row.is_pair:
        record |= {"chosen": _answer(row.chosen), "rejected": _answer(row.rejected)}
    else:
        record |= {"completion": _answer(row.completion), "label": row.label}
    return record | {
        "origin": row.origin,
        "weight": row.weight,
        "reason": row.reason,
        "tags": list(row.tags),
        "ts": row.ts,
        "model": row.model,
        "id": row.id,
        "source": row.source,
    }


def _answer(text: str | None) -> list[Mapping[str, str | None]]:
    return [{"role": "assistant", "content": text}]


def to_line(row: FeedbackRow) -> str:
    """`to_trl(row)` as one line of JSON, newline included; non-ASCII text stays as it is, so lines stay short."""
    return json.dumps(to_trl(row), ensure_ascii=False) + "\n"
