"""`edge-align export gguf`: a Hugging Face folder or a GGUF becomes a GGUF of each type asked for, and a manifest."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
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

SCHEMA = 2  # 1: one file
MANIFEST = "manifest.json"
ROWS_AT_ONCE = 2**22  # numbers dequantised together when they are checked
LOSSLESS = frozenset({0, 1, 30})  # ggml types F32, F16, BF16

Progress = Callable[[str, float], None]


def export_gguf(
    source: Path,
    out: Path,
    *,
    quants: Sequence[str] = ("Q4_K_M",),
    threads: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `<name>-<quant>.gguf` of every type and, last, `manifest.json` into the empty folder `out`.

    source: a GGUF file, or a folder with config.json, tokenizer.json and safetensors. Returns the manifest. Everything
    that can be known before is checked before anything is written: settings, weights' names and shapes, NaN in a GGUF,
    disk, memory. Files get their names together, once all are made.
    Raises InputError, CorruptArtefact, ModelLoadError, StorageError, BackendError, BackendUnavailable.
    """
    quants = list(dict.fromkeys(quants))
    for quant in quants:
        if quant not in FTYPES:
            raise InputError(f"unknown type {ascii(quant)[:20]}; there are {', '.join(FTYPES)}")
    narrow = [quant for quant in quants if quant not in FLOATS]
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
    bits = sum(map(bits_per_weight, quants))
    if folder is not None and narrow and "F16" not in quants:
        bits += bits_per_weight("F16")  # a temporary one
    check_disk(out, int(n_values * bits / 8), remedy="free some space, or choose another disk with --out")
    check_memory(largest * 12)
    names = {quant: f"{_stem(source)}-{quant}.gguf" for quant in quants}
    notes = []
    with ExitStack() as stack:
        targets = {quant: stack.enter_context(replacing(out / name)) for quant, name in names.items()}
        if folder is not None:
            _from_folder(folder, targets, threads, tell)
        else:
            assert header is not None
            _check_finite(source, header, tell=lambda done: tell("check", done))
            if any(tensor.type not in LOSSLESS for tensor in header.tensors.values()) and narrow:
                notes.append("the source is quantised already: what that lost stays lost")
            for quant, target in targets.items():
                _quantise(source, target, quant, threads, tell)
        made = [read_header(target) for target in targets.values()][0]  # whole, and models
    manifest = {
        "schema": SCHEMA,
        "kind": "gguf-export",
        "files": [
            {
                "file": name,
                "sha256": sha256_file(out / name),
                "size_bytes": (out / name).stat().st_size,
                "quant": quant,
            }
            for quant, name in names.items()
        ],
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


def _from_folder(folder: HFFolder, targets: dict[str, Path], threads: int, tell: Callable[[str, float], None]) -> None:
    """Types of floating point straight from the weights, the others by way of F16, a temporary file if need be."""
    floats = {quant: target for quant, target in targets.items() if quant in FLOATS}
    narrow = {quant: target for quant, target in targets.items() if quant not in FLOATS}
    first = next(iter(targets.values()))
    temporary = first.with_name(f"{first.name}-f16")  # the same prefix, so that it is swept as well
    if narrow:
        floats.setdefault("F16", temporary)
    try:
        for quant, target in floats.items():
            convert(folder, target, float_type=quant, tell=lambda done: tell("convert", done))
        for quant, target in narrow.items():
            _quantise(floats["F16"], target, quant, threads, tell)
    finally:
        temporary.unlink(missing_ok=True)


def _quantise(source: Path, target: Path, quant: str, threads: int, tell: Callable[[str, float], None]) -> None:
    quantise(source, target, quant, threads=threads, tell=lambda done: tell(f"quantise {quant}", done))


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
