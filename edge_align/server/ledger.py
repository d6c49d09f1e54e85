"""Answers and verdicts, in one thread of their own: SQLite waits for disks, and the event loop must not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, UTC
from typing import Any, TypeVar

from edge_align.config import ServerConfig
from edge_align.errors import EdgeAlignError, InputError
from edge_align.feedback.fields import brief
from edge_align.feedback.formats.open_webui import weight as weight_of
from edge_align.home import Home
from edge_align.records import check_text, FeedbackRow
from edge_align.server import fields
from edge_align.server.answers import Answer, AnswerStore
from edge_align.server.fields import Body
from edge_align.server.keys import Caller
from edge_align.server.refusal import bad, log, Refusal
from edge_align.store import FeedbackLog

T = TypeVar("T")
PAGE = 200  # rows of one answer to GET /v1/feedback
SOURCE = "server"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A request for feedback, its fields checked."""

    id: str
    choice: int = 0
    label: bool | None = None
    weight: float = 1.0
    edited: str | None = None
    preferred_over: tuple[str, int] | None = None
    reason: str | None = None


def verdict(body: Body) -> Verdict:
    """The body of POST /v1/feedback. Raises Refusal 400."""
    id = fields.text(body, "id", most=128) or fields.text(body, "completion_id", most=128)
    if not id:
        raise bad("id is missing; send the id of the answer you judge", param="id")
    other = fields.text(body, "preferred_over", most=128)
    edited = fields.text(body, "edited")
    label, weight = rating(body.get("rating"))
    if label is None and edited is None and other is None:
        raise bad("there is no verdict; send rating, edited or preferred_over", param="rating")
    reason = fields.text(body, "reason", most=4096)
    for name, text in (("edited", edited), ("reason", reason)):
        if text is not None:
            try:
                check_text(name, text)
            except InputError as error:
                raise bad(str(error), param=name) from None
    other_choice = fields.integer(body, "preferred_over_index", 0, 1000) or 0
    return Verdict(
        id=id,
        choice=fields.integer(body, "index", 0, 1000) or 0,
        label=label,
        weight=weight,
        edited=edited,
        preferred_over=None if other is None else (other, other_choice),
        reason=reason,
    )


def rating(value: object) -> tuple[bool | None, float]:
    """(up?, weight): "up" or "down", or 1..10, whose weight is its distance from the middle as in open_webui."""
    if value is None:
        return None, 1.0
    if value in ("up", "down"):
        return value == "up", 1.0
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 10:
        return value >= 6, weight_of(value >= 6, {"rating": value})
    raise bad(f'rating is {brief(value)}; it must be "up", "down" or 1 to 10', param="rating")


def rows_of(given: Verdict, answer: Answer, other: Answer | None) -> list[FeedbackRow]:
    """The rows that a verdict says. Raises Refusal where it contradicts itself."""
    common: dict[str, Any] = {
        "weight": given.weight,
        "reason": given.reason,
        "ts": datetime.now(UTC).isoformat(),
        "model": answer.model,
        "id": answer.id if not answer.choice else f"{answer.id}:{answer.choice}",
        "source": SOURCE,
    }
    rows = []
    try:
        if given.edited is not None:
            rows.append(FeedbackRow(answer.prompt, chosen=given.edited, rejected=answer.text, origin="edit", **common))
        if other is not None:
            if other.prompt != answer.prompt:
                raise bad(
                    "preferred_over answers other messages; compare two answers to the same", param="preferred_over"
                )
            rows.append(FeedbackRow(answer.prompt, chosen=answer.text, rejected=other.text, **common))
        if given.label is not None:
            rows.append(FeedbackRow(answer.prompt, completion=answer.text, label=given.label, origin="thumb", **common))
    except InputError as error:
        raise bad(str(error)) from None
    return rows


class Ledger:
    """The stores behind the server. Every method may be awaited from the event loop; each runs in one thread."""

    def __init__(self, home: Home, config: ServerConfig) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="edge-align-ledger")
        self._log, self._answers = FeedbackLog(home), AnswerStore(home, keep_days=config.keep_days)

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def keep(self, answers: Sequence[Answer]) -> None:
        """Remember answers; a full disk costs the feedback on them, not the answers."""
        try:
            await self._run(lambda: self._answers.add(answers))
        except EdgeAlignError as error:
            log.error("answers are not remembered: %s", error)

    async def judge(self, given: Verdict, caller: Caller) -> tuple[str, int, list[FeedbackRow]]:
        """Log a verdict: (profile, rows in its log now, what was added). Raises Refusal, EdgeAlignError."""

        def work() -> tuple[str, int, list[FeedbackRow]]:
            answer = self._find(given.id, given.choice, caller)
            other = None if given.preferred_over is None else self._find(*given.preferred_over, caller)
            rows = rows_of(given, answer, other)
            self._log.append(answer.profile, rows)
            return answer.profile, self._log.count(answer.profile), rows

        return await self._run(work)

    def _find(self, id: str, choice: int, caller: Caller) -> Answer:
        answer = self._answers.find(id, choice, owner=caller.owner)
        if answer is None:
            raise Refusal(404, "no such answer; its id is wrong or it is too old", code="answer_not_found", param="id")
        return answer

    async def count(self, profile: str) -> int:
        return await self._run(lambda: self._log.count(profile))

    async def profiles(self) -> tuple[str, ...]:
        """Profiles that have feedback."""
        return await self._run(self._log.profiles)

    async def list(self, profile: str, *, limit: int, offset: int) -> dict[str, Any]:
        """A page of a profile's verdicts, the newest first, texts and all: they are the caller's own."""

        def work() -> dict[str, Any]:
            found = self._log.list(profile, limit=min(limit, PAGE), offset=offset)
            return {
                "object": "list",
                "profile": profile,
                "total": self._log.count(profile),
                "data": [{"row": one.id, "added": one.added, **describe(one.row)} for one in found],
            }

        return await self._run(work)

    async def forget(self, profile: str, *, ids: Sequence[int], matching: str | None, everything: bool) -> int:
        """Delete verdicts for good; with `everything` the remembered answers too."""

        def work() -> int:
            gone = self._log.forget(profile, ids=ids, matching=matching, everything=everything)
            self._answers.forget(profile=profile)  # an erased verdict must not come back from its answer's text
            return gone

        return await self._run(work)

    def close(self) -> None:
        """Finish what was begun, then close the files."""
        with suppress(RuntimeError):
            self._thread.submit(self._answers.close)
            self._thread.submit(self._log.close)
        self._thread.shutdown(wait=True)


def describe(row: FeedbackRow) -> dict[str, Any]:
    """A verdict as JSON."""
    shown: dict[str, Any] = {
        "id": row.id,
        "origin": row.origin,
        "messages": [{"role": message.role, "content": message.content} for message in row.prompt],
        "weight": row.weight,
        "reason": row.reason,
        "ts": row.ts,
    }
    if row.is_pair:
        return shown | {"chosen": row.chosen, "rejected": row.rejected}
    return shown | {"completion": row.completion, "rating": "up" if row.label else "down"}
