"""Rows of one ONNX decoder that are decoded together, a token each, whoever uses them.

A row asks for its next token. Who needs logits that are not there yet has everything computed that was asked for until
then, in one batch: so users that ask, let the others ask, and then look, share every step.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from edge_align.runtime.onnx_session import OnnxDecoder

LAST = np.zeros(1, np.int64)  # of one token, the logits after it


def same_in_any_batch(decoder: OnnxDecoder) -> bool:
    """Has every row, in a batch of any size, the bits that it has alone? Tried with one token; rows must hold nothing.

    It depends on the processor: the four-bit products of ONNX Runtime add in another order for several rows where there
    is AVX2 and no AVX-512.
    """
    tokens, held = np.arange(1, decoder.rows + 1)[:, None], np.zeros(decoder.rows, np.int64)
    alone = [
        decoder.run(tokens[i : i + 1], held[:1], steering=None, wanted=LAST, row=i).copy() for i in range(decoder.rows)
    ]
    for n in range(2, decoder.rows + 1):
        found = decoder.run(tokens[:n], held[:n], steering=None, wanted=LAST, row=0)
        if not np.array_equal(found, np.concatenate(alone[:n])):
            return False
    return True


class OnnxRows:
    """The rows of a decoder, each taken by one user. together: what was asked for is computed in one batch."""

    def __init__(self, decoder: OnnxDecoder, *, together: bool = True) -> None:
        self.decoder = decoder
        self.together = together
        self.held = np.zeros(decoder.rows, np.int64)  # tokens in each row; what lies behind them may be overwritten
        self._free = list(range(decoder.rows))[::-1]
        self._asked: dict[int, tuple[int, np.ndarray | None]] = {}
        self._logits: dict[int, np.ndarray] = {}
        self._stacked: tuple[list[np.ndarray | None], np.ndarray | None] = [], None

    def take(self) -> OnnxRow | None:
        """A row of one's own; None when all are taken."""
        return OnnxRow(self, self._free.pop()) if self._free else None

    def release(self, index: int) -> None:
        self.withdraw(index)
        self.held[index] = 0
        self._free.append(index)

    def ask(self, index: int, token: int, steering: np.ndarray | None) -> None:
        self._logits.pop(index, None)
        self._asked[index] = token, steering

    def withdraw(self, index: int) -> None:
        self._asked.pop(index, None)
        self._logits.pop(index, None)

    def logits(self, index: int) -> np.ndarray:
        if index not in self._logits:
            self._compute(self._asked if self.together else [index])
        return self._logits.pop(index)

    def _compute(self, wanted: Collection[int]) -> None:
        """One token for these rows, which asked. Rows between them are computed too, to no effect on what they hold."""
        first, end = min(wanted), max(wanted) + 1
        tokens = np.zeros((end - first, 1), np.int64)
        for index in wanted:
            tokens[index - first] = self._asked[index][0]
        held = np.minimum(self.held[first:end], self.decoder.room - 1)
        steering = self._stack([self._asked[i][1] if i in wanted else None for i in range(first, end)])
        logits = self.decoder.run(tokens, held, steering=steering, wanted=LAST, row=first)[:, 0]
        for index in [*wanted]:
            self.held[index] += 1
            self._logits[index] = logits[index - first].copy()
            del self._asked[index]

    def _stack(self, each: list[np.ndarray | None]) -> np.ndarray | None:
        """(1 or n, n_layer, d_model) of n times (1, n_layer, d_model) or None; the same object for the same ones."""
        known, stacked = self._stacked
        if len(known) != len(each) or any(a is not b for a, b in zip(known, each, strict=True)):
            given = next((one for one in each if one is not None), None)
            if given is None or all(one is given for one in each):
                stacked = given
            else:
                stacked = np.concatenate([np.zeros_like(given) if one is None else one for one in each])
            self._stacked = each, stacked
        return stacked


class OnnxRow:
    """One row of `OnnxRows`. Arrays of steering are (1, n_layer, d_model), never written to; None is the base."""

    def __init__(self, rows: OnnxRows, index: int) -> None:
        self.rows, self._index = rows, index

    @property
    def shared(self) -> bool:
        """Are there other rows, whose users could ask before anything is computed?"""
        return self.rows.together and self.rows.decoder.rows > 1

    def fill(self, tokens: np.ndarray, start: int) -> None:
        """Read tokens (n,) unsteered as those from position `start` on. Raises BackendError."""
        self.rows.decoder.run(tokens[None], np.array([start]), steering=None, wanted=LAST, row=self._index)
        self.rows.held[self._index] = start + len(tokens)

    def ask(self, token: int, held: int, steering: np.ndarray | None) -> None:
        """Want the logits after `token`, decoded at position `held`."""
        self.rows.held[self._index] = held
        self.rows.ask(self._index, token, steering)

    def logits(self) -> np.ndarray:
        """(n_vocab,) float32, as asked for. Raises BackendError."""
        return self.rows.logits(self._index)

    def score(self, tokens: np.ndarray, start: int, steering: np.ndarray | None) -> np.ndarray:
        """(n, n_vocab) float32 after each of tokens (n,), valid until the next call. Raises BackendError."""
        n = len(tokens)
        self.rows.held[self._index] = start + n
        logits: np.ndarray = self.rows.decoder.run(
            tokens[None], np.array([start]), steering=steering, wanted=np.arange(n), row=self._index
        )[0]
        return logits

    def save(self, n: int) -> bytes:
        """Keys and values of the first `n` tokens."""
        return self.rows.decoder.save(self._index, n)

    def load(self, data: bytes, n: int) -> bool:
        """Put what `save` gave for `n` tokens here; False where it is of another size."""
        self.rows.held[self._index] = n
        return self.rows.decoder.load(self._index, data, n)

    def withdraw(self) -> None:
        """Forget what was asked for."""
        self.rows.withdraw(self._index)

    def release(self) -> None:
        """Give the row back; do not use it any more."""
        self.rows.release(self._index)
