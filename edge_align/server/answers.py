"""Answers of the last days, in an SQLite file of the home folder, so that a verdict needs only an id."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edge_align.database import Database, DatabaseOwner
from edge_align.errors import InputError
from edge_align.home import Home
from edge_align.records import Message, Prompt

DAY_SEC = 86_400.0

MIGRATIONS = (
    (
        """CREATE TABLE answers (
            id TEXT NOT NULL,                       -- of the response that it came in
            choice INTEGER NOT NULL,                -- its index there
            owner TEXT NOT NULL,                    -- of the API key; '' without keys
            profile TEXT NOT NULL,                  -- whose verdicts these are to be
            added REAL NOT NULL,                    -- seconds since 1970
            crc INTEGER NOT NULL,                   -- of body
            body BLOB NOT NULL,                     -- prompt, text and model as JSON
            PRIMARY KEY (id, choice)
        ) WITHOUT ROWID""",
        "CREATE INDEX answers_by_age ON answers (added)",
    ),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer that was given."""

    id: str
    choice: int
    owner: str
    profile: str
    prompt: Prompt
    text: str
    model: str
    added: float = 0.0


class AnswerStore(DatabaseOwner):
    """The answers of a home folder. One owner, one thread at a time. Raises as `Database` does."""

    def __init__(self, home: Home, *, keep_days: int) -> None:
        self._keep_sec = keep_days * DAY_SEC
        self._swept = 0.0
        self._db = Database(
            home.answers_db,
            what="store of answers",
            migrations=MIGRATIONS,
            setup_lock=lambda: home.write_lock("answers"),
            durable=False,  # every answer waits for it before its end is told, and it keeps copies, not verdicts
        )

    def add(self, answers: Sequence[Answer], *, now: float | None = None) -> None:
        """Keep answers, and drop those that are too old once an hour."""
        now = time.time() if now is None else now
        if not self._keep_sec or not answers:
            return
        with self._db.transaction() as connection:
            for one in answers:
                body = _encode(one)
                values = (one.id, one.choice, one.owner, one.profile, now, zlib.crc32(body), body)
                connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        if now - self._swept > 3600.0:
            self._swept = now
            self.expire(now=now)

    def find(self, id: str, choice: int, *, owner: str) -> Answer | None:
        """An answer that this owner was given; None for another's, an old or an unknown one."""
        query = "SELECT profile, added, crc, body FROM answers WHERE id = ? AND choice = ? AND owner = ?"
        for profile, added, crc, body in self._db.read(query, (id, choice, owner)):
            if added < time.time() - self._keep_sec:
                return None
            if zlib.crc32(body) != crc:
                raise self._db.damaged("an answer is not what was written")
            return _decode(body, id=id, choice=choice, owner=owner, profile=profile, added=added)
        return None

    def count(self) -> int:
        return int(self._db.read("SELECT COUNT(*) FROM answers")[0][0])

    def expire(self, *, now: float) -> int:
        """Delete answers that are too old; says how many."""
        old = "FROM answers WHERE added < ?"
        if not self._db.read(f"SELECT 1 {old} LIMIT 1", (now - self._keep_sec,)):
            return 0
        with self._db.transaction() as connection:
            gone = connection.execute(f"DELETE {old}", (now - self._keep_sec,)).rowcount
        self._db.scrub()
        return gone

    def forget(self, *, profile: str, owner: str | None = None) -> int:
        """Delete a profile's answers for good (of one owner only, if given); says how many."""
        if not self._db.read("SELECT 1 FROM answers LIMIT 1"):
            return 0
        with self._db.transaction() as connection:
            query = "DELETE FROM answers WHERE profile = ? AND (owner = ? OR ?)"
            gone = connection.execute(query, (profile, owner or "", owner is None)).rowcount
        self._db.scrub()
        return gone


def _encode(answer: Answer) -> bytes:
    body = {
        "prompt": [[message.role, message.content] for message in answer.prompt],
        "text": answer.text,
        "model": answer.model,
    }
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")


def _decode(body: bytes, *, id: str, choice: int, owner: str, profile: Any, added: Any) -> Answer:
    value = json.loads(body.decode(errors="surrogatepass"))
    try:
        prompt = tuple(Message(role, content) for role, content in value["prompt"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError("an answer is not what was written") from error
    return Answer(id, choice, owner, str(profile), prompt, str(value["text"]), str(value["model"]), float(added))
