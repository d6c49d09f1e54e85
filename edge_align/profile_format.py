"""What the files of a profile hold: a sealed manifest beside its tensors, and two small records of choices made."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TYPE_CHECKING

from edge_align.errors import CorruptArtefact, InputError, UnsupportedVersion
from edge_align.files import (
    canonical_json,
    load_json_object,
    parse_json_object,
    sha256_bytes,
    shown,
    storage_errors,
    write_json,
)
from edge_align.tensors import parse_tensors

if TYPE_CHECKING:
    import numpy as np

SCHEMA = 1
TENSORS = "encoder.safetensors"
MANIFEST = "manifest.json"
ACTIVATIONS_KEPT = 100
NONE = 0  # among the numbers of activated versions: none was active from then on

_VERSION = re.compile(r"v([0-9]{4,6})")

Loaded = tuple["dict[str, np.ndarray]", dict[str, Any]]
"""The tensors (read-only) and the manifest of a version."""


def version_folder(folder: Path, version: int) -> Path:
    """Where a version of the profile in `folder` lies."""
    return folder / f"v{version:04d}"


def version_numbers(folder: Path) -> list[int]:
    """Numbers of all version folders, complete or not, ascending. Raises StorageError."""
    with storage_errors(folder):
        found = [_VERSION.fullmatch(entry.name) for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in found if match)


def seal_manifest(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest with its schema and its own checksum. Raises InputError for what JSON cannot hold."""
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    body |= {"schema": SCHEMA, "kind": "profile"}
    return canonical_json({**body, "checksum": sha256_bytes(canonical_json(body))})


def parse_version(tensor_data: bytes, manifest_data: bytes, *, name: str) -> Loaded:
    """A version out of the bytes of its two files, after every check.

    Raises CorruptArtefact or UnsupportedVersion that calls the version `name`.
    """
    manifest = parse_json_object(manifest_data, f"{name} ({MANIFEST})")
    _check_schema(manifest, name)
    try:
        intact = seal_manifest(manifest) == manifest_data
    except InputError:
        intact = False
    if not intact:
        raise CorruptArtefact(f"{name} is damaged: {MANIFEST} is not what was written")
    if manifest.get("tensors_sha256") != sha256_bytes(tensor_data):
        raise CorruptArtefact(f"{name} is damaged: {TENSORS} is not what was written")
    try:
        expected = {key: (str(dtype), tuple(map(int, shape))) for key, (dtype, shape) in manifest["tensors"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptArtefact(f"{name} is damaged: {MANIFEST} does not describe the tensors") from error
    return parse_tensors(tensor_data, expected, name=f"{name} ({TENSORS})"), manifest


def read_activations(path: Path) -> tuple[int, ...]:
    """The versions that were activated, the active one last, NONE where none was; empty without a file.

    Raises CorruptArtefact, UnsupportedVersion, StorageError.
    """
    if not os.path.lexists(path):
        return ()
    record = load_json_object(path)
    _check_schema(record, shown(path))
    match record:
        case {"schema": 1, "activated": [*numbers]} if all(_is_number(n, least=NONE) for n in numbers):
            return tuple(numbers)
    raise CorruptArtefact(f"{shown(path)} is damaged; `edge-align profiles undo` goes to a version that opens")


def write_activations(path: Path, numbers: tuple[int, ...]) -> None:
    """Replace the record that `read_activations` reads. Raises StorageError."""
    write_json(path, {"schema": SCHEMA, "activated": [*numbers[-ACTIVATIONS_KEPT:]]})


def read_choice(path: Path) -> str | None:
    """The name of the profile in use; None without a file or a choice.

    Raises CorruptArtefact, UnsupportedVersion, StorageError.
    """
    if not os.path.lexists(path):
        return None
    record = load_json_object(path)
    _check_schema(record, shown(path))
    match record:
        case {"schema": 1, "profile": str() | None as name}:
            return name
    raise CorruptArtefact(f"{shown(path)} is damaged; choose a profile again with `edge-align profiles use`")


def write_choice(path: Path, name: str | None) -> None:
    """Replace the record that `read_choice` reads. Raises StorageError."""
    write_json(path, {"schema": SCHEMA, "profile": name})


def _check_schema(record: Mapping[str, Any], name: str) -> None:
    schema = record.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise UnsupportedVersion(f"{name} has schema {schema}, this edge-align knows {SCHEMA}; upgrade edge-align")


def _is_number(value: object, *, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 10**6
