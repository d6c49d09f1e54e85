"""The feedback log: every verdict of every profile, in one SQLite file of the home folder.

Rows are only ever added, each once per profile, until a person has them forgotten. What `append` has returned from is
on the disk; a kill or a full disk loses at most the batch it strikes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, UTC
from typing import Any

from edge_align.database import Database, DatabaseOwner
from edge_align.errors import EdgeAlignError, InputError
from edge_align.files import check_name
from edge_align.home import Home
from edge_align.records import FeedbackRow, Message

BATCH_ROWS = 2_000  # rows of one transaction
BATCH_CHARACTERS = 16 * 2**20  # and about its size in memory
PAGE_ROWS = 500  # rows read at a time

MIGRATIONS = (
    (
        "CREATE TABLE profiles (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)",
        """CREATE TABLE rows (
            id INTEGER PRIMARY KEY AUTOINCREMENT,   -- the order of arrival; never used twice
            profile INTEGER NOT NULL REFERENCES profiles (id),
            key BLOB NOT NULL,                      -- FeedbackRow.key()
            added TEXT NOT NULL,                    -- UTC, ISO 8601
            kind TEXT NOT NULL,                     -- pair, up, down
            origin TEXT NOT NULL,
            source TEXT NOT NULL,
            crc INTEGER NOT NULL,                   -- of body: SQLite itself does not notice a flipped byte there
            body BLOB NOT NULL,                     -- the row as JSON
            UNIQUE (profile, key)
        )""",
        "CREATE INDEX rows_in_order ON rows (profile, id)",
    ),
)

_INSERT = (
    "INSERT INTO rows (profile, key, added, kind, origin, source, crc, body) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
    " ON CONFLICT (profile, key) DO NOTHING"
)
_COLUMNS = "id, added, crc, body"
_OF_PROFILE = "profile = (SELECT id FROM profiles WHERE name = ?)"


@dataclass(frozen=True, slots=True)
class Appended:
    """What became of the rows given to `append`."""

    added: int
    duplicates: int


@dataclass(frozen=True, slots=True)
class LoggedRow:
    """A row with its place in the log."""

    id: int
    added: str  # when it was logged: UTC, ISO 8601
    row: FeedbackRow


@dataclass(frozen=True, slots=True)
class LogStats:
    """Counts over one profile's rows. `first_added` and `last_added` are UTC, ISO 8601; None without rows."""

    rows: int
    kinds: dict[str, int]  # pair, up, down
    origins: dict[str, int]
    sources: dict[str, int]
    first_added: str | None
    last_added: str | None


