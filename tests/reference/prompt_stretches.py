"""How a prompt is read: its parts joined as long as a stretch of them stays within a number of tokens."""

from __future__ import annotations

from collections.abc import Iterable


def stretches(parts: Iterable[int], most: int) -> list[int]:
    """Tokens of each stretch, from the tokens of each part."""
    found: list[int] = []
    for n in parts:
        if found and found[-1] + n <= most:
            found[-1] += n
        else:
            found.append(n)
    return found
