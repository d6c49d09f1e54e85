"""Telling what a file and a record are: JSON lines, whole JSON or CSV, and which format a record has."""

from __future__ import annotations

import json
from typing import Literal

from edge_align.errors import InputError
from edge_align.feedback.fields import Format, kind
from edge_align.feedback.formats import (
    chatgpt,
    csv,
    gpt4all,
    hh_rlhf,
    lm_studio,
    native,
    open_webui,
    openai,
    trl,
    ultrafeedback,
    ultrafeedback_binarized,
)

FORMATS: tuple[Format, ...] = (  # the first that matches reads the record
    open_webui.FORMAT,
    openai.FORMAT,
    ultrafeedback.FORMAT,
    ultrafeedback_binarized.FORMAT,
    chatgpt.FORMAT,
    lm_studio.FORMAT,
    gpt4all.FORMAT,
    hh_rlhf.FORMAT,
    native.FORMAT,
    trl.FORMAT,
)

SOURCES = frozenset(f.name for f in (*FORMATS, csv.FORMAT))
"""Every reader's name, as it stands in `FeedbackRow.source`."""

Container = Literal["lines", "whole", "csv"]

BOM = b"\xef\xbb\xbf"

_MAGIC = (
    (b"\x1f\x8b", "gzip; unpack it first"),
    (b"PK\x03\x04", "a ZIP archive; unpack it first"),
    (b"PAR1", "a Parquet file; convert it to JSON lines"),
    (b"SQLite format 3\x00", "a SQLite database; export its feedback as JSON"),
    (b"\xff\xfe", "UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16; save it as UTF-8"),
)
_CONTROLS = bytes(c for c in range(32) if c not in b"\t\n\v\f\r\x1b")
_NO_VERDICT = (
    (("completions", "labels"), "stepwise feedback rates steps, not whole answers"),
    (("text",), "a text alone carries no preference"),
    (("mapping",), "an exported chat carries no verdicts"),
    (("messages",), "a chat alone carries no preference"),
    (("conversation",), "a chat alone carries no preference"),
    (("prompt", "completion"), "there is no verdict; add a label, or an edited answer as edited"),
    (("prompt",), "a prompt alone carries no preference"),
)


def detect(value: object) -> Format:
    """The format of one decoded JSON value; InputError says what was seen and what is known."""
    if not isinstance(value, dict):
        raise InputError(f"the row is {kind(value)}; it must be an object")
    for found in FORMATS:
        if found.matches(value):
            return found
    if not {"chosen", "rejected"} & value.keys():
        for keys, reason in _NO_VERDICT:
            if value.keys() >= set(keys):
                raise InputError(f"{reason}; give prompt, chosen, rejected or prompt, completion, label")
    names = [repr(key[:24]) for key in list(value)[:8]]
    seen = ", ".join(names) + (", ..." if len(value) > 8 else "") if names else "none"
    raise InputError(f"unknown format with keys {seen}; known formats: {', '.join(sorted(SOURCES))}")


def container(head: bytes, *, name: str) -> Container:
    """What kind of file begins with `head` (its first kilobytes, byte-order mark removed).

    Raises InputError for what is no text.
    """
    for magic, what in _MAGIC:
        if head.startswith(magic):
            raise InputError(f"{name} is {what}")
    controls = sum(head.count(c) for c in _CONTROLS) / max(len(head), 1)
    if controls > 0.3 or (controls > 0.02 and not is_utf8(head)):
        raise InputError(f"{name} is a binary file; give JSON lines, a JSON array or CSV in UTF-8")
    start = head.lstrip()
    if start[:1] == b"[":
        return "whole" if start[1:].lstrip()[:1] in (b"{", b"]", b"") else "lines"
    first = start.split(b"\n", 1)[0].rstrip()
    if start[:1] == b"{":
        # An object whose first line stops inside it was written over several lines.
        return "whole" if first[-1:] in (b"{", b"[", b",") and not is_json(first) else "lines"
    return "csv" if name.lower().endswith((".csv", ".tsv")) or is_header(first) else "lines"


def is_utf8(head: bytes) -> bool:
    """Is `head` UTF-8, but for a character cut at its end?"""
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3
    return True


def is_json(line: bytes) -> bool:
    """Does `line` decode as one JSON value?"""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def is_header(line: bytes) -> bool:
    """Does `line` look like the header of a CSV file we can read?"""
    text = line.decode("utf-8", "replace")
    return any(csv.matches(dict.fromkeys(header(text, delimiter))) for delimiter in DELIMITERS)


DELIMITERS = (",", ";", "\t")


def header(line: str, delimiter: str) -> list[str]:
    """Column names as they are looked up: unquoted, stripped, lower case."""
    return [cell.strip().strip('"').strip().lower() for cell in line.split(delimiter)]
