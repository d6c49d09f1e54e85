"""Hidden states out of llama.cpp, for encoding answers and for building a latent pack from any GGUF.

llama.cpp names the output of block l `l_out-<l>` and offers every tensor to a callback that is fixed when a context is
made; so this is a context of its own. Computation stops after the deepest block that is asked for: reading the first
two of thirty blocks costs about a fifteenth of a pass. Nothing is steered here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import closing, ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from edge_align.config import RuntimeConfig
from edge_align.errors import BackendUnavailable, ContextOverflow, InputError, SessionClosed
from edge_align.runtime.llama_checks import check_tokens, context_length
from edge_align.runtime.llama_native import api, NativeContext, NativeModel
from edge_align.runtime.positions import PositionSums

N_BATCH = 512  # tokens of several sequences decoded together
N_BATCH_LAST = 64  # the last block computes only positions whose logits are wanted, and those need room


class ActivationReader:
    """Reads the residual stream after decoder blocks. Use `open`; close it, or use it as a context manager."""

    def __init__(self, model: NativeModel, stack: ExitStack) -> None:
        self._model, self._stack, self._closed = model, stack, False
        self.n_layer, self.d_model = model.n_layer, model.d_model
        self.n_ctx = 0
        self._context: NativeContext
        self._get_name, self._n_bytes, self._get_data = _tensor_functions()
        self._names: dict[bytes, int] = {}  # tensors wanted in this decode -> row of _out
        self._deepest = b""
        self._out: list[np.ndarray] = []
        self._seen: set[bytes] = set()
        self._n_tokens = 0

    @classmethod
    def open(cls, path: str | Path, *, config: RuntimeConfig | None = None) -> ActivationReader:
        """Load a GGUF. Raises ModelLoadError, BackendUnavailable."""
        config = config or RuntimeConfig()
        with ExitStack() as stack:
            model = stack.enter_context(closing(NativeModel(Path(path), n_gpu_layers=config.n_gpu_layers)))
            reader = cls(model, stack)
            reader.n_ctx = context_length(model, config)
            reader._context = NativeContext(
                model,
                n_ctx=max(reader.n_ctx, N_BATCH),
                n_batch=N_BATCH,
                n_threads=config.n_threads,
                n_seq=64,
                n_outputs=N_BATCH_LAST,
                unified=True,
                on_eval=reader._on_eval,
            )
            stack.enter_context(closing(reader._context))
            reader._stack = stack.pop_all()
            return reader

    def close(self) -> None:
        self._closed = True
        self._stack.close()

    def __enter__(self) -> ActivationReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hidden(self, sequence: Sequence[int], layers: Sequence[int]) -> np.ndarray:
        """(len(layers), T, d_model) float32: outputs of `layers` at every token of one sequence."""
        tokens = self._check([sequence], layers)[0]
        return self._long(tokens, layers)

    def mean_hidden(
        self,
        sequences: Sequence[Sequence[int]],
        spans: Sequence[tuple[int, int]],
        layers: Sequence[int],
        *,
        positions: PositionSums | None = None,
    ) -> np.ndarray:
        """(n, len(layers), d_model) float32: the mean over tokens [start, end) of each sequence's hidden states.

        positions: where the states are also added up by their distance from `start`.

        Raises InputError (a span that is empty or outside its sequence, an unknown layer or token), ContextOverflow,
        BackendError, SessionClosed.
        """
        checked = self._check(sequences, layers)
        if len(spans) != len(checked):
            raise InputError(f"{len(checked)} sequences and {len(spans)} spans do not pair up")
        for (start, end), tokens in zip(spans, checked, strict=True):
            if not 0 <= start < end <= len(tokens):
                raise InputError(f"the span {start}:{end} does not lie in a sequence of {len(tokens)} tokens")
        # causal: what comes after a span does not change it
        checked = [tokens[:end] for tokens, (_, end) in zip(checked, spans, strict=True)]
        out = np.empty((len(checked), len(layers), self.d_model), np.float32)
        for group in self._groups(checked, layers):
            if len(group) == 1:
                states = [self._long(checked[group[0]], layers)]
            else:
                states = self._together([checked[i] for i in group], layers)
            for i, state in zip(group, states, strict=True):
                span = state[:, spans[i][0] :]
                out[i] = span.mean(axis=1, dtype=np.float64)
                if positions is not None:
                    for at in range(len(layers)):
                        positions.add(at, 0, span[at])
        return out

    # -- decoding --------------------------------------------------------------------------------------------------
    def _check(self, sequences: Sequence[Sequence[int]], layers: Sequence[int]) -> list[np.ndarray]:
        if self._closed:
            raise SessionClosed("this reader is closed; open it again")
        if not layers or any(not 0 <= layer < self.n_layer for layer in layers):
            raise InputError(f"layers are 0 to {self.n_layer - 1}; asked for {list(layers)}")
        checked = [check_tokens(self._model, sequence, "sequence") for sequence in sequences]
        for tokens in checked:
            if not len(tokens):
                raise InputError("a sequence is empty")
            if len(tokens) > self.n_ctx:
                raise ContextOverflow(f"a sequence is {len(tokens)} tokens long and the context holds {self.n_ctx}")
        return checked

    def _room(self, layers: Sequence[int]) -> int:
        return N_BATCH_LAST if self.n_layer - 1 in layers else N_BATCH

    def _groups(self, sequences: list[np.ndarray], layers: Sequence[int]) -> list[list[int]]:
        """Indices of sequences to decode together, in the order given."""
        groups: list[list[int]] = []
        room = 0
        for i, tokens in enumerate(sequences):
            if len(tokens) > room or len(groups[-1]) == self._context.n_seq:
                groups.append([])
                room = self._room(layers)
            groups[-1].append(i)
            room -= len(tokens)
        return groups

    def _together(self, sequences: list[np.ndarray], layers: Sequence[int]) -> list[np.ndarray]:
        context, at = self._context, 0
        context.clear()
        for seq, tokens in enumerate(sequences):
            end = at + len(tokens)
            context.token[at:end] = tokens
            context.pos[at:end] = np.arange(len(tokens))
            context.seq[at:end] = seq
            at = end
        out = self._decode(at, layers)
        ends = np.cumsum([len(tokens) for tokens in sequences])[:-1]
        return np.split(out, ends, axis=1)

    def _long(self, tokens: np.ndarray, layers: Sequence[int]) -> np.ndarray:
        context, room, parts = self._context, self._room(layers), []
        context.clear()
        for start in range(0, len(tokens), room):
            part = tokens[start : start + room]
            n = len(part)
            context.token[:n] = part
            context.pos[:n] = np.arange(start, start + n)
            context.seq[:n] = 0
            parts.append(self._decode(n, layers))
        return np.concatenate(parts, axis=1)

    def _decode(self, n: int, layers: Sequence[int]) -> np.ndarray:
        """(len(layers), n, d_model) of the first n rows of the batch."""
        distinct = sorted(set(layers))
        self._names = {b"l_out-%d" % layer: i for i, layer in enumerate(distinct)}
        self._deepest = b"l_out-%d" % distinct[-1]
        self._out = [np.empty((n, self.d_model), np.float32) for _ in distinct]
        self._seen, self._n_tokens = set(), n
        self._context.wanted[:n] = self.n_layer - 1 in distinct
        self._context.decode(n)
        missing = [name.decode() for name in self._names if name not in self._seen]
        if missing:
            raise BackendUnavailable(
                f"llama.cpp does not expose {', '.join(missing)} of {self._model.header.architecture} models"
            )
        return np.stack([self._out[distinct.index(layer)] for layer in layers])

    def _on_eval(self, tensor: int, ask: bool, _data: object) -> bool:
        """Called by C for every node: first whether its value is wanted, then with the value. Must not raise.

        False with a value ends the pass there; the next decode builds its own and is not affected.
        """
        name = self._get_name(tensor)
        row = self._names.get(name)
        if ask:
            return row is not None
        if row is None:
            return True
        out = self._out[row]
        if self._n_bytes(tensor) == out.nbytes:  # float32 of every token; anything else stays "missing"
            self._get_data(tensor, out.ctypes.data, 0, out.nbytes)
            self._seen.add(name)
        return bool(name != self._deepest)


def _tensor_functions() -> tuple[Any, Any, Any]:
    """ggml's own accessors (they also read tensors that live on a GPU): name, size in bytes, copy of the data."""
    api()
    try:
        from llama_cpp._ggml import libggml
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendUnavailable("this build of llama-cpp-python does not expose ggml") from error
    functions = []
    for name, arguments, result in (
        ("ggml_get_name", [ctypes.c_void_p], ctypes.c_char_p),
        ("ggml_nbytes", [ctypes.c_void_p], ctypes.c_size_t),
        ("ggml_backend_tensor_get", [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t], None),
    ):
        try:
            function = libggml[name]  # an object of our own: its types are not shared with other users of the library
        except AttributeError as error:
            raise BackendUnavailable(f"this build of llama-cpp-python does not expose {name}") from error
        function.argtypes, function.restype = arguments, result
        functions.append(function)
    return functions[0], functions[1], functions[2]
