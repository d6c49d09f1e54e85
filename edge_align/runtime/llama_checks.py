"""What is checked or counted before llama.cpp is asked: token ids, shapes of vectors, room, parts of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edge_align.config import RuntimeConfig
from edge_align.errors import InputError
from edge_align.records import SteeringVectors
from edge_align.runtime.llama_native import NativeModel
from edge_align.runtime.tokens import token_ids


def check_tokens(model: NativeModel, tokens: Sequence[int], name: str) -> np.ndarray:
    """Token ids as int32, every one in the vocabulary. Raises InputError."""
    return token_ids(tokens, name, n_vocab=model.n_vocab).astype(np.int32)


def check_vectors(model: NativeModel, vectors: SteeringVectors | None) -> SteeringVectors | None:
    """`vectors` themselves, None for zero ones. Raises InputError when their shape is another model's."""
    if vectors is None:
        return None
    if vectors.array.shape != (model.n_layer, model.d_model):
        raise InputError(
            f"the steering vectors have shape {vectors.array.shape}; this base has ({model.n_layer}, {model.d_model})"
        )
    return None if vectors.is_zero else vectors


def context_length(model: NativeModel, config: RuntimeConfig) -> int:
    """The context in effect: never more than the model was trained on."""
    return min(config.n_ctx, model.n_ctx_train or config.n_ctx)


def part_ends(tokens: np.ndarray, is_end: Callable[[int], bool], most: int) -> list[int]:
    """Where the parts end in which a prompt is read: after a turn, else after `most` tokens, and at its end.

    All but the last depend on the tokens before them alone, so that prompts which begin alike have them in common.
    is_end: does this token end a turn?
    """
    found: list[int] = []
    start = 0
    turns = np.flatnonzero(np.isin(tokens, [token for token in set(tokens.tolist()) if is_end(token)])) + 1
    for stop in sorted({*turns.tolist(), len(tokens)}):
        found += [*range(start + most, stop, most), stop]
        start = stop
    return found
