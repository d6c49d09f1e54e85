"""The forward passes of a recipe, on the engine that is fastest for them here: sampling and deep activations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

import numpy as np

from edge_align.bases import BaseModel
from edge_align.config import RuntimeConfig, SamplingConfig
from edge_align.errors import BackendUnavailable
from edge_align.records import SteeringVectors
from edge_align.runtime.activations import ActivationReader
from edge_align.runtime.llamacpp import LlamaCppBackend
from edge_align.runtime.positions import PositionSums

BATCH = 128  # rows sampled together in PyTorch on a CPU

Vectors = Sequence[SteeringVectors | None]


class Passes(Protocol):
    """reason: which engine, and why. prompts_at_once: whose answers are sampled, and kept, together."""

    @property
    def reason(self) -> str: ...

    @property
    def prompts_at_once(self) -> int: ...

    def sample(
        self, prompts: Sequence[Sequence[int]], *, sampling: SamplingConfig, vectors: Vectors | None = None
    ) -> list[list[int]]:
        """One answer per prompt (token ids, end of text excluded); vectors: what steers each row."""
        ...

    def sample_and_read(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: SamplingConfig,
        layers: Sequence[int],
        positions: PositionSums | None = None,
    ) -> tuple[list[list[int]], np.ndarray]:
        """Unsteered answers as `sample` draws them, and (n, len(layers), d_model) as `mean_hidden` reads them."""
        ...

    def mean_hidden(
        self,
        sequences: Sequence[Sequence[int]],
        spans: Sequence[tuple[int, int]],
        layers: Sequence[int],
        *,
        positions: PositionSums | None = None,
    ) -> np.ndarray:
        """(n, len(layers), d_model) float32: mean output of each block over the span [first, last) of each row.

        positions: where the same states are also added up by their place in the span.
        """
        ...

    def close(self) -> None: ...


class TorchPasses:
    """PyTorch, a batch of rows at a time, each with vectors of its own; bfloat16 where the processor multiplies it.

    ends: tokens that end an answer. Raises BackendUnavailable for an architecture it does not compute.
    """

    def __init__(self, base: BaseModel, ends: Sequence[int]) -> None:
        import torch

        from edge_align.runtime.torch_ref import fastest, LlamaReference

        device, dtype = fastest()
        cuda = device == "cuda"
        where = f" on {torch.cuda.get_device_name()}" if cuda else ""
        self.reason = (
            f"PyTorch in {str(dtype).removeprefix('torch.')}{where}: it decodes many rows at once faster than llama.cpp"
        )
        self.prompts_at_once, self._batch = (128, 8 * BATCH) if cuda else (16, BATCH)
        self.model, self.ends = LlamaReference(base.path, dtype=dtype, device=device), [*ends]

    def sample(
        self, prompts: Sequence[Sequence[int]], *, sampling: SamplingConfig, vectors: Vectors | None = None
    ) -> list[list[int]]:
        """As `Passes.sample`."""
        from edge_align.runtime.torch_sample import sample

        steering = None
        if vectors is not None and any(v is not None for v in vectors):
            shape = (self.model.shape.n_layer, self.model.shape.d_model)
            steering = np.stack([np.zeros(shape, np.float32) if v is None else v.array for v in vectors])
        made = sample(self.model, prompts, sampling=sampling, eos=self.ends, vectors=steering, batch=self._batch)
        return [[token for token in tokens if token not in self.ends] for tokens in made]

    def sample_and_read(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: SamplingConfig,
        layers: Sequence[int],
        positions: PositionSums | None = None,
    ) -> tuple[list[list[int]], np.ndarray]:
        """As `Passes.sample_and_read`: the activations come from the pass that samples."""
        from edge_align.runtime.torch_sample import sample_and_read

        made, means = sample_and_read(
            self.model,
            prompts,
            layers=layers,
            sampling=sampling,
            eos=self.ends,
            batch=self._batch,
            positions=positions,
        )
        return [[token for token in tokens if token not in self.ends] for tokens in made], means

    def mean_hidden(
        self,
        sequences: Sequence[Sequence[int]],
        spans: Sequence[tuple[int, int]],
        layers: Sequence[int],
        *,
        positions: PositionSums | None = None,
    ) -> np.ndarray:
        """As `Passes.mean_hidden`."""
        return self.model.mean_hidden(sequences, spans, layers, positions=positions)

    def close(self) -> None: ...


class NativePasses:
    """llama.cpp: any architecture."""

    reason = "llama.cpp: PyTorch does not compute this architecture here"
    prompts_at_once = 16

    def __init__(self, base: BaseModel, backend: LlamaCppBackend, *, runtime: RuntimeConfig) -> None:
        self._base, self._backend, self._runtime = base, backend, runtime
        self._reader: ActivationReader | None = None

    def sample(
        self, prompts: Sequence[Sequence[int]], *, sampling: SamplingConfig, vectors: Vectors | None = None
    ) -> list[list[int]]:
        """As `Passes.sample`; rows with the same vectors (the same object) are decoded together."""
        made: list[list[int]] = []
        each = list(zip(prompts, vectors or [None] * len(prompts), strict=True))
        for _, group in groupby(each, key=lambda row: id(row[1])):
            rows = list(group)
            answers = self._backend.generate_batch([row[0] for row in rows], vectors=rows[0][1], sampling=sampling)
            made += [list(answer.tokens) for answer in answers]
        return made

    def sample_and_read(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: SamplingConfig,
        layers: Sequence[int],
        positions: PositionSums | None = None,
    ) -> tuple[list[list[int]], np.ndarray]:
        """As `Passes.sample_and_read`, in two passes."""
        made = self.sample(prompts, sampling=sampling)
        texts = [[*prompt, *(answer or [0])] for prompt, answer in zip(prompts, made, strict=True)]
        spans = [(len(prompt), len(text)) for prompt, text in zip(prompts, texts, strict=True)]
        return made, self.mean_hidden(texts, spans, layers, positions=positions)

    def mean_hidden(
        self,
        sequences: Sequence[Sequence[int]],
        spans: Sequence[tuple[int, int]],
        layers: Sequence[int],
        *,
        positions: PositionSums | None = None,
    ) -> np.ndarray:
        """As `Passes.mean_hidden`."""
        if self._reader is None:
            self._reader = ActivationReader.open(self._base.path, config=self._runtime)
        return self._reader.mean_hidden(sequences, spans, layers, positions=positions)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()


def end_tokens(backend: LlamaCppBackend) -> tuple[int, ...]:
    """Tokens that end an answer, first the usual one. Raises BackendUnavailable where the base does not say."""
    if not backend.ends:
        raise BackendUnavailable("the base does not say which token ends a text")
    return backend.ends


def open_passes(base: BaseModel, backend: LlamaCppBackend, *, runtime: RuntimeConfig) -> Passes:
    """PyTorch where it computes the architecture, else llama.cpp."""
    try:
        return TorchPasses(base, end_tokens(backend))
    except BackendUnavailable:
        return NativePasses(base, backend, runtime=runtime)
