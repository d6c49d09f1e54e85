"""A bundle: a base and all that belongs to it, in one folder or tar file, with a sealed manifest that lists every file.

    manifest.json                 written last into a folder, first into a tar
    model.gguf                    the base
    pack/                         its latent pack, as `export pack` makes it
    onnx/                         the base for ONNX Runtime, where the publisher gives one
    README.md                     the card

The same folder is what `models add` keeps under the home. Checksums find damage and mixed-up parts; they are no
signature: who can write a bundle can also write its manifest.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from edge_align.errors import ArtefactError, CorruptArtefact, EdgeAlignError, UnsupportedVersion
from edge_align.files import (
    canonical_json,
    is_name,
    JSON_LIMIT,
    load_json_object,
    parse_json_object,
    sha256_bytes,
    shown,
    storage_errors,
)
from edge_align.gguf_header import read_header

SCHEMA = 1
KIND = "bundle"
MANIFEST = "manifest.json"
GGUF = "model.gguf"
PACK = "pack"
ONNX = "onnx"
CARD = "README.md"

FILES_LIMIT = 1_000
LISTED = 12  # mismatches spelt out in one message
CHUNK = 2**20


@dataclass(frozen=True)
class Bundle:
    """A manifest that was checked. files: relative name -> (tagged sha256, bytes)."""

    manifest: dict[str, Any] = field(repr=False)
    files: dict[str, tuple[str, int]]

    @property
    def id(self) -> str:
        return str(self.manifest["id"])

    @property
    def base_hash(self) -> str:
        return self.files[GGUF][0]

    @property
    def has_pack(self) -> bool:
        return f"{PACK}/{MANIFEST}" in self.files

    @property
    def size_bytes(self) -> int:
        return sum(size for _, size in self.files.values())


@dataclass(frozen=True, slots=True)
class Member:
    """A file that a bundle brings. problem: why it is not taken; then there is nothing to read."""

    name: str
    size: int = 0
    data: BinaryIO | None = None
    problem: str | None = None


def seal(body: Mapping[str, Any], files: Mapping[str, tuple[str, int]]) -> bytes:
    """The bytes of a manifest. body: id, title and what else is to be known."""
    listed = {name: {"sha256": digest, "size_bytes": size} for name, (digest, size) in files.items()}
    whole = {**body, "schema": SCHEMA, "kind": KIND, "files": listed}
    return canonical_json({**whole, "checksum": sha256_bytes(canonical_json(whole))})


def parse(data: bytes, *, name: str) -> Bundle:
    """The manifest in `data`. Raises CorruptArtefact, UnsupportedVersion that calls it `name`."""
    manifest = parse_json_object(data, name)
    schema = manifest.get("schema")
    if manifest.get("kind") != KIND or not isinstance(schema, int):
        raise CorruptArtefact(f"{name} is no bundle's manifest")
    if schema > SCHEMA:
        raise UnsupportedVersion(f"{name} has schema {schema}, this edge-align knows {SCHEMA}; upgrade edge-align")
    checksum = manifest.pop("checksum", None)
    if checksum != sha256_bytes(canonical_json(manifest)):
        raise CorruptArtefact(f"{name} is damaged: it is not what was written")
    try:
        files = {str(key): (str(file["sha256"]), int(file["size_bytes"])) for key, file in manifest["files"].items()}
        fine = is_name(str(manifest["id"])) and GGUF in files and len(files) <= FILES_LIMIT
    except (AttributeError, KeyError, TypeError, ValueError):
        fine = False
    if not fine or not all(is_member(key) and 0 <= size < 1 << 48 for key, (_, size) in files.items()):
        raise CorruptArtefact(f"{name} is damaged: it does not describe a bundle")
    return Bundle(manifest, files)


def is_member(name: str) -> bool:
    """Can `name` be a file of a bundle: one folder deep at most, nothing that leads elsewhere on any system?"""
    parts = name.split("/")
    return len(parts) <= 2 and name != MANIFEST and all(is_name(part) for part in parts)


def members(source: Path) -> Iterator[Member]:
    """The files of a bundle's folder or tar, its manifest first. Raises CorruptArtefact, StorageError."""
    if source.is_dir():
        yield from _folder_members(source)
        return
    try:
        with storage_errors(source), tarfile.open(source, "r:") as archive:
            for entry in archive:
                if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    if not entry.isdir():  # folders are made where they are needed
                        yield Member(entry.name, problem="is a link or a device")
                    continue
                data = archive.extractfile(entry)
                assert data is not None
                yield Member(entry.name, entry.size, data)  # type: ignore[arg-type]
    except tarfile.TarError as error:
        raise CorruptArtefact(f"{shown(source)} is neither a GGUF nor a whole tar file of a bundle") from error


