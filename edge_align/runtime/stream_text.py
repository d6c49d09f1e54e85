"""From token bytes to text that may be shown: whole characters only, and nothing that may belong to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Feed the bytes of one token at a time; what comes back may be shown at once.

    Bytes that are not UTF-8 become U+FFFD. A stop string is never emitted: the text ends before its first occurrence,
    and `stopped` turns true.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._stops = tuple(stops)
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self.stopped = False

    def feed(self, piece: bytes) -> str:
        """Text that became certain with these bytes; may be empty."""
        text = self._decode(piece)
        return text if not self._stops else self._release(text)

    def finish(self) -> str:
        """What is left at the end of the answer."""
        text = self._decode(b"", True)
        if self._stops:
            text = self._release(text) + self._held
            self._held = ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop` (shorter than the whole of it)."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
