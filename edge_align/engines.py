"""Which engine opens a base: the one that reads its files, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from edge_align.bases import BaseModel
from edge_align.config import RuntimeConfig
from edge_align.errors import InputError
from edge_align.onnx_files import TOKENIZER
from edge_align.runtime.base import Scoring

ENGINES = ("llamacpp", "onnx")

Tokenize = Callable[[str], Sequence[int]]


def check_engine(base: BaseModel, engine: str | None) -> None:
    """Raise InputError when `engine` (None: whichever fits) does not read this base's files."""
    if engine is None or engine == base.engine:
        return
    if engine not in ENGINES:
        raise InputError(f"unknown engine {ascii(engine)}; engines are {', '.join(ENGINES)}")
    if engine == "onnx":
        raise InputError(
            f"the engine onnx runs exported folders, and {base.id} is a GGUF; export it first with: "
            f"edge-align export onnx --from {base.path} --out DIR, then give --model DIR"
        )
    raise InputError(f"the engine llamacpp runs GGUF files, and {base.path} is an ONNX export; leave out --engine")


def open_backend(base: BaseModel, config: RuntimeConfig, *, engine: str | None = None) -> Scoring:
    """The base in its engine. Raises InputError, BackendUnavailable, ModelLoadError, CorruptArtefact."""
    check_engine(base, engine)
    if base.engine == "onnx":
        from edge_align.runtime.onnx import OnnxBackend

        return OnnxBackend.open(base.path, config=config, hash_cache=base.hash_cache)
    from edge_align.runtime.llamacpp import LlamaCppBackend

    return LlamaCppBackend.open(base.path, config=config)


@contextmanager
def open_tokenizer(base: BaseModel, *, n_threads: int = 0) -> Iterator[Tokenize]:
    """Text to token ids, without BOS or control tokens."""
    if base.engine == "onnx":
        from edge_align.runtime.tokenizer import Tokenizer

        tokenizer = Tokenizer(Path(base.path) / TOKENIZER)
        yield lambda text: tokenizer.tokenize(text, special=False)
        return
    from edge_align.runtime.llamacpp import LlamaCppBackend

    with LlamaCppBackend.open(base.path, config=RuntimeConfig(n_ctx=64, n_threads=n_threads)) as backend:
        yield backend.tokenize
