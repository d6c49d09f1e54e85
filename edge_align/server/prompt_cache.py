"""Prompts that were prefilled before, per owner: nobody's prompt can be told from how fast another's begins."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from edge_align.runtime.tokens import common_prefix

WORTH_KEEPING = 64  # tokens; copies of every short question would push out the long prompts


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """tokens: (n,) int32; data: their keys and values as the engine gave them."""

    owner: str
    tokens: np.ndarray
    data: bytes


class PromptCache:
    """Keys and values of prompts, LRU by bytes. Profiles of an owner share them: a prompt is prefilled unsteered."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[int, Kept] = OrderedDict()  # the oldest use first
        self._next = 0
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, owner: str, tokens: np.ndarray) -> tuple[Kept | None, int]:
        """The owner's prompt that shares most tokens from the start with `tokens`, and how many."""
        best, shared = None, 0
        for number, kept in self._kept.items():
            if kept.owner == owner and (length := common_prefix(kept.tokens, tokens)) > shared:
                best, shared = number, length
        if best is None:
            return None, 0
        self._kept.move_to_end(best)
        return self._kept[best], shared

    def covers(self, owner: str, tokens: np.ndarray) -> bool:
        """Is `tokens` the beginning of a prompt that is kept, or too short to keep?"""
        return len(tokens) < WORTH_KEEPING or self.find(owner, tokens)[1] == len(tokens)

    def put(self, owner: str, tokens: np.ndarray, data: bytes) -> None:
        """Keep a prompt; it replaces those that it continues."""
        if len(data) > self._limit:
            return
        for number, kept in list(self._kept.items()):
            if kept.owner == owner and common_prefix(kept.tokens, tokens) == len(kept.tokens):
                self._drop(number)
        self._kept[self._next] = Kept(owner, tokens.copy(), data)
        self._next += 1
        self.bytes += len(data)
        while self.bytes > self._limit:
            self._drop(next(iter(self._kept)))

    def forget(self, owner: str) -> None:
        """Drop all of an owner's prompts."""
        for number, kept in list(self._kept.items()):
            if kept.owner == owner:
                self._drop(number)

    def _drop(self, number: int) -> None:
        self.bytes -= len(self._kept.pop(number).data)
