"""A `tokenizer.json` as the engines need it: control tokens parsed only on request, and the bytes of every token."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from edge_align.errors import BackendError, BackendUnavailable, InputError, ModelLoadError
from edge_align.files import shown

TEXT_LIMIT = 16 * 2**20  # bytes of one text to tokenise
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Raises ModelLoadError when the file is no tokenizer, BackendUnavailable without the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise BackendUnavailable('tokenizers is not installed; run: pip install "edge-align[onnx]"') from error
        try:
            text = path.read_text(encoding="utf-8")
            self._library = Library.from_str(text)
            document = json.loads(text)
        except Exception as error:  # the library raises bare Exception
            raise ModelLoadError(f"{shown(path)} is not a usable tokenizer: {_one_line(error)}") from error
        self._library.no_truncation()
        self._library.no_padding()
        self._byte_level = "ByteLevel" in json.dumps(document.get("decoder"))
        self._control = {
            int(token["id"]): str(token["content"]) for token in document.get("added_tokens", ()) if token["special"]
        }
        self._added = {int(token["id"]): str(token["content"]) for token in document.get("added_tokens", ())}
        self._pieces: dict[int, bytes] = {}
        self.n_vocab = int(self._library.get_vocab_size(with_added_tokens=True))

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids, no BOS or EOS added. Raises InputError for lone surrogates and texts over TEXT_LIMIT."""
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise InputError("the text holds a lone surrogate") from None
        if size > TEXT_LIMIT:
            raise InputError(f"the text is {size} bytes long; at most {TEXT_LIMIT} can be tokenised")
        self._library.encode_special_tokens = not special  # True: they are text like any other
        try:
            return [*self._library.encode(text, add_special_tokens=False).ids]
        except Exception as error:
            raise BackendError(f"the text cannot be tokenised: {_one_line(error)}") from error

    def piece(self, token: int) -> bytes:
        """Bytes of one token; a control token has none."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = b"" if token in self._control else self.text_of(token)
        return known

    def text_of(self, token: int) -> bytes:
        """Bytes of one token, control tokens spelt out; none for an id that has no token."""
        if token in self._added:
            return self._added[token].encode()
        text = self._library.id_to_token(token)
        if text is None:
            return b""
        if self._byte_level:
            table = byte_of_character()
            return bytes(table[c] for c in text if c in table)
        found = _BYTE.fullmatch(text)
        return bytes([int(found[1], 16)]) if found else str(text).replace("\u2581", " ").encode()

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, control tokens left out, bytes that are not UTF-8 as U+FFFD."""
        return b"".join(map(self.piece, tokens)).decode("utf-8", "replace")

    @property
    def control_pattern(self) -> re.Pattern[str] | None:
        """Matches every text that `tokenize(special=True)` reads as a control token."""
        texts = sorted({text for text in self._control.values() if text}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts))) if texts else None


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters, reversed (byte-level BPE)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
