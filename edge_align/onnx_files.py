"""An exported ONNX model on disk: a folder of graphs, weights and tokenizer, and the manifest that seals it.

The manifest is written last and names the size and hash of every file; a folder without one does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_align.errors import CorruptArtefact, UnsupportedVersion
from edge_align.files import cached_hash, load_json_object, sha256_file, shown

MANIFEST = "manifest.json"
KIND = "edge-align onnx decoder"
SCHEMA = 1
DECODER, ENCODER, WEIGHTS = "model.onnx", "encoder.onnx", "model.onnx.data"
TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"

_NUMBERS = ("n_layer", "d_model", "n_vocab", "n_head_kv", "d_head", "n_ctx")
_TEXTS = ("base", "base_hash", "architecture", "precision")


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """What the manifest of an export says. `base_hash` is that of the file the export was made from."""

    folder: Path
    base: str  # id of the base
    base_hash: str
    architecture: str
    precision: str
    n_layer: int
    d_model: int
    n_vocab: int
    n_head_kv: int
    d_head: int
    n_ctx: int
    bos: int | None
    adds_bos: bool
    ends: tuple[int, ...]  # tokens that end an answer
    size_bytes: int
    has_template: bool


def is_export(folder: Path) -> bool:
    """Does the folder hold a finished export?"""
    return (folder / MANIFEST).is_file() and (folder / DECODER).is_file()


def read_export(folder: Path, *, hash_cache: Path | None = None) -> OnnxModel:
    """Read a manifest and check every file it names. `hash_cache`: see `files.cached_hash`.

    Raises CorruptArtefact (one line that lists all that is wrong), UnsupportedVersion, StorageError.
    """
    manifest = load_json_object(folder / MANIFEST)
    if manifest.get("kind") != KIND:
        raise CorruptArtefact(f"{shown(folder)} is not an ONNX export of edge-align")
    schema = manifest.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise UnsupportedVersion(f"{shown(folder)} was written by a newer edge-align (schema {schema}); upgrade")
    wrong = [f"{name} is {manifest.get(name)!r}" for name in _NUMBERS if not _is_size(manifest.get(name))]
    wrong += [f"{name} is {manifest.get(name)!r}" for name in _TEXTS if not isinstance(manifest.get(name), str)]
    tokens = manifest.get("tokens")
    if not isinstance(tokens, dict) or not _are_tokens(tokens):
        wrong.append("its tokens are not usable")
    files = manifest.get("files")
    if not isinstance(files, dict) or not {DECODER, ENCODER, WEIGHTS, TOKENIZER} <= files.keys():
        wrong.append("its list of files is not complete")
    else:
        wrong += _check_files(folder, files, hash_cache)
    if schema != SCHEMA or wrong:
        raise CorruptArtefact(f"{shown(folder)} is damaged: {'; '.join(wrong) or f'its schema is {schema!r}'}")
    assert isinstance(tokens, dict) and isinstance(files, dict)
    return OnnxModel(
        folder=folder,
        **{name: manifest[name] for name in (*_TEXTS, *_NUMBERS)},
        bos=tokens["bos"],
        adds_bos=tokens["adds_bos"],
        ends=tuple(tokens["ends"]),
        size_bytes=sum(entry["bytes"] for entry in files.values()),
        has_template=TEMPLATE in files,
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _are_tokens(tokens: Mapping[str, Any]) -> bool:
    bos, ends = tokens.get("bos", ""), tokens.get("ends")
    return (
        (bos is None or isinstance(bos, int))
        and isinstance(tokens.get("adds_bos"), bool)
        and isinstance(ends, list)
        and all(isinstance(token, int) for token in ends)
    )


def _check_files(folder: Path, files: Mapping[str, Any], hash_cache: Path | None) -> list[str]:
    wrong = []
    for name, entry in files.items():
        path = folder / name
        if Path(name).name != name or not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int):
            wrong.append(f"its entry for {name!r} is not usable")
        elif not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            wrong.append(f"{name} has {path.stat().st_size:,} bytes, not {entry['bytes']:,}")
        elif (cached_hash(path, hash_cache) if hash_cache else sha256_file(path)) != entry.get("sha256"):
            wrong.append(f"the content of {name} is not what was exported")
    return wrong
