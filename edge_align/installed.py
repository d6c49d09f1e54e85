"""Bases that were added to the home: `models add` and `models rm`."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_align.bases import added_bases, KNOWN
from edge_align.bundle import Bundle, GGUF, MANIFEST, Member, mismatches, PACK, read_bundle, refuse, seal, unpack
from edge_align.config import RuntimeConfig
from edge_align.errors import InputError
from edge_align.files import (
    check_disk,
    check_name,
    make_private_dir,
    sha256_file,
    shown,
    storage_errors,
    sync_dir,
    TEMPORARY,
    write_atomic,
)
from edge_align.gguf_header import read_header
from edge_align.home import Home

Progress = Callable[[str, float], None]


def add_model(
    source: Path,
    *,
    home: Home,
    name: str | None = None,
    runtime: RuntimeConfig | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Copy a bundle (folder or tar) or a GGUF into the home, so that `name` (None: its own) can be given as a model.

    Nothing is kept unless every file is what the manifest says, all parts are of one base, and llama.cpp steers it.
    Raises InputError, CorruptArtefact (every mismatch), ModelLoadError, BackendUnavailable, StorageError.
    """
    tell = progress or (lambda _stage, _done: None)
    if not source.exists():
        raise InputError(f"{shown(source)} does not exist")
    bundle, rest = _of_gguf(source, name) if _is_gguf(source) else read_bundle(source)
    name = check_name("model", name or bundle.id)
    _check_free(home, name, bundle)
    make_private_dir(home.models_dir)
    check_disk(home.models_dir, bundle.size_bytes, remedy="free some space, or choose another folder with --home")
    with home.write_lock("models"), _becoming(home.models_dir, name) as work:
        wrong = unpack(bundle, rest, work, tell=lambda done: tell("copy", done))
        refuse(source, wrong or mismatches(work, bundle))
        if bundle.has_pack:
            from edge_align.pack import load_pack

            load_pack(work / PACK, base_hash=bundle.base_hash)
        tell("try", 0.0)
        check_steers(work / GGUF, runtime)
        write_atomic(work / MANIFEST, seal({**bundle.manifest, "id": name}, bundle.files))
    return {
        "id": name,
        "path": str(home.models_dir / name / GGUF),
        "hash": bundle.base_hash,
        "size_bytes": bundle.size_bytes,
        "pack": bundle.has_pack,
    }


def remove_model(name: str, *, home: Home) -> int:
    """Delete an added base with the pack that came with it; returns the bytes freed. Raises InputError."""
    if name in KNOWN:
        raise InputError(f"{name} comes with the package {KNOWN[name].distribution}; remove it with pip")
    if name not in added_bases(home):
        known = ", ".join(added_bases(home)) or "none"
        raise InputError(f"no model {ascii(name)[:80]} was added; there is {known}")
    folder = home.models_dir / name
    with home.write_lock("models"), storage_errors(folder):
        size = sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
        gone = folder.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        os.rename(folder, gone)  # out of sight in one step
        sync_dir(folder.parent)
        shutil.rmtree(gone, ignore_errors=True)
    return size


def check_steers(path: Path, runtime: RuntimeConfig | None = None) -> None:
    """Raise BackendUnavailable unless steering vectors change what llama.cpp computes with this model."""
    from edge_align.runtime.llamacpp import check_steering, LlamaCppBackend

    runtime = runtime or RuntimeConfig()
    config = RuntimeConfig(n_ctx=64, n_threads=runtime.n_threads, n_gpu_layers=runtime.n_gpu_layers)
    with LlamaCppBackend.open(path, config=config) as backend:
        check_steering(backend)


def _is_gguf(source: Path) -> bool:
    if not source.is_file():
        return False
    with storage_errors(source), source.open("rb") as file:
        return file.read(4) == b"GGUF"


def _of_gguf(source: Path, name: str | None) -> tuple[Bundle, Iterator[Member]]:
    """A bundle of one file."""
    header = read_header(source)
    name = name or re.sub(r"[^a-z0-9._-]+", "-", source.stem.lower()).strip("-._")[:64] or "model"
    size = source.stat().st_size
    manifest = {
        "id": name,
        "title": f"added from {source.name}",
        "architecture": header.architecture,
        "n_layer": header.n_layer,
        "d_model": header.d_model,
    }

    def only() -> Iterator[Member]:
        with storage_errors(source), source.open("rb") as file:
            yield Member(GGUF, size, file)

    return Bundle(manifest, {GGUF: (sha256_file(source), size)}), only()


def _check_free(home: Home, name: str, bundle: Bundle) -> None:
    taken = {other.lower() for other in (*KNOWN, *added_bases(home))}
    if name.lower() in taken:
        raise InputError(f"there is a model {name} already; give this one another name with --name, or remove that one")
    for other in added_bases(home):
        path = home.models_dir / other / GGUF
        if path.is_file() and path.stat().st_size == bundle.files[GGUF][1] and sha256_file(path) == bundle.base_hash:
            raise InputError(f"this base is here already, as {other}")


@contextmanager
def _becoming(parent: Path, name: str) -> Iterator[Path]:
    """A temporary folder that becomes `parent / name` when the body ends, or goes away. Leftovers of kills go first."""
    for leftover in parent.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    work = parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    with storage_errors(work):
        os.mkdir(work, 0o700)
    try:
        yield work
        with storage_errors(work):
            for path in work.rglob("*"):
                os.chmod(path, 0o700 if path.is_dir() else 0o600)
            os.rename(work, parent / name)
            sync_dir(parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
