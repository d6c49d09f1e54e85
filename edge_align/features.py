"""What the encoder side of a pack reads: pooled hidden states of an answer, and pooled embeddings of a prompt.

An answer passes alone, without its prompt, through the base's first two blocks: measured as good as with the prompt
in front, and cheaper (docs/decisions/0004). A prompt is described by its token embeddings alone, so that a
prompt-dependent profile needs neither torch nor a forward pass when it is applied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edge_align.bases import BaseModel
from edge_align.config import RuntimeConfig
from edge_align.errors import BackendUnavailable
from edge_align.gguf_tensors import GGUFTensors
from edge_align.onnx_files import ENCODER

N_BLOCKS = 2
MAX_TOKENS = 512  # of an answer; the rest says little more about its style
TOKENS_PER_BATCH = 4096  # whose activations stay in the processor's cache
LENGTH_WEIGHT = 5.0  # brings log2(length) to the spread of the other features' leading directions

Hidden = Callable[[Sequence[Sequence[int]]], list[tuple[np.ndarray, ...]]]


def n_feature(d_model: int) -> int:
    """Length of an answer's feature vector."""
    return (N_BLOCKS + 1) * d_model + 1


def pool(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Hidden states of one answer, one (T, d_model) array per block, -> features (n_feature,) float32.

    The mean over tokens after each block, the root mean square after the last one, and the log length.
    """
    mean = [states.mean(0) for states in blocks]
    spread = np.sqrt((blocks[-1].astype(np.float64) ** 2).mean(0))
    length = LENGTH_WEIGHT * math.log(len(blocks[0]))
    return np.concatenate([*mean, spread, [length]]).astype(np.float32)


class Rows(Protocol):
    """Where rows of a weight can be read: `gguf_tensors.GGUFTensors`, or an export's encoder graph."""

    def rows(self, name: str, indices: np.ndarray) -> np.ndarray: ...


def prompt_features(tensors: Rows, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """(n, d_model) float32: the mean token embedding of each prompt (token ids of its last turn's text)."""
    used = np.unique(np.concatenate([np.asarray(p, dtype=np.int64) for p in prompts]))
    table = tensors.rows("token_embd.weight", used)
    return np.stack([table[np.searchsorted(used, p)].mean(0) for p in prompts]).astype(np.float32)


class AnswerEncoder:
    """Answer token ids -> features, through the first two blocks in PyTorch.

    bfloat16 where the processor has matrix instructions for it (`reason` says what was chosen), else float32.
    Raises BackendUnavailable for an architecture the PyTorch module does not compute (then see `native_encoder`).
    """

    def __init__(self, path: Path, *, bf16: bool | None = None) -> None:
        import torch

        from edge_align.runtime.torch_ref import LlamaReference

        fast = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        self.reason = "bfloat16" if fast else "float32: this processor has no bfloat16 instructions"
        if bf16 is not None:
            fast, self.reason = bf16, ("bfloat16" if bf16 else "float32") + ": asked for"
        self._model = LlamaReference(path, n_layer=N_BLOCKS, dtype=torch.bfloat16 if fast else torch.float32)

    def encode(self, answers: Sequence[Sequence[int]], *, on_done: Callable[[int], None] | None = None) -> np.ndarray:
        """(n, n_feature) float32, in the order given. Each answer has at least one token."""
        import torch

        from edge_align.runtime.torch_rows import batches

        out = np.empty((len(answers), n_feature(self._model.shape.d_model)), np.float32)
        cut = [list(answer[:MAX_TOKENS]) for answer in answers]
        order = sorted(range(len(cut)), key=lambda i: len(cut[i]))
        done = 0
        with torch.inference_mode():
            for rows in batches(order, [len(answer) for answer in cut], TOKENS_PER_BATCH):
                out[rows] = self._batch([cut[i] for i in rows])
                done += len(rows)
                if on_done is not None:
                    on_done(done)
        return out

    def _batch(self, answers: list[list[int]]) -> np.ndarray:
        import torch

        lengths = torch.tensor([len(answer) for answer in answers])
        tokens = torch.zeros(len(answers), int(lengths.max()), dtype=torch.long)
        for row, answer in zip(tokens, answers, strict=True):
            row[: len(answer)] = torch.tensor(answer)
        real = (torch.arange(tokens.shape[1])[None] < lengths[:, None])[..., None].to(self._model.dtype)
        _, blocks = self._model.hidden(tokens, layers=range(N_BLOCKS))
        masked = [states * real for states in blocks]
        count = lengths[:, None].float()
        mean = [states.sum(1, dtype=torch.float32) / count for states in masked]
        spread = torch.linalg.vector_norm(masked[-1], dim=1, dtype=torch.float32) / count.sqrt()
        length = LENGTH_WEIGHT * lengths.float().log()[:, None]
        return torch.cat([*mean, spread, length], dim=1).numpy()


class NativeAnswerEncoder:
    """The same features through llama.cpp, for architectures PyTorch does not compute here; slower."""

    reason = "llama.cpp: PyTorch does not compute this architecture here"

    def __init__(self, path: Path) -> None:
        from edge_align.runtime.activations import ActivationReader

        self._reader = ActivationReader.open(path)

    def encode(self, answers: Sequence[Sequence[int]], *, on_done: Callable[[int], None] | None = None) -> np.ndarray:
        """As `AnswerEncoder.encode`."""
        rows = []
        for i, answer in enumerate(answers):
            rows.append(pool(list(self._reader.hidden(answer[:MAX_TOKENS], range(N_BLOCKS)))))
            if on_done is not None:
                on_done(i + 1)
        return np.stack(rows)

    def close(self) -> None:
        self._reader.close()


def open_encoder(path: Path) -> AnswerEncoder | NativeAnswerEncoder:
    """PyTorch where it computes this architecture, else llama.cpp."""
    try:
        return AnswerEncoder(path)
    except BackendUnavailable:
        return NativeAnswerEncoder(path)


class OnnxAnswerEncoder:
    """The same features from an export's own encoder graph: its first two blocks, from the same weights.

    One answer at a time: batches were measured, and are slower (docs/log.md).
    """

    reason = "ONNX Runtime: the export's first two blocks"

    def __init__(self, folder: Path, *, n_threads: int = 0) -> None:
        from edge_align.runtime.onnx_session import open_session

        self._session: Any = open_session(folder / ENCODER, RuntimeConfig(n_threads=n_threads))[0]

    def encode(self, answers: Sequence[Sequence[int]], *, on_done: Callable[[int], None] | None = None) -> np.ndarray:
        """As `AnswerEncoder.encode`."""
        rows = []
        for i, answer in enumerate(answers):
            rows.append(pool(self._run(answer[:MAX_TOKENS], [f"hidden.{il}" for il in range(N_BLOCKS)])))
            if on_done is not None:
                on_done(i + 1)
        return np.stack(rows)

    def rows(self, name: str, indices: np.ndarray) -> np.ndarray:  # noqa: ARG002  (an encoder has one table)
        """Token embeddings: (len(indices), d_model) float32."""
        parts = [indices[start : start + MAX_TOKENS] for start in range(0, len(indices), MAX_TOKENS)]
        return np.concatenate([self._run(part, ["embedding"])[0] for part in parts])

    def _run(self, tokens: Sequence[int] | np.ndarray, outputs: list[str]) -> list[np.ndarray]:
        """Outputs (T, d_model) for one sequence."""
        n = len(tokens)
        given = {
            "tokens": np.asarray(tokens, np.int64)[None],
            "last": np.array([n - 1], np.int32),
            "total": np.array(n, np.int32),
        }
        return [array[0] for array in self._session.run(outputs, given)]


def open_base_encoder(
    base: BaseModel, *, n_threads: int = 0
) -> AnswerEncoder | NativeAnswerEncoder | OnnxAnswerEncoder:
    """The answer encoder that reads this base's files."""
    return open_encoder(base.path) if base.export is None else OnnxAnswerEncoder(base.path, n_threads=n_threads)


def embedding_table(base: BaseModel) -> Rows:
    """Where this base's token embeddings can be read."""
    return GGUFTensors(base.path) if base.export is None else OnnxAnswerEncoder(base.path, n_threads=1)
