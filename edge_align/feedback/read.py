"""Streaming a feedback file: rows that can be learnt from, and the ones that cannot with line and reason."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Never

from edge_align.errors import InputError
from edge_align.feedback.detect import BOM, container, DELIMITERS, detect, header, is_json
from edge_align.feedback.fields import Format, Record
from edge_align.feedback.formats import csv as csv_format
from edge_align.feedback.formats import open_webui
from edge_align.records import DroppedRow, FeedbackRow

LINE_LIMIT = 8 << 20
"""Longest line read, in bytes: eight times ROW_LIMIT, so that every row that was read can be written and read again."""
ROW_LIMIT = 1 << 20
"""Most characters in the texts of one row; no context window holds a fraction of it."""
FILE_LIMIT = 256 << 20
"""Largest file, in bytes, that must be read whole (a JSON array or a single object)."""
_HEAD = 8192

Item = FeedbackRow | DroppedRow
Parsed = tuple[int, Any]
"""(1-based line or index, decoded value); an InputError in place of the value says why there is none."""


def read_feedback(source: Path | BinaryIO, *, name: str, user: str | None = None) -> Iterator[Item]:
    """Yield the rows of a feedback file in any known format, and a DroppedRow for each record that makes none.

    JSON lines and CSV are streamed in flat memory; a JSON array is read whole. Formats may be mixed row by row. `name`
    stands for the file in messages. `user` picks one person of a chat export; that export's rows come last, oldest
    first.

    Raises InputError, while iterating, when the file as a whole cannot be read: missing, a directory, unreadable,
    empty, binary, an array over FILE_LIMIT, a CSV header without the needed columns, or an export of several users
    with `user` None.
    """
    if not isinstance(source, Path):
        yield from _read(source, name=name, user=user)
        return
    try:
        file = source.open("rb")
    except FileNotFoundError:
        raise InputError(f"{name} does not exist; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{name} is a directory; give a file in it") from None
    except PermissionError:
        raise InputError(f"{name} may not be read; check its permissions") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be opened: {_why(error)}") from None
    with file:
        yield from _read(file, name=name, user=user)


def _read(stream: BinaryIO, *, name: str, user: str | None) -> Iterator[Item]:
    source = _Source(stream, name)
    kind = container(source.head, name=name)
    if kind == "csv":
        records = _csv_records(_Lines(io.BufferedReader(source, 1 << 16)), name=name)
    elif kind == "whole":
        records = _whole_records(source, name=name)
    else:
        records = _line_records(_Lines(io.BufferedReader(source, 1 << 16)))
    exported: list[open_webui.Verdict] = []
    empty = True
    for line, value in records:
        empty = False
        try:
            if isinstance(value, InputError):
                raise value
            found: Format = csv_format.FORMAT if kind == "csv" else detect(value)
            if found is open_webui.FORMAT:
                exported.append(open_webui.parse(value, line))
                continue
            rows = found.read(value)
            for row in rows:
                _check_size(row)
        except InputError as error:
            yield DroppedRow(name, line, str(error))
        except RecursionError:
            yield DroppedRow(name, line, "nested too deeply")
        else:
            yield from rows
    if empty:
        raise InputError(f"{name} is empty; give JSON lines, a JSON array or CSV with feedback")
    yield from _export_items(exported, name=name, user=user)


def _export_items(verdicts: list[open_webui.Verdict], *, name: str, user: str | None) -> Iterator[Item]:
    """The rows of a chat export, which can only be told when all of it was seen."""
    open_webui.choose_user(verdicts, user, name=name)
    mine = []
    for verdict in verdicts:
        if user is None or verdict.user in (None, user):
            mine.append(verdict)
        else:
            yield DroppedRow(name, verdict.record, "the verdict of another user")
    rows, dropped = open_webui.resolve(mine)
    for line, reason in dropped:
        yield DroppedRow(name, line, reason)
    for line, row in rows:
        try:
            _check_size(row)
        except InputError as error:
            yield DroppedRow(name, line, str(error))
        else:
            yield row


def _check_size(row: FeedbackRow) -> None:
    metadata = (row.reason, row.ts, row.model, row.id, row.source, *row.tags)
    size = sum(len(text) for _, text in row.texts()) + sum(len(text) for text in metadata if text)
    if size > ROW_LIMIT:
        raise InputError(f"the row holds over {ROW_LIMIT >> 20} Mi characters")


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


class _Source(io.RawIOBase):
    """A byte stream whose beginning was looked at: no seek, a byte-order mark removed, errors translated."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream, self._name = stream, name
        head = self._take(_HEAD)
        while len(head) < _HEAD and (more := self._take(_HEAD - len(head))):
            head += more
        self.head = self._left = head.removeprefix(BOM)

    def _take(self, size: int) -> bytes:
        try:
            return self._stream.read(size) or b""
        except (OSError, ValueError) as error:
            raise InputError(f"{self._name} cannot be read: {_why(error)}") from None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._left[: len(buffer)] if self._left else self._take(len(buffer))
        self._left = self._left[len(data) :]
        buffer[: len(data)] = data
        return len(data)


class _Lines:
    """Bounded lines of a byte stream, decoded; `next` raises InputError for one that cannot be used and goes on.

    `number` is the 1-based line that was read last, `whole` whether it ended in a newline.
    """

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self.number = 0
        self.whole = True

    def __iter__(self) -> _Lines:
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


def _line_records(lines: _Lines) -> Iterator[Parsed]:
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
        return InputError(f"not JSON: {error.msg} at column {error.colno}")
    except ValueError:
        return InputError("a number has too many digits")
    except RecursionError:
        return InputError("nested too deeply")


def _whole_records(source: _Source, *, name: str) -> Iterator[Parsed]:
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
                yield from _line_records(_Lines(io.BytesIO(data)))
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
        return f"not JSON: {error.msg} at line {error.lineno} column {error.colno}"
    if isinstance(error, InputError):
        return str(error)
    return "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def _csv_records(lines: _Lines, *, name: str) -> Iterator[Parsed]:
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
