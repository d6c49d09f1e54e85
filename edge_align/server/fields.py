"""Fields of a JSON request, each checked for type and range before anything else sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from edge_align.feedback.fields import brief
from edge_align.server.refusal import bad

Body = dict[str, Any]


def text(body: Body, name: str, *, most: int = 1 << 20) -> str | None:
    """A string field; None where it is missing or null."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise bad(f"{name} is {brief(value)}; it must be text", param=name)
    if len(value) > most:
        raise bad(f"{name} has {len(value)} characters; at most {most} are taken", param=name)
    return value


def flag(body: Body, name: str, *, default: bool = False) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise bad(f"{name} is {brief(value)}; it must be true or false", param=name)
    return value


def integer(body: Body, name: str, low: int, high: int) -> int | None:
    """A whole number within low..high; None where it is missing or null."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise bad(f"{name} is {brief(value)}; it must be a whole number", param=name)
    if not low <= value <= high:
        raise bad(f"{name} is {brief(value)}; it must lie between {low} and {high}", param=name)
    return value


def number(body: Body, name: str, low: float, high: float) -> float | None:
    """A number within low..high; None where it is missing or null."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise bad(f"{name} is {brief(value)}; it must be a number", param=name)
    if not low <= value <= high:
        raise bad(f"{name} is {brief(value)}; it must lie between {low:g} and {high:g}", param=name)
    return float(value)


def table(body: Body, name: str) -> Body | None:
    """An object field; None where it is missing or null."""
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise bad(f"{name} is {brief(value)}; it must be an object", param=name)
    return value


def items(body: Body, name: str, *, most: int) -> list[Any] | None:
    """A list field; None where it is missing or null."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, list):
        raise bad(f"{name} is {brief(value)}; it must be a list", param=name)
    if len(value) > most:
        raise bad(f"{name} has {len(value)} entries; at most {most} are taken", param=name)
    return value


def choice(body: Body, name: str, allowed: Sequence[str]) -> str | None:
    value = body.get(name)
    if value is not None and value not in allowed:
        raise bad(f"{name} is {brief(value)}; it must be one of {', '.join(allowed)}", param=name)
    return None if value is None else str(value)
