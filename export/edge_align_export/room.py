"""Is there room for what an export is about to write? Asked before it starts (the disk: `files.check_disk`)."""

from __future__ import annotations

import os
from pathlib import Path

from edge_align.errors import InputError, StorageError
from edge_align.files import make_private_dir, shown, storage_errors, sweep, TEMPORARY


def empty_folder(path: Path) -> Path:
    """`path`, made if it is missing; leftovers of a stopped export are removed. Raises InputError if it holds more."""
    make_private_dir(path)
    sweep(path)
    with storage_errors(path):
        found = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(TEMPORARY))
    if found:
        raise InputError(f"{shown(path)} is not empty (it holds {found[0][:60]}); choose a new folder with --out")
    return path


def check_memory(n_bytes: int) -> None:
    """Raise StorageError where the system says that less memory than this is free."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not told on this system
        return
    cached = _reclaimable()
    if n_bytes > free + cached:
        raise StorageError(f"{n_bytes / 1e6:,.0f} MB of memory are needed, {(free + cached) / 1e6:,.0f} MB are free")


def _reclaimable() -> int:
    """Bytes of memory that hold cached files (Linux), which the system gives up when asked."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Cached:"))
