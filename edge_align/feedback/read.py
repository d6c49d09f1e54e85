"""Streaming a feedback file: rows that can be learnt from, and the ones that cannot with line and reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from edge_align.errors import InputError
from edge_align.feedback.containers import ByteSource, records, why
from edge_align.feedback.detect import container, detect
from edge_align.feedback.fields import Format
from edge_align.feedback.formats import csv, open_webui
from edge_align.records import DroppedRow, FeedbackRow

ROW_LIMIT = 1 << 20
"""Most characters in the texts of one row; no context window holds a fraction of it."""

Item = FeedbackRow | DroppedRow


def read_feedback(source: Path | BinaryIO, *, name: str, user: str | None = None) -> Iterator[Item]:
    """Yield the rows of a feedback file in any known format, and a DroppedRow for each record that makes none.

    JSON lines and CSV are streamed in flat memory; a JSON array is read whole. Formats may be mixed row by row. `name`
    stands for the file in messages. `user` picks one person of a chat export; that export's rows come last, oldest
    first.

    Raises InputError, while iterating, when the file as a whole cannot be read: missing, a directory, unreadable,
    empty, binary, a JSON array over 256 MiB, a CSV header without the needed columns, or an export of several users
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
        raise InputError(f"{name} cannot be opened: {why(error)}") from None
    with file:
        yield from _read(file, name=name, user=user)


def _read(stream: BinaryIO, *, name: str, user: str | None) -> Iterator[Item]:
    source = ByteSource(stream, name)
    kind = container(source.head, name=name)
    exported: list[open_webui.Verdict] = []
    empty = True
    for line, value in records(source, kind, name=name):
        empty = False
        try:
            if isinstance(value, InputError):
                raise value
            found: Format = csv.FORMAT if kind == "csv" else detect(value)
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
