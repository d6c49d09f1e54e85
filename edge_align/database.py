"""One SQLite file that several processes may use: opening, schema steps, transactions, and errors a person can read."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edge_align.errors import CorruptArtefact, InputError, SessionClosed, StorageError, UnsupportedVersion
from edge_align.files import make_private_dir, shown, storage_errors

BUSY_SEC = 30.0  # wait for another process's transaction
APPLICATION_ID = 0x45414C31  # in the header of our files

Migrations = tuple[tuple[str, ...], ...]
"""Step n holds the statements that take schema n to n + 1."""

_BUSY = "another edge-align process is writing to it; try again when it is done"
_REMEDIES = {
    sqlite3.SQLITE_BUSY: _BUSY,
    sqlite3.SQLITE_LOCKED: _BUSY,
    sqlite3.SQLITE_PROTOCOL: _BUSY,
    sqlite3.SQLITE_FULL: "the disk is full; free some space and try again",
    sqlite3.SQLITE_IOERR: "the disk cannot be read or written; check free space, `ulimit -f` and the disk itself",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; check its permissions, or choose another folder with --home",
    sqlite3.SQLITE_PERM: "permission denied; check who owns it, or choose another folder with --home",
    sqlite3.SQLITE_READONLY: "cannot be written; check its permissions, or choose another folder with --home",
}
_DAMAGE = (sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_DATA, sqlite3.SQLITE_IOERR_CORRUPTFS)


class Database:
    """A lazily opened SQLite file in WAL mode, mode 0600. One owner, one thread at a time.

    Every method raises CorruptArtefact when the file is damaged, UnsupportedVersion when a newer edge-align wrote it,
    StorageError when the disk refuses or another process holds the file for long, InputError for values SQLite cannot
    hold, and SessionClosed after `close()`.
    """

    def __init__(
        self,
        path: Path,
        *,
        what: str,
        migrations: Migrations,
        setup_lock: Callable[[], AbstractContextManager[None]],
        durable: bool = True,
    ) -> None:
        """what: its name in messages; setup_lock: held while the file is created or its schema changes.

        durable: wait for the disk at the end of every transaction. Without, a power cut can undo the last ones; the
        file stays whole, and a kill undoes nothing.
        """
        self._path = path
        self._what = what
        self._migrations = migrations
        self._setup_lock = setup_lock
        self._synchronous = "FULL" if durable else "NORMAL"
        self._connection: sqlite3.Connection | None = None
        self._closed = False

    def read(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query. A missing file reads as an empty one and is not created."""
        with self._errors():
            return self._open(create=False).execute(query, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A write transaction: on the disk when the block ends (if `durable`), undone when it raises.

        Creates a missing file.
        """
        with self._errors():
            connection = self._open(create=True)
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:  # Ctrl-C too
                if connection.in_transaction:  # SQLite may have rolled back by itself
                    connection.execute("ROLLBACK")
                raise

    def scrub(self) -> None:
        """Leave nothing of deleted rows in the file or beside it."""
        with self._errors():
            connection = self._open(create=False)
            # secure_delete has zeroed the rows in their pages; the write-ahead log, with older pages, goes here. It
            # goes first, as VACUUM needs room and may fail.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.execute("VACUUM")
            busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        if busy > 0:
            raise StorageError(
                f"the rows are deleted, but another process keeps a copy alive in {shown(self._path)}-wal; "
                "end it and try again"
            )

    def damaged(self, detail: str) -> CorruptArtefact:
        """The error that says that the file is damaged, and what to do."""
        return CorruptArtefact(
            f"the {self._what} {shown(self._path)} is damaged ({ascii(detail)[1:-1]}); profiles are untouched; "
            f"move {self._path.name}* elsewhere to start a new one"
        )

    def close(self) -> None:
        """Safe to call again."""
        self._closed = True
        connection, self._connection = self._connection, None
        if connection is not None:
            with self._errors():
                connection.close()

    def _open(self, *, create: bool) -> sqlite3.Connection:
        if self._closed:
            raise SessionClosed(f"the {self._what} is closed; open it again")
        if self._connection is not None:
            return self._connection
        if not os.path.lexists(self._path):
            if not create:
                empty = sqlite3.connect(":memory:", isolation_level=None)
                self._migrate(empty)
                return empty
            make_private_dir(self._path.parent)
            with storage_errors(self._path):
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))  # its side files get the same mode
        with suppress(OSError):
            if self._path.stat().st_mode & 0o077:
                self._path.chmod(0o600)
        connection = sqlite3.connect(self._path, timeout=BUSY_SEC, isolation_level=None, check_same_thread=False)
        try:
            connection.execute(f"PRAGMA synchronous = {self._synchronous}")
            for pragma in ("secure_delete = ON", "cell_size_check = ON", "trusted_schema = OFF"):
                connection.execute(f"PRAGMA {pragma}")
            if self._version(connection) < len(self._migrations):
                with self._setup_lock():
                    connection.execute("PRAGMA journal_mode = WAL")
                    self._migrate(connection)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _version(self, connection: sqlite3.Connection) -> int:
        connection.execute("BEGIN")  # one snapshot, as another process may be creating the file
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        owner = int(connection.execute("PRAGMA application_id").fetchone()[0])
        tables = connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
        connection.execute("COMMIT")
        if version < 0 or owner != (APPLICATION_ID if version or tables else 0):
            raise self.damaged(f"it is not an edge-align {self._what}")
        if version > len(self._migrations):
            raise UnsupportedVersion(
                f"the {self._what} {shown(self._path)} has schema {version}, this edge-align knows up to "
                f"{len(self._migrations)}; upgrade edge-align"
            )
        return version

    def _migrate(self, connection: sqlite3.Connection) -> None:
        """Run the steps that are missing, each in one transaction with the record of it."""
        for number, step in enumerate(self._migrations):
            connection.execute("BEGIN IMMEDIATE")
            try:
                if connection.execute("PRAGMA user_version").fetchone()[0] == number:
                    for statement in step:
                        connection.execute(statement)
                    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    connection.execute(f"PRAGMA user_version = {number + 1}")
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.ProgrammingError:  # a mistake of ours, not the file's
            raise
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
            remedy = None if code in _DAMAGE else _REMEDIES.get(code & 0xFF)
            if remedy is None:
                raise self.damaged(str(error)) from error
            raise StorageError(f"{shown(self._path)}: {remedy}; what was stored before is kept") from error
        except (OverflowError, UnicodeEncodeError) as error:
            raise InputError(f"a number or text is out of the range that the {self._what} can hold") from error


class DatabaseOwner:
    """What keeps its rows in one Database, `_db`; a context manager that closes it."""

    _db: Database

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Safe to call again."""
        self._db.close()
