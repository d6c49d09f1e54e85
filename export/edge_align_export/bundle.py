"""`edge-align export bundle`: a base, its latent pack and, where given, its ONNX folder, as one folder or tar file."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any

import edge_align
from edge_align.bases import BaseModel, find_base, KNOWN
from edge_align.bundle import CARD, GGUF, is_member, MANIFEST, ONNX, PACK, seal
from edge_align.config import RuntimeConfig
from edge_align.errors import IncompatibleBase, InputError
from edge_align.files import (
    check_disk,
    check_name,
    load_json_object,
    replacing,
    sha256_bytes,
    sha256_file,
    shown,
    storage_errors,
    write_atomic,
)
from edge_align.home import Home
from edge_align.installed import check_steers
from edge_align.registry import find_folder, find_pack
from edge_align_export.room import empty_folder

Progress = Callable[[str, float], None]
Content = Path | bytes


def build_bundle(
    out: Path,
    *,
    home: Home,
    model: str | None = None,
    onnx: Path | None = None,
    name: str | None = None,
    runtime: RuntimeConfig | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a bundle of `model` to `out`: a tar where the name ends with .tar, else a new or empty folder.

    name: the id it is installed under; by default the base's own. Raises InputError, PackMissing, IncompatibleBase,
    BackendUnavailable (llama.cpp does not steer this base), StorageError.
    """
    tell = progress or (lambda _stage, _done: None)
    base = find_base(model, home=home)
    name = check_name("model", name or (f"{base.id}-bundle" if base.id in KNOWN else base.id))
    if name in KNOWN:
        raise InputError(f"{name} is a known id, under which nothing can be added; choose another one with --name")
    find_pack(base, home)  # opens, and is of this base
    pack = find_folder(base, home)
    tell("try", 0.0)
    check_steers(base.path, runtime)
    contents: dict[str, Content] = {GGUF: base.path, **_folder(pack, PACK)}
    if onnx is not None:
        contents |= _folder(onnx, ONNX)
        _check_onnx(onnx, base)
    contents[CARD] = card(base, name, onnx=onnx is not None).encode()
    size = sum(len(item) if isinstance(item, bytes) else item.stat().st_size for item in contents.values())
    as_tar = out.suffix == ".tar"
    if as_tar:
        if os.path.lexists(out):
            raise InputError(f"{shown(out)} exists; choose another file with --out")
        if not out.parent.is_dir():
            raise InputError(f"{shown(out.parent)} does not exist; make the folder first")
    else:
        empty_folder(out)
    check_disk(out.parent if as_tar else out, size, remedy="free some space, or choose another disk with --out")
    files = {
        key: (sha256_bytes(item), len(item)) if isinstance(item, bytes) else _known(item, base)
        for key, item in contents.items()
    }
    body = {
        "id": name,
        "title": str(base.header.metadata.get("general.name", base.id))[:120],
        "architecture": base.header.architecture,
        "n_layer": base.n_layer,
        "d_model": base.d_model,
        "edge_align": edge_align.__version__,
    }
    manifest = seal(body, files)
    if as_tar:
        _write_tar(out, manifest, contents, size, tell)
    else:
        _write_folder(out, manifest, contents, size, tell)
    return {"bundle": str(out), "id": name, "size_bytes": size, "files": len(files), "base_hash": base.hash}


def card(base: BaseModel, name: str, *, onnx: bool) -> str:
    """Markdown for people."""
    meta = base.header.metadata
    licence = meta.get("general.license", "not stated in the file; ask who made the base")
    engines = "llama.cpp and ONNX Runtime" if onnx else "llama.cpp"
    return f"""# {name}

A base model for edge-align with its latent pack, for {engines}: {base.header.architecture}, {base.n_layer} blocks of
width {base.d_model}. It holds nothing of any person.

```
edge-align models add PATH-OF-THIS-BUNDLE
edge-align personalize --model {name} --feedback my.jsonl
```

`{GGUF}` has the hash `{base.hash}`; what the pack is and what was measured on it stands in `{PACK}/{CARD}`. Licence of
the base: {licence}. Checksums of all files are in `{MANIFEST}`.
"""


def _folder(folder: Path, part: str) -> dict[str, Content]:
    """The files of a folder under `part`; hidden ones are left out. Raises InputError for names not allowed."""
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{shown(folder)} has no {MANIFEST}; give a folder that edge-align exported")
    found: dict[str, Content] = {}
    for path in sorted(folder.rglob("*")):
        name = PurePosixPath(path.relative_to(folder)).as_posix()
        if path.is_dir() or name.startswith("."):
            continue
        if not is_member(f"{part}/{name}"):
            raise InputError(f"{shown(path)} cannot be part of a bundle; take it out of the folder")
        found[f"{part}/{name}"] = path
    return found


def _check_onnx(onnx: Path, base: BaseModel) -> None:
    made_for = load_json_object(onnx / MANIFEST).get("base_hash")
    if made_for != base.hash:
        raise IncompatibleBase(f"{shown(onnx)} was made for base {str(made_for)[:23]}…, not {base.hash[:23]}…")


def _known(path: Path, base: BaseModel) -> tuple[str, int]:
    return (base.hash if path == base.path else sha256_file(path)), path.stat().st_size


def _write_folder(
    out: Path, manifest: bytes, contents: dict[str, Content], size: int, tell: Callable[[str, float], None]
) -> None:
    done = 0
    for name, item in contents.items():
        target = out / name
        with storage_errors(target):
            target.parent.mkdir(mode=0o700, exist_ok=True)
        if isinstance(item, bytes):
            write_atomic(target, item)
        else:
            with replacing(target) as temporary, item.open("rb") as source, temporary.open("wb") as file:
                while chunk := source.read(2**22):
                    file.write(chunk)
                    done += len(chunk)
                    tell("copy", done / size)
    write_atomic(out / MANIFEST, manifest)


def _write_tar(
    out: Path, manifest: bytes, contents: dict[str, Content], size: int, tell: Callable[[str, float], None]
) -> None:
    """The manifest first, so that who unpacks knows what to expect; no clock and no owner in it."""
    done = 0
    with replacing(out) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, item in ({MANIFEST: manifest} | contents).items():
            entry = tarfile.TarInfo(name)
            entry.mode, entry.size = 0o600, len(item) if isinstance(item, bytes) else item.stat().st_size
            with closing(io.BytesIO(item) if isinstance(item, bytes) else item.open("rb")) as source:
                archive.addfile(entry, source)
            done += entry.size
            tell("copy", min(1.0, done / size))
