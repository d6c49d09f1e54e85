"""Records out of bytes: JSON lines, whole JSON and CSV, each with its line, and errors in place of what is damaged."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Never

from edge_align.errors import InputError
from edge_align.feedback.detect import BOM, Container, DELIMITERS, header, is_json
from edge_align.feedback.fields import Record
from edge_align.feedback.formats import csv as csv_format

LINE_LIMIT = 8 << 20
"""Longest line read, in bytes: eight times ROW_LIMIT, so that every row that was read can be written and read again."""
FILE_LIMIT = 256 << 20
"""Largest file, in bytes, that must be read whole (a JSON array or a single object)."""
HEAD = 8192

Parsed = tuple[int, Any]
"""(1-based line or index, decoded value); an InputError in place of the value says why there is none."""


def records(source: ByteSource, kind: Container, *, name: str) -> Iterator[Parsed]:
    """The records of a file, streamed unless `kind` is "whole"; InputError when the whole file is unusable."""
    if kind == "whole":
        return whole_records(source, name=name)
    lines = Lines(io.BufferedReader(source, 1 << 16))
    return csv_records(lines, name=name) if kind == "csv" else line_records(lines)


def why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


class ByteSource(io.RawIOBase):
    """A byte stream whose beginning was looked at: no seek, a byte-order mark removed, errors translated."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream, self._name = stream, name
        head = self._take(HEAD)
        while len(head) < HEAD and (more := self._take(HEAD - len(head))):
            head += more
        self.head = self._left = head.removeprefix(BOM)

    def _take(self, size: int) -> bytes:
        try:
            return self._stream.read(size) or b""
        except (OSError, ValueError) as error:
            raise InputError(f"{self._name} cannot be read: {why(error)}") from None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._left[: len(buffer)] if self._left else self._take(len(buffer))
        self._left = self._left[len(data) :]
        buffer[: len(data)] = data
        return len(data)


class Lines:
    """Bounded lines of a byte stream, decoded; `next` raises InputError for one that cannot be used and goes on.

    `number` is the 1-based line that was read last, `whole` whether it ended in a newline.
    """

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self.number = 0
        self.whole = True

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(LINE_LIMIT + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.whole = line.endswith(b"\n")
        if len(line) > LINE_LIMIT and not self.whole:
            while (rest := self._file.readline(1 << 16)) and not rest.endswith(b"\n"):
                pass
            raise InputError(f"the line is longer than {LINE_LIMIT >> 20} MiB")
        try:
            return line.decode()
        except UnicodeDecodeError:
            raise InputError("the line is not UTF-8") from None


def line_records(lines: Lines) -> Iterator[Parsed]:
    while True:
        try:
            line = next(lines)
        except StopIteration:
            return
        except InputError as error:
            yield lines.number, error
            continue
        line = line.strip("\ufeff \t\r\n")
        if line:
            yield lines.number, _loads(line, cut=not lines.whole)


def _refuse(constant: str) -> Never:
    raise InputError(f"{constant} is not a JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse)
_BETWEEN = re.compile(r"[ \t\r\n,]*")


def _loads(line: str, *, cut: bool) -> Any:
    """The decoded value, or the InputError that says why there is none."""
    try:
        return _DECODER.decode(line)
    except InputError as error:
        return error
    except json.JSONDecodeError as error:
        if cut and line[:1] == "{" and line[-1:] != "}":
            return InputError("the file ends in the middle of this line; it was cut off")
        return InputError(f"not JSON at column {error.colno}: {error.msg}")
    except ValueError:
        return InputError("a number has too many digits")
    except RecursionError:
        return InputError("nested too deeply")


def whole_records(source: ByteSource, *, name: str) -> Iterator[Parsed]:
    """The elements of a JSON array, or of objects written over several lines, up to where the file is damaged."""
    data = io.BufferedReader(source).read(FILE_LIMIT + 1)
    if len(data) > FILE_LIMIT:
        raise InputError(f"{name} is over {FILE_LIMIT >> 20} MiB in one piece; convert it to JSON lines")
    # A byte that is not UTF-8 becomes a lone surrogate, which costs only the row that holds it.
    text = data.decode("utf-8", "surrogateescape")
    array = text.lstrip()[:1] == "["
    at = text.index("[") + 1 if array else 0
    index = 0
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # matches everywhere
        if at == len(text) or (array and text[at] == "]"):
            break
        index += 1
        try:
            value, at = _DECODER.raw_decode(text, at)
        except (ValueError, InputError, RecursionError) as error:
            if index == 1 and not array and _has_json_lines(data):
                yield from line_records(Lines(io.BytesIO(data)))
                return
            yield index, InputError(f"{_element(error)}; the rest of the file was not read")
            return
        yield index, value
    if array and at == len(text):
        yield index + 1, InputError("the file ends inside the array; it was cut off")


def _has_json_lines(data: bytes) -> bool:
    """Is some line of `data` an object of its own, so that only its first line is damaged?"""
    lines = (line.strip() for line in io.BytesIO(data))
    return any(line[:1] == b"{" and line[-1:] == b"}" and is_json(line) for line in lines)


def _element(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON at line {error.lineno} column {error.colno}: {error.msg}"
    if isinstance(error, InputError):
        return str(error)
    return "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def csv_records(lines: Lines, *, name: str) -> Iterator[Parsed]:
    try:
        first = next((line for line in lines if line.strip("\ufeff \r\n")), "")
    except InputError as error:
        raise InputError(f"{name}, header: {error}") from None
    delimiter = max(DELIMITERS, key=first.count)
    columns = header(first.strip("\ufeff\r\n"), delimiter)
    if not csv_format.matches(dict.fromkeys(columns)):
        raise InputError(
            f"the header of {name} lacks columns; it needs prompt, chosen, rejected or prompt, completion, label"
        )
    cells = csv.reader(lines, delimiter=delimiter)
    while True:
        line = lines.number + 1
        try:
            values = next(cells)
        except StopIteration:
            return
        except InputError as error:
            yield line, error
            continue
        except csv.Error as error:
            yield line, InputError(f"not CSV: {error}")
            continue
        if not values:
            continue
        yield line, _csv_record(columns, values)


def _csv_record(columns: list[str], values: Iterable[str]) -> Record | InputError:
    try:
        return dict(zip(columns, values, strict=True))
    except ValueError:
        return InputError(f"the line does not have the {len(columns)} cells of the header")