def _folder_members(source: Path) -> Iterator[Member]:
    with storage_errors(source):
        paths = sorted(source.rglob("*"), key=lambda path: (path != source / MANIFEST, path))
        for path in paths:
            name = PurePosixPath(path.relative_to(source)).as_posix()
            if path.is_symlink():
                yield Member(name, problem="is a link")
            elif path.is_file():
                with path.open("rb") as file:
                    yield Member(name, path.stat().st_size, file)


def read_bundle(source: Path) -> tuple[Bundle, Iterator[Member]]:
    """The manifest of a bundle, and its other members. Raises CorruptArtefact, UnsupportedVersion, StorageError."""
    rest = members(source)
    first = next(rest, None)
    if first is None or first.name != MANIFEST or first.data is None:
        raise CorruptArtefact(f"{shown(source)} is no bundle: it does not begin with {MANIFEST}")
    try:
        data = first.data.read(JSON_LIMIT + 1)
    except tarfile.TarError:
        raise CorruptArtefact(f"{shown(source)} is cut short") from None
    if len(data) > JSON_LIMIT:
        raise CorruptArtefact(f"{shown(source)}: {MANIFEST} is larger than any manifest")
    return parse(data, name=f"{shown(source)} ({MANIFEST})"), rest


def unpack(bundle: Bundle, rest: Iterator[Member], target: Path | None, *, tell: Callable[[float], None]) -> list[str]:
    """Check every member, and write it under `target` (None: only check); returns what is wrong, in words.

    Only names and sizes that the manifest lists are ever written. Raises CorruptArtefact, StorageError.
    """
    wrong, seen, done = [], set(), 0
    for member in rest:
        said = ascii(member.name)[1:-1][:80]
        entry = bundle.files.get(member.name)
        if member.problem:
            wrong.append(f"{said} {member.problem}")
        elif entry is None:
            wrong.append(f"{said} is not in the manifest")
        elif member.name in seen:
            wrong.append(f"{said} comes twice")
        elif member.size != entry[1]:
            seen.add(member.name)
            wrong.append(f"{said} has {member.size:,} bytes in place of {entry[1]:,}")
        else:
            assert member.data is not None
            seen.add(member.name)
            try:
                digest = _copy(member.data, None if target is None else target / member.name)
            except tarfile.TarError:
                wrong.append(f"{said} is cut short")
                break
            if digest != entry[0]:
                wrong.append(f"{said} is not the file that was bundled (checksum)")
            done += member.size
            tell(done / max(1, bundle.size_bytes))
    return wrong + [f"{name} is missing" for name in bundle.files if name not in seen]


def mismatches(folder: Path, bundle: Bundle) -> list[str]:
    """Parts of an unpacked bundle that do not belong together, in words."""
    wrong = []
    try:
        header = read_header(folder / GGUF)
        found = {"architecture": header.architecture, "n_layer": header.n_layer, "d_model": header.d_model}
        wrong += [
            f"{key} is {value!r} in {GGUF} and {bundle.manifest.get(key)!r} in the manifest"
            for key, value in found.items()
            if bundle.manifest.get(key) != value
        ]
    except EdgeAlignError as error:
        wrong.append(str(error))
    for part in (PACK, ONNX):
        if f"{part}/{MANIFEST}" not in bundle.files:
            continue
        try:
            made_for = load_json_object(folder / part / MANIFEST).get("base_hash")
        except ArtefactError as error:
            wrong.append(str(error))
            continue
        if made_for != bundle.base_hash:
            wrong.append(f"{part} was made for base {str(made_for)[:23]}…, {GGUF} is {bundle.base_hash[:23]}…")
    return wrong


def refuse(source: Path, wrong: list[str]) -> None:
    """Raise CorruptArtefact that lists what is wrong, if anything is."""
    if wrong:
        more = [f"and {len(wrong) - LISTED} more"] if len(wrong) > LISTED else []
        raise CorruptArtefact(f"{shown(source)} is damaged or mixed: {'; '.join(wrong[:LISTED] + more)}")


def _copy(source: BinaryIO, target: Path | None) -> str:
    """Stream into a new file (or nowhere); returns the tagged hash of what was read."""
    digest = hashlib.sha256()
    if target is None:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
        return "sha256:" + digest.hexdigest()
    with storage_errors(target):
        target.parent.mkdir(mode=0o700, exist_ok=True)
        with target.open("xb") as file:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                file.write(chunk)
    return "sha256:" + digest.hexdigest()
