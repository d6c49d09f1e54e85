"""`export onnx`: a checkpoint becomes a folder that ONNX Runtime runs with steering, sealed by a manifest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from edge_align import __version__
from edge_align.config import RuntimeConfig, SamplingConfig
from edge_align.errors import BackendUnavailable, InputError, ModelLoadError, StorageError
from edge_align.files import (
    make_private_dir,
    replacing,
    sha256_file,
    shown,
    storage_errors,
    sync_dir,
    write_atomic,
    write_json,
)
from edge_align.onnx_files import DECODER, ENCODER, KIND, MANIFEST, SCHEMA, TEMPLATE, TOKENIZER, WEIGHTS
from edge_align_export.checkpoint import open_checkpoint
from edge_align_export.decoder_spec import Checkpoint, DecoderSpec

try:
    from edge_align_export.onnx_graph import decoder_graph, encoder_graph, Precision
    from edge_align_export.onnx_weights import WeightFile
    from edge_align_export.tokenizer_json import read_tokenizer
except ImportError as error:
    raise BackendUnavailable('exporting needs more packages; run: pip install "edge-align[export,onnx]"') from error

BYTES_PER_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "int8": 1.2, "int4": 0.75}
PARTIAL = ".partial"  # ending of the folder an export is written in; renamed when it is whole

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class OnnxExport:
    """What was made."""

    folder: str
    base: str
    base_hash: str
    architecture: str
    precision: str
    n_layer: int
    d_model: int
    n_vocab: int
    n_ctx: int
    size_bytes: int
    source_bits: float  # of a weight

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export_onnx(
    source: Path, out: Path, *, precision: str = "int4", base_id: str | None = None, progress: Progress | None = None
) -> OnnxExport:
    """Export a GGUF or a Hugging Face folder to `out`, which must not exist or be empty.

    base_id: the id the export answers to (None: the source's name). A killed export leaves a folder `out`.partial that
    does not load and that the next export of the same name removes.

    Raises InputError, ModelLoadError, BackendUnavailable, StorageError.
    """
    if precision not in get_args(Precision):
        raise InputError(f"unknown precision {precision!r}; choose one of {', '.join(get_args(Precision))}")
    tell = progress or (lambda _stage, _done: None)
    tell("read", 0.0)
    _check_out(out)
    checkpoint = open_checkpoint(source)
    tokenizer = read_tokenizer(source)
    spec = checkpoint.spec
    needed = int(n_weights(spec, tied="head" not in checkpoint.names) * BYTES_PER_WEIGHT[precision])
    _check_room(out, needed, spec)
    tell("read", 1.0)
    partial = out.with_name(out.name + PARTIAL)
    with storage_errors(partial):
        shutil.rmtree(partial, ignore_errors=True)
        make_private_dir(partial)
        _write_graphs(checkpoint, partial, precision, lambda n: tell("write", min(1.0, n / needed)))
    tell("write", 1.0)
    write_atomic(partial / TOKENIZER, tokenizer.document.encode())
    write_atomic(partial / TEMPLATE, tokenizer.template.encode())
    tell("seal", 0.0)
    files = {path.name: path for path in sorted(partial.iterdir())}
    size = sum(path.stat().st_size for path in files.values())
    manifest = {
        "kind": KIND,
        "schema": SCHEMA,
        "base": base_id or checkpoint.id,
        "base_hash": checkpoint.base_hash,
        "architecture": spec.architecture,
        "precision": precision,
        **{name: getattr(spec, name) for name in ("n_layer", "d_model", "n_vocab", "n_head_kv", "d_head", "n_ctx")},
        "tokens": {"bos": tokenizer.bos, "adds_bos": tokenizer.adds_bos, "ends": [*tokenizer.ends]},
        "files": {name: {"sha256": sha256_file(path), "bytes": path.stat().st_size} for name, path in files.items()},
        "made_by": f"edge-align {__version__}",
    }
    write_json(partial / MANIFEST, manifest)
    _try_it(partial)
    with storage_errors(out):
        if out.is_dir():
            out.rmdir()  # empty, as checked
        os.replace(partial, out)
        sync_dir(out.parent)
    tell("seal", 1.0)
    return OnnxExport(
        folder=str(out),
        base=str(manifest["base"]),
        base_hash=checkpoint.base_hash,
        architecture=spec.architecture,
        precision=precision,
        n_layer=spec.n_layer,
        d_model=spec.d_model,
        n_vocab=spec.n_vocab,
        n_ctx=spec.n_ctx,
        size_bytes=size,
        source_bits=checkpoint.bits,
    )


def n_weights(spec: DecoderSpec, *, tied: bool) -> int:
    """How many numbers the matrices of a model hold."""
    attention = spec.d_model * spec.d_head * 2 * (spec.n_head + spec.n_head_kv)
    return spec.n_layer * (attention + 3 * spec.d_model * spec.d_ff) + spec.n_vocab * spec.d_model * (1 if tied else 2)


def _check_out(out: Path) -> None:
    with storage_errors(out):
        if out.exists() and not out.is_dir():
            raise InputError(f"{shown(out)} is a file; give a new folder with --out")
        if out.is_dir() and any(out.iterdir()):
            raise InputError(f"the folder {shown(out)} is not empty; give a new one with --out, or remove it first")


def _check_room(out: Path, needed: int, spec: DecoderSpec) -> None:
    """Raise StorageError before anything is written that would not fit the disk, or memory."""
    place = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed * 1.05:
        raise StorageError(
            f"{shown(place)}: the export needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; make room, "
            "or choose another folder with --out"
        )
    largest = 4 * spec.d_model * max(spec.n_vocab, 3 * spec.d_ff)  # the largest matrix, held about four times over
    memory = _available_memory()
    if memory is not None and memory < 4 * largest:
        raise StorageError(
            f"the export needs {4 * largest / 1e9:.1f} GB of memory and {memory / 1e9:.1f} GB are free; "
            "close other programs and try again"
        )


def _available_memory() -> int | None:
    """Bytes of memory that can still be had, where the system says so."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    line = next((line for line in text.splitlines() if line.startswith("MemAvailable:")), None)
    return None if line is None else int(line.split()[1]) * 1024


def _write_graphs(checkpoint: Checkpoint, folder: Path, precision: str, tell: Callable[[int], None]) -> None:
    with replacing(folder / WEIGHTS) as path, path.open("wb") as file:
        weights = WeightFile(file, name=WEIGHTS, precision=precision, tell=tell)
        graphs = {DECODER: decoder_graph(checkpoint, weights), ENCODER: encoder_graph(checkpoint, weights)}
    for name, graph in graphs.items():
        write_atomic(folder / name, graph.SerializeToString(deterministic=True))


def _try_it(folder: Path) -> None:
    """Load what was written and decode with it, where ONNX Runtime is installed."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return
    import numpy as np

    from edge_align.runtime.onnx import OnnxBackend

    with OnnxBackend.open(folder, config=RuntimeConfig(n_ctx=64, n_threads=1)) as backend:
        (logits,) = backend.score([0, 0], [[0, 0]], vectors=None)
        if not np.isfinite(logits).all():
            raise ModelLoadError("the exported model computes NaN or infinity; export it with --precision fp32")
        list(backend.generate([0], vectors=None, sampling=SamplingConfig(max_tokens=2)))
