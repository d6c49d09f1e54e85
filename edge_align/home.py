"""The folder that holds everything edge-align keeps for one person."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge_align.errors import InputError, StorageError
from edge_align.files import check_name, make_private_dir, shown, storage_errors

VARIABLE = "EDGE_ALIGN_HOME"
POLL_SEC = 0.02  # between two tries for a lock


@dataclass(frozen=True, slots=True)
class Home:
    """Where things are. Nothing is created until something is written; folders are then made with mode 0700."""

    root: Path

    @classmethod
    def find(cls, option: str | None = None) -> Home:
        """`option` (--home), else the variable EDGE_ALIGN_HOME, else the platform's folder for user data."""
        chosen = os.environ.get(VARIABLE) or None if option is None else option
        if chosen is None:
            from platformdirs import user_data_dir

            return cls(Path(user_data_dir("edge-align", appauthor=False)))
        if not chosen.strip() or "\x00" in chosen:
            raise InputError("the home folder is empty or holds a NUL character; give a folder with --home")
        root = Path(os.path.abspath(os.path.expanduser(chosen)))
        if os.path.exists(root) and not os.path.isdir(root):
            raise InputError(f"{shown(root)} is not a folder; give another one with --home")
        return cls(root)

    @property
    def feedback_db(self) -> Path:
        return self.root / "feedback.db"

    @property
    def answers_db(self) -> Path:
        """Answers that the server gave lately."""
        return self.root / "answers.db"

    @property
    def profiles_dir(self) -> Path:
        return self.root / "profiles"

    @property
    def packs_dir(self) -> Path:
        return self.root / "packs"

    @property
    def models_dir(self) -> Path:
        """Bases that were added, each a bundle in a folder of its id."""
        return self.root / "models"

    @property
    def cache_dir(self) -> Path:
        """What can be deleted at any time."""
        return self.root / "cache"

    @property
    def hash_cache(self) -> Path:
        """The `cache_file` of `files.cached_hash`."""
        return self.cache_dir / "hashes.json"

    @property
    def state_file(self) -> Path:
        return self.root / "state.json"

    @contextmanager
    def lock(self, profile: str, *, timeout_sec: float = 0.0) -> Iterator[None]:
        """Hold `profile` against other processes for a long piece of work, such as learning.

        Waits up to `timeout_sec`, then raises StorageError. Not reentrant. The stores below take locks of their own,
        so they can be used inside.
        """
        path = self.root / "locks" / f"profile-{check_name('profile', profile)}.lock"
        busy = f"another edge-align process is working on profile {profile}; try again when it is done"
        with _locked(path, busy=busy, timeout_sec=timeout_sec):
            yield

    @contextmanager
    def write_lock(self, store: str) -> Iterator[None]:
        """Hold one store ("profiles", "feedback") for one short change. Raises StorageError after ten seconds."""
        busy = f"another edge-align process is writing to {shown(self.root)}; try again when it is done"
        with _locked(self.root / "locks" / f"{store}.lock", busy=busy, timeout_sec=10.0):
            yield


@contextmanager
def _locked(path: Path, *, busy: str, timeout_sec: float) -> Iterator[None]:
    """An exclusive lock that the system drops with its process. Lock files stay: removing one would be a race."""
    make_private_dir(path.parent)
    with storage_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + timeout_sec
        while True:
            with storage_errors(path):
                if _try_lock(fd):
                    break
            if time.monotonic() >= deadline:
                raise StorageError(busy)
            time.sleep(POLL_SEC)
        try:
            yield
        finally:
            _unlock(fd)
    finally:
        os.close(fd)


if sys.platform == "win32":
    import msvcrt

    def _try_lock(fd: int) -> bool:
        os.lseek(fd, 0, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(fd: int) -> None:
        os.lseek(fd, 0, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _try_lock(fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)
