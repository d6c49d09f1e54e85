"""What the ONNX Runtime engine checks before it decodes: tokens, room, and steering vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_align.errors import ContextOverflow, InputError
from edge_align.records import SteeringVectors
from edge_align.runtime.base import BackendInfo
from edge_align.runtime.tokens import token_ids

BatchVectors = SteeringVectors | Sequence[SteeringVectors | None] | None


def check_tokens(info: BackendInfo, tokens: Sequence[int], name: str) -> np.ndarray:
    """(n,) int64. Raises InputError unless they are ids of the vocabulary."""
    return token_ids(tokens, name, n_vocab=info.n_vocab).astype(np.int64)


def check_prompt(info: BackendInfo, prompt: Sequence[int]) -> np.ndarray:
    """(n,) int64, n > 0. Raises InputError, ContextOverflow."""
    tokens = check_tokens(info, prompt, "prompt")
    if not len(tokens):
        raise InputError("the prompt is empty")
    check_fits(info, len(tokens), "prompt")
    return tokens


def check_fits(info: BackendInfo, n: int, what: str) -> None:
    """Raise ContextOverflow where `n` tokens are more than the context holds."""
    if n > info.n_ctx:
        raise ContextOverflow(
            f"the {what} is {n} tokens long and the context holds {info.n_ctx}; shorten it or raise --n-ctx"
        )


def check_vectors(info: BackendInfo, vectors: SteeringVectors | None) -> np.ndarray | None:
    """(1, n_layer, d_model), or None for the base. Raises InputError when their shape is another model's."""
    if vectors is None:
        return None
    expected = (info.n_layer, info.d_model)
    if vectors.array.shape != expected:
        raise InputError(f"the steering vectors have shape {vectors.array.shape}; this base has {expected}")
    return None if vectors.is_zero else vectors.array[None]


def steering_rows(info: BackendInfo, vectors: BatchVectors, n: int) -> list[np.ndarray | None]:
    """`check_vectors` of each of `n` rows. Raises InputError, also where there are not n."""
    if vectors is None or isinstance(vectors, SteeringVectors):
        return [check_vectors(info, vectors)] * n
    if len(vectors) != n:
        raise InputError(f"{n} prompts and {len(vectors)} steering vectors do not pair up")
    return [check_vectors(info, each) for each in vectors]
