"""API keys: a private file, one key a line, each perhaps bound to profiles; compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from edge_align.errors import InputError
from edge_align.files import check_name, make_private_dir, read_file, shown, write_atomic

SIZE_LIMIT = 1 << 20  # bytes of a key file
SHORTEST = 16  # characters of a key
MOST = 1000  # keys
LOOPBACK = ("127.0.0.1", "::1", "localhost")

HEADER = """\
# API keys of edge-align serve, one a line: KEY [PROFILE ...]
# A key followed by profiles answers with the first of them unless a request names another, and can use no others.
"""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `owner` names their prompt caches and answers; without keys everybody is the same person, ""."""

    owner: str = ""
    profiles: tuple[str, ...] = ()  # empty: any

    def may_use(self, profile: str) -> bool:
        return not self.profiles or profile in self.profiles

    @property
    def bound(self) -> bool:
        return bool(self.profiles)


@dataclass(frozen=True)
class Keys:
    """The keys of a server; none: everybody who reaches it may ask."""

    known: tuple[tuple[bytes, Caller], ...] = field(default=(), repr=False)

    @classmethod
    def load(cls, path: Path) -> Keys:
        """Read a key file; one that does not exist is made, with one new key in it.

        Raises InputError for a file that others can read, or a line that is no key; StorageError.
        """
        if not os.path.lexists(path):
            make_private_dir(path.absolute().parent)
            write_atomic(path, f"{HEADER}{secrets.token_urlsafe(32)}\n".encode())
        if os.name != "nt" and path.stat().st_mode & 0o077:
            raise InputError(f"{shown(path)} can be read by others; run: chmod 600 {shown(path)}")
        try:
            lines = read_file(path.resolve(), limit=SIZE_LIMIT).decode("ascii").splitlines()
        except UnicodeDecodeError:
            raise InputError(f"{shown(path)} holds something other than ASCII; a line is: KEY [PROFILE ...]") from None
        known = []
        for number, line in enumerate(lines, 1):
            words = line.split("#")[0].split()
            if not words:
                continue
            if len(words[0]) < SHORTEST:
                raise InputError(f"{shown(path)}:{number}: a key has at least {SHORTEST} characters")
            profiles = tuple(check_name("profile", name) for name in words[1:])
            owner = hashlib.sha256(words[0].encode()).hexdigest()[:16]
            known.append((words[0].encode(), Caller(owner, profiles)))
        if not 0 < len(known) <= MOST:
            raise InputError(f"{shown(path)} holds {len(known)} keys; give 1 to {MOST}, one a line")
        return cls(tuple(known))

    def __bool__(self) -> bool:
        return bool(self.known)

    def caller(self, given: str | None) -> Caller | None:
        """Whose key `given` is; None for nobody's. Every key is compared, in time that tells nothing about it."""
        if not self.known:
            return Caller()
        found = None
        offered = (given or "").encode("utf-8", "surrogatepass")
        for key, caller in self.known:
            if hmac.compare_digest(key, offered):
                found = caller
        return found

    @property
    def profiles(self) -> frozenset[str]:
        """Every profile that a key is bound to."""
        return frozenset(name for _, caller in self.known for name in caller.profiles)


def check_reach(host: str, keys: Keys) -> None:
    """Raise InputError for an address that others can reach, without keys."""
    if host not in LOOPBACK and not keys:
        raise InputError(f"others can reach {host}; give --api-key-file FILE, or leave --host at 127.0.0.1")
