"""The engines that `export verify` compares, behind one question: which logits predict tokens under these vectors?

An engine is a line in ENGINES: what it takes, and how to open it. PyTorch in float32 is the one others are held to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_align.config import RuntimeConfig
from edge_align.errors import BackendUnavailable, CorruptArtefact
from edge_align.files import shown
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
    """`LlamaReference` with the file's own weights, dequantised."""
    from edge_align.runtime.torch_ref import LlamaReference

    model = LlamaReference(path)

    def score(prompt: Sequence[int], completion: Sequence[int], vectors: SteeringVectors | None) -> np.ndarray:
        return model.score(prompt, completion, None if vectors is None else vectors.array)

    yield score


@contextmanager
def open_transformers(path: Path, _runtime: RuntimeConfig) -> Iterator[Score]:
    """A Hugging Face folder of any architecture that transformers loads, in float32; steered by hooks on its blocks."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise BackendUnavailable('a folder needs transformers; run: pip install "edge-align[export]"') from error
    import torch

    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
    except Exception as error:  # whatever it raises on a stranger's folder, the folder is the reason
        raise CorruptArtefact(f"{shown(path)}: {' '.join(str(error).split())[:160]}") from error
    added: dict[int, torch.Tensor] = {}
    first = 0

    def hook(layer: int) -> Callable[[Any, Any, Any], Any]:
        def steer(_module: Any, _inputs: Any, output: Any) -> Any:
            if layer not in added:
                return output
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden.clone()
            hidden[:, first:] += added[layer]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return steer

    for layer, block in enumerate(_blocks(model)):
        block.register_forward_hook(hook(layer))

    @torch.inference_mode()
    def score(prompt: Sequence[int], completion: Sequence[int], vectors: SteeringVectors | None) -> np.ndarray:
        nonlocal first
        first = len(prompt) - 1
        added.clear()
        if vectors is not None:
            added.update({layer: torch.from_numpy(row.copy()) for layer, row in enumerate(vectors.array) if row.any()})
        logits = model(torch.tensor([[*prompt, *completion[:-1]]]), use_cache=False).logits
        return np.asarray(logits[0, first:].float().numpy())

    yield score


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


REFERENCES = (Engine("PyTorch", is_gguf, open_torch), Engine("PyTorch", is_hf_folder, open_transformers))
"""What a reference may be opened with, in float32."""

ENGINES = (
    *REFERENCES,
    Engine("llama.cpp", is_gguf, open_llamacpp),
    Engine("ONNX Runtime", is_export, open_onnx),
)
"""Every engine that is compared."""


def _blocks(model: Any) -> Any:
    """The list of decoder blocks of a causal model of transformers: the longest list of modules of one class in it."""
    import torch

    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    found = max(lists, key=len, default=None)
    if found is None or len(found) != model.config.get_text_config().num_hidden_layers:
        raise BackendUnavailable(
            f"the blocks of {type(model).__name__} are not where they are looked for; no reference"
        )
    return found
