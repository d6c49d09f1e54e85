"""Learning while answering: a refit in a process of its own, niced, and the gate before its result is used."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from edge_align.config import ServerConfig
from edge_align.errors import EdgeAlignError
from edge_align.files import is_name
from edge_align.home import Home
from edge_align.profiles import ProfileStore
from edge_align.server.refusal import log

NICE = 10  # with 19 it stood still on a machine that is busy with other things as well
REFIT_SEC = 900.0  # a refit that takes longer is ended


class Learner:
    """Refits one profile at a time. For the event loop's thread."""

    def __init__(self, home: Home, model: str | None, config: ServerConfig) -> None:
        self._home, self._model, self._config = home, model, config
        self._store = ProfileStore(home)
        self._task: asyncio.Task[None] | None = None
        self._wanted: dict[str, None] = {}  # an ordered set
        self._tried: dict[str, int] = {}  # rows in the log at the last refit of this process
        self.reports: dict[str, dict[str, Any]] = {}  # the last refit of each profile
        self.on_refit: Callable[[], None] = lambda: None

    def noticed(self, profile: str, rows: int) -> None:
        """The profile's log has so many rows now: refit when `learn_every` of them are new."""
        if self._config.learn != "auto":
            return
        if rows - max(self._learnt_from(profile), self._tried.get(profile, 0)) >= self._config.learn_every:
            self._tried[profile] = rows
            self.want(profile)

    def want(self, profile: str) -> None:
        """Refit this profile, after those that were wanted before."""
        self._wanted[profile] = None
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())

    def state(self, profile: str) -> str:
        """ "learning", "waiting" or "idle"."""
        names = list(self._wanted)
        return "idle" if profile not in names else "learning" if names[0] == profile else "waiting"

    def _learnt_from(self, profile: str) -> int:
        """Rows in the log when the newest version was learnt."""
        with suppress(EdgeAlignError):
            if self._store.has(profile) and (versions := self._store.versions(profile)):
                _, manifest = self._store.load(profile, versions[-1])
                return int(manifest.get("logged", 0))
        return 0

    async def _work(self) -> None:
        while self._wanted:
            profile = next(iter(self._wanted))
            try:
                self.reports[profile] = await self._refit(profile)
            except (OSError, ValueError, TimeoutError) as error:
                log.error("a refit failed: %s", type(error).__name__)
                self.reports[profile] = {"state": "failed", "reason": "the refit process failed; see the log"}
            finally:
                self._wanted.pop(profile, None)
            self.on_refit()

    async def _refit(self, profile: str) -> dict[str, Any]:
        assert is_name(profile)
        request = {"home": str(self._home.root), "profile": profile, "model": self._model}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "edge_align.server.refit",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            if hasattr(os, "setpriority"):
                with suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, process.pid, NICE)
            async with asyncio.timeout(REFIT_SEC):
                out, _ = await process.communicate(json.dumps(request).encode())
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        report = json.loads(out)
        log.info("refit of a profile: %s, activated %s", report.get("state"), report.get("activated"))
        return dict(report)

    async def close(self) -> None:
        """End a refit that is under way; what it had not saved is lost, and learnt again later."""
        self._wanted.clear()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