class FeedbackLog(DatabaseOwner):
    """The feedback log of a home folder. Has one owner, one thread at a time; other processes may use it as well.

    Reading never creates the file. Every method raises CorruptArtefact when the file is damaged, UnsupportedVersion
    when a newer edge-align wrote it, StorageError when the disk refuses or another process holds the file for long,
    InputError for a bad profile name, SessionClosed after `close()`.
    """

    def __init__(self, home: Home, *, batch_rows: int = BATCH_ROWS) -> None:
        self._batch_rows = batch_rows
        self._db = Database(
            home.feedback_db,
            what="feedback log",
            migrations=MIGRATIONS,
            setup_lock=lambda: home.write_lock("feedback"),
        )

    def append(self, profile: str, rows: Iterable[FeedbackRow]) -> Appended:
        """Add the rows that the profile does not have yet, in order; consumed in batches, one transaction each.

        When it raises, in `rows` or here, the batches before are in the log and stay.
        """
        check_name("profile", profile)
        added = duplicates = 0
        for batch in _batches(rows, self._batch_rows):
            values = [_values(row) for row in batch]  # before the transaction, which is to be short
            with self._db.transaction() as connection:
                connection.execute("INSERT INTO profiles (name) VALUES (?) ON CONFLICT DO NOTHING", (profile,))
                number = connection.execute("SELECT id FROM profiles WHERE name = ?", (profile,)).fetchone()[0]
                before = connection.total_changes
                connection.executemany(_INSERT, ((number, *value) for value in values))
                new = connection.total_changes - before
            added += new
            duplicates += len(batch) - new
        return Appended(added, duplicates)

    def count(self, profile: str) -> int:
        """Rows of a profile; 0 for one that was never heard of."""
        check_name("profile", profile)
        return int(self._db.read(f"SELECT COUNT(*) FROM rows WHERE {_OF_PROFILE}", (profile,))[0][0])

    def rows(self, profile: str, newest: int | None = None) -> Iterator[FeedbackRow]:
        """The profile's rows in order of arrival, streamed; with `newest`, only the last so many of them."""
        for logged in self._stream(profile, newest):
            yield logged.row

    def profiles(self) -> tuple[str, ...]:
        """Names of the profiles that have rows, sorted."""
        query = "SELECT name FROM profiles WHERE EXISTS (SELECT 1 FROM rows WHERE profile = profiles.id)"
        return tuple(sorted(str(name) for (name,) in self._db.read(query)))

    def stats(self, profile: str) -> LogStats:
        """Counts by kind, origin and source."""
        check_name("profile", profile)
        groups = self._db.read(
            f"SELECT kind, origin, source, COUNT(*), MIN(added), MAX(added) FROM rows WHERE {_OF_PROFILE}"
            " GROUP BY 1, 2, 3 ORDER BY 1, 2, 3",
            (profile,),
        )
        kinds: dict[str, int] = {}
        origins: dict[str, int] = {}
        sources: dict[str, int] = {}
        for kind, origin, source, number, _, _ in groups:
            for counts, name in ((kinds, kind), (origins, origin), (sources, source)):
                counts[name] = counts.get(name, 0) + number
        return LogStats(
            rows=sum(kinds.values()),
            kinds=kinds,
            origins=origins,
            sources=sources,
            first_added=min((group[4] for group in groups), default=None),
            last_added=max((group[5] for group in groups), default=None),
        )

    def list(self, profile: str, *, limit: int = 50, offset: int = 0) -> tuple[LoggedRow, ...]:
        """A page of the profile's rows, the newest first."""
        check_name("profile", profile)
        query = f"SELECT {_COLUMNS} FROM rows WHERE {_OF_PROFILE} ORDER BY id DESC LIMIT ? OFFSET ?"
        return tuple(self._logged(*found) for found in self._db.read(query, (profile, max(limit, 0), max(offset, 0))))

    def forget(
        self,
        profile: str,
        *,
        ids: Sequence[int] = (),
        matching: str | None = None,
        everything: bool = False,
    ) -> int:
        """Delete rows for good and say how many: by id, those with `matching` in a text (case aside), or all.

        Nothing of them is left in the file or beside it. Profiles learnt from them stay as they are.
        """
        check_name("profile", profile)
        if sum((bool(ids), matching is not None, everything)) != 1:
            raise InputError("say what to forget: row ids, a text they hold, or everything")
        if matching is not None:
            needle = matching.strip().casefold()
            if not needle:
                raise InputError("the text to look for is empty")
            ids = [logged.id for logged in self._stream(profile, None) if needle in _searchable(logged.row)]
        forgotten = 0
        if self._db.read("SELECT 1 FROM profiles WHERE name = ?", (profile,)):
            with self._db.transaction() as connection:
                if everything:
                    query = f"DELETE FROM rows WHERE {_OF_PROFILE}"
                    forgotten = connection.execute(query, (profile,)).rowcount
                    connection.execute("DELETE FROM profiles WHERE name = ?", (profile,))
                for one in ids:
                    query = f"DELETE FROM rows WHERE {_OF_PROFILE} AND id = ?"
                    forgotten += connection.execute(query, (profile, one)).rowcount
        self._db.scrub()  # also when nothing was found: an earlier call may have been stopped here
        return forgotten

    def rename(self, profile: str, new: str) -> None:
        """Give a profile's rows another name. Raises InputError when that name has rows already."""
        check_name("profile", profile)
        check_name("profile", new)
        if profile == new or not self._db.read("SELECT 1 FROM profiles WHERE name = ?", (profile,)):
            return
        with self._db.transaction() as connection:
            if connection.execute(f"SELECT 1 FROM rows WHERE {_OF_PROFILE} LIMIT 1", (new,)).fetchone():
                raise InputError(f"there is feedback for a profile {new} already; choose another name")
            connection.execute("DELETE FROM profiles WHERE name = ?", (new,))
            connection.execute("UPDATE profiles SET name = ? WHERE name = ?", (new, profile))

    def _stream(self, profile: str, newest: int | None) -> Iterator[LoggedRow]:
        """In pages, each a query of its own, so that a slow reader holds back no writer."""
        check_name("profile", profile)
        found = self._db.read(f"SELECT MIN(id), MAX(id) FROM rows WHERE {_OF_PROFILE}", (profile,))
        first, last = found[0]
        if last is None or (newest is not None and newest <= 0):
            return
        if newest is not None:
            query = f"SELECT id FROM rows WHERE {_OF_PROFILE} AND id <= ? ORDER BY id DESC LIMIT 1 OFFSET ?"
            start = self._db.read(query, (profile, last, newest - 1))
            first = start[0][0] if start else first
        query = f"SELECT {_COLUMNS} FROM rows WHERE {_OF_PROFILE} AND id BETWEEN ? AND ? ORDER BY id LIMIT ?"
        while page := self._db.read(query, (profile, first, last, PAGE_ROWS)):
            for found_row in page:
                yield self._logged(*found_row)
            first = page[-1][0] + 1

    def _logged(self, number: Any, added: Any, crc: Any, body: Any) -> LoggedRow:
        try:
            if zlib.crc32(body) != crc:
                raise ValueError("the checksum differs")
            return LoggedRow(int(number), str(added), _decode(body))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, EdgeAlignError) as error:
            raise self._db.damaged(f"row {number} is not what was written") from error


def _batches(rows: Iterable[FeedbackRow], size: int) -> Iterator[list[FeedbackRow]]:
    batch: list[FeedbackRow] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += sum(len(text) for _, text in row.texts())
        if len(batch) >= size or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _values(row: FeedbackRow) -> tuple[bytes, str, str, str, str, int, bytes]:
    """The columns key to body."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    kind = "pair" if row.is_pair else "up" if row.label else "down"
    body = _encode(row)
    return bytes.fromhex(row.key()), now, kind, row.origin, row.source, zlib.crc32(body), body


def _encode(row: FeedbackRow) -> bytes:
    body = {f.name: value for f in fields(row) if (value := getattr(row, f.name)) not in (None, ())}
    body["prompt"] = [[message.role, message.content] for message in row.prompt]
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")


def _decode(body: bytes) -> FeedbackRow:
    values = json.loads(body.decode(errors="surrogatepass"))
    values["prompt"] = tuple(Message(role, content) for role, content in values["prompt"])
    values["tags"] = tuple(values.get("tags", ()))
    return FeedbackRow(**values)


def _searchable(row: FeedbackRow) -> str:
    return "\n".join([*(text for _, text in row.texts()), row.reason or "", *row.tags]).casefold()
