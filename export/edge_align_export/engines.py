"""The engines that `export verify` compares, behind one question: which logits predict tokens under these vectors?

An engine is a line in ENGINES: what it takes, and how to open it. PyTorch in float32 is the one others are held to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_align.config import RuntimeConfig
from edge_align.errors import BackendUnavailable
from edge_align.onnx_files import is_export
from edge_align.records import SteeringVectors

Score = Callable[[Sequence[int], Sequence[int], SteeringVectors | None], np.ndarray]
"""(prompt, completion, vectors) -> teacher-forced logits (len(completion), n_vocab) float32, steered from the last
prompt token on; as `Backend.score`."""


@dataclass(frozen=True, slots=True)
class Engine:
    """takes: can it open this artefact? open: a context manager that gives `Score`, or raises BackendUnavailable."""

    name: str
    takes: Callable[[Path], bool]
    open: Callable[[Path, RuntimeConfig], Any]


def is_gguf(path: Path) -> bool:
    return path.is_file() and path.suffix == ".gguf"


def is_hf_folder(path: Path) -> bool:
    return path.is_dir() and (path / "config.json").is_file() and any(path.glob("*.safetensors"))


@contextmanager
def open_torch(path: Path, _runtime: RuntimeConfig) -> Iterator[Score]:
    """The file's own weights, dequantised, in float32."""
    model = _open_model(path)
    yield lambda prompt, completion, vectors: model.score(
        prompt, completion, None if vectors is None else vectors.array
    )


def _open_model(path: Path) -> Any:
    """Our own reference, or transformers for what that does not compute."""
    from edge_align.runtime.torch_ref import LlamaReference
    from edge_align_export.hooked import HookedModel

    if is_gguf(path):
        with suppress(BackendUnavailable):
            return LlamaReference(path)
    return HookedModel.open(path)


@contextmanager
def open_llamacpp(path: Path, runtime: RuntimeConfig) -> Iterator[Score]:
    """llama.cpp, through the backend that answers."""
    from edge_align.runtime.llamacpp import LlamaCppBackend

    with LlamaCppBackend.open(path, config=runtime) as backend:
        yield lambda prompt, completion, vectors: backend.score(prompt, [completion], vectors=vectors)[0]


@contextmanager
def open_onnx(path: Path, runtime: RuntimeConfig) -> Iterator[Score]:
    """ONNX Runtime, through the backend that answers."""
    from edge_align.runtime.onnx import OnnxBackend

    with OnnxBackend.open(path, config=runtime) as backend:
        yield lambda prompt, completion, vectors: backend.score(prompt, [completion], vectors=vectors)[0]


REFERENCE = Engine("PyTorch", lambda path: is_gguf(path) or is_hf_folder(path), open_torch)
"""What others are held to, in float32."""

ENGINES = (
    REFERENCE,
    Engine("llama.cpp", is_gguf, open_llamacpp),
    Engine("ONNX Runtime", is_export, open_onnx),
)
"""Every engine that is compared."""
