"""`edge-align export gguf`: a Hugging Face folder or a GGUF becomes one GGUF of the type asked for, and a manifest."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

import edge_align
from edge_align.errors import CorruptArtefact, InputError, ModelLoadError
from edge_align.files import check_disk, replacing, sha256_file, shown, write_json
from edge_align.gguf_header import GGUFHeader, read_header
from edge_align.gguf_tensors import GGUFTensors
from edge_align_export.hf_folder import HFFolder, open_folder
from edge_align_export.hf_to_gguf import check_convertible, convert, FLOATS
from edge_align_export.quantise import bits_per_weight, FTYPES, quantise
from edge_align_export.room import check_memory, empty_folder

SCHEMA = 1
MANIFEST = "manifest.json"
ROWS_AT_ONCE = 2**22  # numbers dequantised together when they are checked
LOSSLESS = frozenset({0, 1, 30})  # ggml types F32, F16, BF16

Progress = Callable[[str, float], None]


def export_gguf(
    source: Path, out: Path, *, quant: str = "Q4_K_M", threads: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Write `<name>-<quant>.gguf` and, last, `manifest.json` into the empty folder `out`; returns the manifest.

    source: a GGUF file, or a folder with config.json, tokenizer.json and safetensors. Everything that can be known
    before is checked before anything is written: settings, weights' names and shapes, NaN in a GGUF, disk, memory.
    Raises InputError, CorruptArtefact, ModelLoadError, StorageError, BackendError, BackendUnavailable.
    """
    if quant not in FTYPES:
        raise InputError(f"unknown type {ascii(quant)[:20]}; there are {', '.join(FTYPES)}")
    tell = progress or (lambda _stage, _done: None)
    started = time.perf_counter()
    if source.is_file():
        header = read_header(source)
        architecture, folder = header.architecture, None
        n_values, largest = _sizes(header)
    else:
        folder = open_folder(source)
        architecture, header = check_convertible(folder), None
        n_values = folder.n_values
        largest = max(int(np.prod(shape, dtype=np.int64)) for shape in folder.shapes.values())
    empty_folder(out)
    wide = folder is not None and quant not in FLOATS  # by way of a temporary F16
    needed = int(n_values * (bits_per_weight(quant) + (16 if wide else 0)) / 8)
    check_disk(out, needed, remedy="free some space, or choose another disk with --out")
    check_memory(largest * 12)
    name = f"{_stem(source)}-{quant}.gguf"
    notes = []
    with ExitStack() as stack:
        target = stack.enter_context(replacing(out / name))
        if folder is not None:
            _from_folder(folder, target, quant, out, threads, tell)
        else:
            assert header is not None
            _check_finite(source, header, tell=lambda done: tell("check", done))
            if any(tensor.type not in LOSSLESS for tensor in header.tensors.values()) and quant not in FLOATS:
                notes.append("the source is quantised already: what that lost stays lost")
            quantise(source, target, quant, threads=threads, tell=lambda done: tell("quantise", done))
        made = read_header(target)  # whole, and a model
    manifest = {
        "schema": SCHEMA,
        "kind": "gguf-export",
        "file": name,
        "sha256": sha256_file(out / name),
        "size_bytes": (out / name).stat().st_size,
        "quant": quant,
        "architecture": architecture,
        "n_layer": made.n_layer,
        "d_model": made.d_model,
        "from": source.resolve().name,
        "source_sha256": None if folder is not None else sha256_file(source),
        "notes": notes,
        "edge_align": edge_align.__version__,
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(out / MANIFEST, manifest)
    return manifest


def _from_folder(
    folder: HFFolder, target: Path, quant: str, out: Path, threads: int, tell: Callable[[str, float], None]
) -> None:
    if quant in FLOATS:
        convert(folder, target, float_type=quant, tell=lambda done: tell("convert", done))
        return
    wide = out / f"{target.name}-f16"  # the same prefix, so that it is swept as well
    try:
        convert(folder, wide, tell=lambda done: tell("convert", done))
        quantise(wide, target, quant, threads=threads, tell=lambda done: tell("quantise", done))
    finally:
        wide.unlink(missing_ok=True)


def _sizes(header: GGUFHeader) -> tuple[int, int]:
    """Numbers in all tensors, and in the largest."""
    counts = [int(np.prod(tensor.shape, dtype=np.int64)) for tensor in header.tensors.values()]
    return sum(counts), max(counts)


def _check_finite(path: Path, header: GGUFHeader, *, tell: Callable[[float], None]) -> None:
    """Raise CorruptArtefact that lists the tensors with NaN or infinity; types numpy cannot read are passed over."""
    tensors = GGUFTensors(path)
    wrong = []
    for done, (name, tensor) in enumerate(header.tensors.items(), 1):
        n_rows = int(np.prod(tensor.shape[1:], dtype=np.int64))
        size = max(1, ROWS_AT_ONCE // tensor.shape[0])
        with suppress(ModelLoadError):
            for start in range(0, n_rows, size):
                if not np.isfinite(tensors.rows(name, np.arange(start, min(n_rows, start + size)))).all():
                    wrong.append(name)
                    break
        tell(done / len(header.tensors))
    if wrong:
        raise CorruptArtefact(f"{shown(path)} has NaN or infinity in {', '.join(wrong[:8])}")


def _stem(source: Path) -> str:
    """A file name out of the source's own, without the type it may end with."""
    own = source.resolve()
    stem = own.stem if source.is_file() else own.name
    stem = re.sub(r"[-._](?:[IT]?Q\d\w*|B?F16|F32)$", "", stem, flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "model"
