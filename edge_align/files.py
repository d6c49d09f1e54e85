"""Files on a person's disk: written whole or not at all, readable by nobody else, never trusted when read.

The only errors that leave this module are StorageError (the disk refused), CorruptArtefact (the bytes are not what
they should be) and InputError (a name or a value that cannot be stored).
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edge_align.errors import CorruptArtefact, InputError, StorageError

TEMPORARY = ".tmp-"  # prefix of half-written files; a kill can leave one behind, `sweep` removes it
JSON_LIMIT = 8 * 2**20  # bytes; our manifests have a few thousand
SPARE = 64 * 2**20  # bytes of disk that stay free when something large is written
HASH_ENTRIES = 256  # files remembered by `cached_hash`

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)  # Windows keeps these to itself

_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space and try again",
    errno.EDQUOT: "the disk quota is used up; free some space and try again",
    errno.EFBIG: "the file would pass the size limit (see `ulimit -f`); raise it and try again",
    errno.EROFS: "the file system is read-only; choose another folder with --home",
    errno.EACCES: "permission denied; check who owns it, or choose another folder with --home",
    errno.EPERM: "not permitted; check who owns it, or choose another folder with --home",
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another folder with --home",
    errno.EISDIR: "this is a folder; a file was expected",
    errno.EEXIST: "a file is in the way; move it elsewhere",
    errno.ELOOP: "symbolic links are not followed here; put the real file in its place",
    errno.ENAMETOOLONG: "the path is too long; choose a shorter folder with --home",
    errno.EMFILE: "too many open files; raise `ulimit -n`",
    errno.EIO: "the disk reports an error; check it and restore from a backup",
}


def shown(path: Path | str) -> str:
    """`path` as one printable line."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the body into a one-line StorageError that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0) or error.strerror or type(error).__name__
        raise StorageError(f"{shown(path)}: {remedy}") from error


def is_name(name: str) -> bool:
    """Can `name` be a folder's name on every system, and nothing but that?"""
    return bool(_NAME.fullmatch(name)) and ".." not in name and name[-1] != "." and not _DEVICE.fullmatch(name)


def check_name(kind: str, name: str) -> str:
    """`name` itself, or InputError that calls it a `kind` ("profile", "pack") name."""
    if not is_name(name):
        raise InputError(
            f"{kind} name {ascii(name)[:80]} is not allowed; use 1 to 64 letters, digits, '.', '_' or '-', starting "
            "with a letter or digit (no '..', no dot at the end, none of Windows' device names)"
        )
    return name


def canonical_json(value: Any) -> bytes:
    """Compact UTF-8 JSON with sorted keys, one spelling per value. Raises InputError for what JSON cannot hold."""
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (TypeError, ValueError, RecursionError) as error:  # ValueError: NaN, a cycle, a lone surrogate
        raise InputError(f"cannot be stored as JSON: {ascii(str(error))[1:-1][:120]}") from error


def sha256_bytes(data: bytes) -> str:
    """Tagged content hash, "sha256:<hex>"."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Tagged hash of a file's content, streamed. Raises StorageError."""
    with storage_errors(path), path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def cached_hash(path: Path, cache_file: Path) -> str:
    """`sha256_file`, remembered in `cache_file` by path, size and time of modification (ns).

    Only a convenience: a cache that is damaged or cannot be written costs a hash, never an error. Raises StorageError
    when `path` itself cannot be read.
    """
    with storage_errors(path):
        key, before = str(path.resolve()), path.stat()
    stamp = [before.st_size, before.st_mtime_ns]
    try:
        entries = load_json_object(cache_file)
    except (CorruptArtefact, StorageError):
        entries = {}
    match entries.get(key):
        case [size, mtime, str(known)] if [size, mtime] == stamp:
            return known
    digest = sha256_file(path)
    with storage_errors(path):
        after = path.stat()
    unchanged = [after.st_size, after.st_mtime_ns] == stamp
    if unchanged and time.time_ns() - after.st_mtime_ns > 2 * 10**9:  # a later write could still bear the same time
        entries = {k: v for k, v in entries.items() if k != key}
        entries = dict([*entries.items()][-(HASH_ENTRIES - 1) :]) | {key: [*stamp, digest]}
        with suppress(StorageError, InputError):
            make_private_dir(cache_file.parent)
            write_json(cache_file, entries)
    return digest


def make_private_dir(path: Path) -> Path:
    """`path`, made with mode 0700 where it is missing (and so its missing parents). Raises StorageError."""
    with storage_errors(path):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            with suppress(FileExistsError):  # another process was first
                os.mkdir(folder, 0o700)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return path


def sync_dir(path: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    if os.name == "nt":  # folders cannot be opened there
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, mode 0600, durable on return; a crash leaves the old file or the new one.

    The folder must exist. Raises StorageError.
    """
    with storage_errors(path):
        fd, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)  # mode 0600 whatever the umask
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync_dir(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, for a file too large for memory; when the body ends it becomes `path`, mode 0600.

    A body that fails, or is interrupted, leaves `path` as it was. Raises StorageError.
    """
    with storage_errors(path):
        fd, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
        os.close(fd)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o600)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_dir(path.parent)


def check_disk(path: Path, n_bytes: int, *, remedy: str) -> None:
    """Raise StorageError unless `n_bytes` and some to spare fit on the disk of the folder `path`."""
    with storage_errors(path):
        free = shutil.disk_usage(path).free
    if n_bytes + SPARE > free:
        raise StorageError(
            f"{shown(path)}: {(n_bytes + SPARE) / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free; {remedy}"
        )


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of canonical JSON. Raises StorageError, InputError."""
    write_atomic(path, canonical_json(value))


def sweep(folder: Path) -> None:
    """Remove the half-written files of killed processes. Only for one who holds the lock of all writers there."""
    with suppress(OSError):
        for path in folder.glob(f"{TEMPORARY}*"):
            path.unlink()


def read_file(path: Path, *, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; symbolic links are not followed.

    Raises StorageError when the disk refuses, CorruptArtefact when the file is missing, too large or no regular file.
    """
    extra = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # the latter: a FIFO must not hang us
    with storage_errors(path):
        try:
            with open(path, "rb", opener=lambda name, flags: os.open(name, flags | extra)) as file:
                status = os.fstat(file.fileno())
                regular = stat.S_ISREG(status.st_mode)
                data = file.read(limit + 1) if regular and status.st_size <= limit else b""
        except FileNotFoundError:
            raise CorruptArtefact(f"{shown(path)} is missing") from None
        except IsADirectoryError:
            regular = False
    if not regular:
        raise CorruptArtefact(f"{shown(path)} is not a regular file")
    if max(status.st_size, len(data)) > limit:
        raise CorruptArtefact(f"{shown(path)} is larger than {limit:,} bytes; it cannot be one of ours")
    return data


def parse_json_object(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object of finite numbers. Raises CorruptArtefact that calls the bytes `name`."""
    try:
        value = json.loads(data.decode(), parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise CorruptArtefact(f"{name} is damaged: not readable as JSON") from error
    if not isinstance(value, dict):
        raise CorruptArtefact(f"{name} is damaged: it holds no JSON object")
    return value


def load_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CorruptArtefact, also when the file is missing, and StorageError."""
    return parse_json_object(read_file(path, limit=JSON_LIMIT), shown(path))


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value
