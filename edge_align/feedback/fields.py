"""Reading single fields of a foreign record: each function returns a clean value or says what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, UTC
from typing import Any, get_args

from edge_align.errors import InputError
from edge_align.records import FeedbackRow, Origin

Record = dict[str, Any]
"""One decoded JSON object, or one CSV line keyed by its header."""


@dataclass(frozen=True, slots=True)
class Format:
    """How one kind of record is told from others and turned into rows.

    `matches` looks at keys and gross types only and never raises; `read` raises InputError with the reason
    when the record cannot be used, and nothing else.
    """

    name: str
    matches: Callable[[Record], bool]
    read: Callable[[Record], list[FeedbackRow]]


_LABELS = {
    **dict.fromkeys(("true", "1", "1.0", "up", "good", "\N{THUMBS UP SIGN}"), True),
    **dict.fromkeys(("false", "0", "0.0", "-1", "-1.0", "down", "bad", "\N{THUMBS DOWN SIGN}"), False),
}
_EMOJI_MODIFIERS = dict.fromkeys((0xFE0F, *range(0x1F3FB, 0x1F400)))  # variation selector, skin tones
_ORIGINS: dict[object, Origin] = {origin: origin for origin in get_args(Origin)}
_KINDS = ((bool, "true or false"), (str, "text"), (int, "a number"), (float, "a number"), (list, "a list"))


def kind(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "missing"
    return next((name for types, name in _KINDS if isinstance(value, types)), "an object")


def brief(value: object) -> str:
    """A JSON scalar as it can stand in a one-line message; containers are only named."""
    if isinstance(value, str):
        return repr(value if len(value) <= 24 else value[:24] + "...")
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        return "a huge number"
    return repr(value) if isinstance(value, bool | int | float) else kind(value)


def text(value: object, name: str) -> str:
    """`value` if it is a string; InputError otherwise."""
    if not isinstance(value, str):
        raise InputError(f"{name} is {kind(value)}; it must be text")
    return value


def optional_text(value: object, name: str) -> str | None:
    """A piece of metadata that can be stored as UTF-8: a string, a number taken as a string, or None."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= 64:
        value = str(value)
    if value is None:
        return None
    if not isinstance(value, str):
        raise InputError(f"{name} is {kind(value)}; it must be text")
    if "\x00" in value:
        raise InputError(f"{name} holds a NUL character")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise InputError(f"{name} holds a lone surrogate")
    return value


def label(value: object, name: str = "label") -> bool:
    """A verdict: true/false, 1/0, 1/-1, up/down, good/bad or a thumb; InputError names anything else."""
    if value is None:
        raise InputError(f"{name} is missing")
    spelling = str(value) if isinstance(value, bool | float) else value
    if isinstance(value, int) and not isinstance(value, bool):
        spelling = str(value) if -1 <= value <= 1 else None
    if isinstance(spelling, str):
        found = _LABELS.get(spelling.strip().lower().translate(_EMOJI_MODIFIERS))
        if found is not None:
            return found
    raise InputError(f"unknown {name} {brief(value)}; use true/false, 1/0, 1/-1, up/down, good/bad or a thumbs emoji")


def number(value: object, name: str) -> float:
    """A finite number, or a string that spells one."""
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            found = float(value)
            if math.isfinite(found):
                return found
    except (ValueError, OverflowError):
        pass
    raise InputError(f"{name} is {brief(value)}; it must be a number")


def timestamp(value: object, name: str) -> str | None:
    """ISO 8601 text as the source gave it; a number counts from 1970 in s, ms, us or ns by its size (UTC)."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return optional_text(value, name)
    seconds = number(value, name)
    for _ in range(3):
        if abs(seconds) >= 1e11:  # as seconds, the year 5138
            seconds /= 1000
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat()
    except (ValueError, OverflowError, OSError):
        raise InputError(f"{name} is {brief(value)}; it is not a time") from None


def tags(value: object) -> tuple[str, ...]:
    """Tags as a list of strings, or one string with commas."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list):
        raise InputError(f"tags is {kind(value)}; it must be a list of texts")
    if not all(isinstance(tag, str) for tag in value):
        raise InputError("tags holds something other than text")
    return tuple(optional_text(tag, "a tag") or "" for tag in value)


def with_extras(row: FeedbackRow, record: Record) -> FeedbackRow:
    """`row` with the metadata columns of the native format taken from `record`.

    A known `origin` marks a row that edge-align wrote; only then is its `source` believed, because other
    data sets use a `source` column for something else.
    """
    origin = record.get("origin")
    known = _ORIGINS.get(origin) if isinstance(origin, str) else None
    source = optional_text(record.get("source"), "source") if known else None
    weight = record.get("weight")
    return replace(
        row,
        origin=known or row.origin,
        weight=row.weight if weight is None else number(weight, "weight"),
        reason=optional_text(record.get("reason"), "reason"),
        tags=tags(record.get("tags")),
        ts=timestamp(record.get("ts"), "ts"),
        model=optional_text(record.get("model"), "model"),
        id=optional_text(record.get("id"), "id"),
        source=row.source if source is None else source,
    )
