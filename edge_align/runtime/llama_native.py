"""llama.cpp's native handles, each with one owner. Nothing above this module touches a pointer.

Written against the low-level API of llama-cpp-python 0.3.36 (`llama_cpp.llama_cpp`).
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from edge_align.errors import BackendError, BackendUnavailable, InputError, ModelLoadError
from edge_align.gguf_header import read_header
from edge_align.records import SteeringVectors
from edge_align.runtime.llama_build import amx_is_sound
from edge_align.runtime.template import CHATML_START, ends_line, fallback, PLAIN

TEXT_LIMIT = 16 * 2**20  # bytes of one text to tokenise
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1 << 0, 1 << 3, 1 << 4, 1 << 5  # flags of a token (llama_token_attr)

_errors: deque[str] = deque(maxlen=8)  # llama.cpp's last error lines
_offloads: deque[str] = deque(maxlen=1)  # the line in which it says how many layers went to a GPU
_keep: list[Any] = []  # callbacks that C holds for the life of the process


@functools.cache
def api() -> Any:
    """The bindings, ready for use, their log silenced. Raises BackendUnavailable when they do not load."""
    try:
        from llama_cpp import llama_cpp as C
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendUnavailable(
            f"llama-cpp-python does not load ({' '.join(str(error).split())[:160]}); "
            "reinstall it with: pip install --force-reinstall --no-cache-dir llama-cpp-python"
        ) from error

    def log(level: int, text: bytes, _data: object) -> None:
        if b" layers to GPU" in text:
            _offloads.append(text.decode("utf-8", "replace"))
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            _errors.append(" ".join(text.decode("utf-8", "replace").split()))

    callback = C.llama_log_callback(log)
    C.llama_log_set(callback, None)
    _keep.append(callback)
    C.llama_backend_init()
    return C


def has_amx() -> bool:
    """Do this processor, and this build of llama.cpp, have Intel's matrix units (AMX)?"""
    return b"AMX_INT8 = 1" in api().llama_print_system_info()


@functools.cache
def amx() -> bool:
    """Are they used? Not where this build crashes on them."""
    return has_amx() and amx_is_sound(Path(api().__file__).parent / "lib")


def model_params() -> Any:
    """llama.cpp's defaults. AMX takes part through weights laid out anew at loading, which are not mapped as well."""
    C = api()
    params = C.llama_model_default_params()
    params.use_extra_bufts = amx() or not has_amx()
    if amx():
        params.load_mode = C.LLAMA_LOAD_MODE_NONE
    return params


def n_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class NativeModel:
    """A loaded model and its vocabulary.

    Raises ModelLoadError (in one line) and, for a GPU request that this build cannot meet, BackendUnavailable.
    """

    def __init__(self, path: Path, *, n_gpu_layers: int = 0, vocab_only: bool = False) -> None:
        self.path, self.header = path, read_header(path)
        C = self.C = api()
        if n_gpu_layers and not C.llama_supports_gpu_offload():
            raise BackendUnavailable(
                "this build of llama-cpp-python has no GPU support; leave out --n-gpu-layers, or reinstall it with "
                'CMAKE_ARGS="-DGGML_CUDA=on" (or -DGGML_METAL=on, -DGGML_VULKAN=on)'
            )
        params = model_params()
        params.n_gpu_layers, params.vocab_only = n_gpu_layers, vocab_only
        _errors.clear()
        _offloads.clear()
        self._model = C.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise ModelLoadError(f"llama.cpp cannot load {path}: {_errors[0] if _errors else 'it does not say why'}")
        self.gpu = n_gpu_layers != 0
        self.offloaded = parse_offload("".join(_offloads))
        self.vocab = C.llama_model_get_vocab(self._model)
        self.n_layer = int(C.llama_model_n_layer(self._model))
        self.d_model = int(C.llama_model_n_embd(self._model))
        self.n_vocab = int(C.llama_vocab_n_tokens(self.vocab))
        self.n_ctx_train = int(C.llama_model_n_ctx_train(self._model))
        self._piece_buffer = ctypes.create_string_buffer(256)
        self._pieces: dict[int, bytes] = {}

    @property
    def pointer(self) -> Any:
        return self._model

    def close(self) -> None:
        model, self._model = self._model, None
        if model:
            self.C.llama_model_free(model)

    # -- vocabulary ------------------------------------------------------------------------------------------------
    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids, no BOS or EOS added. Raises InputError for lone surrogates and texts over TEXT_LIMIT."""
        try:
            data = text.encode()
        except UnicodeEncodeError:
            raise InputError("the text holds a lone surrogate") from None
        if len(data) > TEXT_LIMIT:
            raise InputError(f"the text is {len(data)} bytes long; at most {TEXT_LIMIT} can be tokenised")
        room = len(data) + 8
        for _ in range(2):
            out = (ctypes.c_int32 * room)()
            n = self.C.llama_tokenize(self.vocab, data, len(data), out, room, False, special)
            if n >= 0:
                return out[:n]
            room = -n
        raise BackendError("llama.cpp could not tokenise the text")

    def piece(self, token: int) -> bytes:
        """Bytes of one token; a control token has none."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self.text_of(token, special=False)
        return known

    def text_of(self, token: int, *, special: bool = True) -> bytes:
        """Bytes of one token, control tokens spelt out when `special`."""
        n = self.C.llama_token_to_piece(self.vocab, token, self._piece_buffer, len(self._piece_buffer), 0, special)
        if n < 0:
            self._piece_buffer = ctypes.create_string_buffer(-n)
            return self.text_of(token, special=special)
        return self._piece_buffer.raw[:n]

    def raw(self, token: int) -> tuple[str, float, int]:
        """A token as the vocabulary spells it, its score, and its flags (UNKNOWN, CONTROL, USER_DEFINED, BYTE)."""
        C, vocab = self.C, self.vocab
        text = C.llama_vocab_get_text(vocab, token).decode("utf-8", "replace")
        return text, float(C.llama_vocab_get_score(vocab, token)), int(C.llama_vocab_get_attr(vocab, token))

    def is_end(self, token: int) -> bool:
        """Does the token end an answer?"""
        return self.is_turn_end(token) or (self.chat_template == PLAIN and ends_line(self.piece(token)))

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """All tokens that end an answer, first the usual one."""
        usual = self.tokenize("\n", special=False)[-1] if self.chat_template == PLAIN else self.eos
        return tuple(sorted(filter(self.is_end, range(self.n_vocab)), key=lambda token: token != usual))

    def is_turn_end(self, token: int) -> bool:
        """Is it a control token that ends a turn or a text?"""
        return bool(self.C.llama_vocab_is_eog(self.vocab, token))

    @property
    def bos(self) -> int | None:
        token = int(self.C.llama_vocab_bos(self.vocab))
        return token if token >= 0 else None

    @property
    def eos(self) -> int | None:
        token = int(self.C.llama_vocab_eos(self.vocab))
        return token if token >= 0 else None

    @property
    def adds_bos(self) -> bool:
        return bool(self.C.llama_vocab_get_add_bos(self.vocab))

    @functools.cached_property
    def chat_template(self) -> str:
        """The model's own, or what stands in for it."""
        text = self.C.llama_model_chat_template(self._model, None)
        if text:
            return str(text.decode("utf-8", "replace"))
        return fallback(len(self.tokenize(CHATML_START, special=True)) == 1)

    @functools.cached_property
    def control_pattern(self) -> re.Pattern[str] | None:
        """Matches every text that `tokenize(special=True)` reads as a control token and `special=False` does not."""
        attr = self.C.llama_vocab_get_attr
        tokens = [token for token in range(self.n_vocab) if attr(self.vocab, token) & (UNKNOWN | CONTROL)]
        texts = {self.text_of(token).decode("utf-8", "replace") for token in tokens} - {""}
        if not texts:
            return None
        return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))


def parse_offload(line: str) -> tuple[int, int]:
    """(layers on a GPU, layers in all, the output layer counted) out of llama.cpp's own words; (0, 0) without any."""
    match = re.search(r"offloaded (\d+)/(\d+) layers to GPU", line)
    return (int(match[1]), int(match[2])) if match else (0, 0)


class NativeContext:
    """A context (KV cache, compute buffers, control vector) and the one batch that is used with it.

    n_ctx: tokens per sequence. Sequences have streams of their own (`unified=False`): on CPU, 32 rows decode 2.5 x
    as fast as with one shared buffer, where every row's attention walks over all rows' cells.
    """

    def __init__(
        self,
        model: NativeModel,
        *,
        n_ctx: int,
        n_batch: int,
        n_threads: int = 0,
        n_seq: int = 1,
        n_outputs: int = 1,
        unified: bool = False,
        on_eval: Any = None,
    ) -> None:
        C = self.C = model.C
        self.model, self.n_ctx, self.n_seq, self.n_batch, self.n_outputs = model, n_ctx, n_seq, n_batch, n_outputs
        params = C.llama_context_default_params()
        params.n_ctx = n_ctx if unified else n_ctx * n_seq
        params.n_batch = params.n_ubatch = n_batch
        params.n_seq_max = n_seq
        params.n_outputs_max = params.n_outputs_max_per_seq = n_outputs  # else logits of n_batch rows are reserved
        params.n_threads = params.n_threads_batch = n_threads or n_cores()
        params.flash_attn_type = C.LLAMA_FLASH_ATTN_TYPE_AUTO
        params.kv_unified = unified
        params.offload_kqv = params.op_offload = model.gpu
        if on_eval is not None:
            params.cb_eval = self._on_eval = C.ggml_backend_sched_eval_callback(on_eval)
        _errors.clear()
        self._context = C.llama_init_from_model(model.pointer, params)
        if not self._context:
            cause = " ".join(list(_errors)[-1:]) or "out of memory?"
            raise ModelLoadError(f"llama.cpp cannot open a context of {params.n_ctx} tokens on {model.path}: {cause}")
        # llama.cpp sets up AMX once a thread, and PyTorch, which uses it too, leaves it otherwise: then the next decode
        # ends the process (illegal instruction). So nobody else computes on the thread that decodes.
        self._thread = ThreadPoolExecutor(1, "edge-align-amx") if amx() else None
        self.memory = C.llama_get_memory(self._context)
        self._vectors: SteeringVectors | None = None
        self._make_batch(n_batch)

    def _make_batch(self, size: int) -> None:
        """One batch for the life of the context: C reads arrays that numpy owns."""
        self.token, self.pos, self.seq = (np.zeros(size, np.int32) for _ in range(3))
        self.wanted = np.zeros(size, np.int8)
        self._ones = np.ones(size, np.int32)
        pointer = ctypes.POINTER(ctypes.c_int32)
        base = self.seq.ctypes.data
        self._seq_pointers = (pointer * size)(*(ctypes.cast(base + 4 * i, pointer) for i in range(size)))
        batch = self.batch = self.C.llama_batch()
        for name, array in (("token", self.token), ("pos", self.pos), ("n_seq_id", self._ones)):
            setattr(batch, name, array.ctypes.data_as(pointer))
        batch.logits = self.wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        batch.seq_id = ctypes.cast(self._seq_pointers, type(batch.seq_id))

    @property
    def pointer(self) -> Any:
        return self._context

    def close(self) -> None:
        context, self._context = self._context, None
        if self._thread is not None:
            self._thread.shutdown()
        if context:
            self.C.llama_synchronize(context)
            self.C.llama_free(context)

    # -- steering --------------------------------------------------------------------------------------------------
    def set_vectors(self, vectors: SteeringVectors | None) -> None:
        """Steer what is decoded from now on; None or zero: the base. Costs nothing when nothing changes."""
        if vectors is self._vectors:
            return
        if vectors is not None and vectors.is_zero:
            vectors = None
        now = self._vectors
        if (vectors is None) == (now is None) and (vectors is None or np.array_equal(vectors.array, now.array)):  # type: ignore[union-attr]
            self._vectors = vectors
            return
        n_layer, d_model = self.model.n_layer, self.model.d_model
        self.C.llama_synchronize(self._context)  # a GPU may still compute with the vectors, or without room for any
        if vectors is None:
            code = self.C.llama_set_adapter_cvec(self._context, None, 0, d_model, 0, 0)
        else:
            # the buffer begins at layer 1 and must be whole: layers past its end keep the values set before
            data = vectors.array[1:].ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            size = (n_layer - 1) * d_model
            code = self.C.llama_set_adapter_cvec(self._context, data, size, d_model, 1, n_layer - 1)
        if code:
            raise BackendError(f"llama.cpp refused the steering vectors (code {code})")
        self._vectors = vectors

    # -- decoding --------------------------------------------------------------------------------------------------
    def decode(self, n: int) -> None:
        """Run the first n rows of the batch arrays."""
        self.batch.n_tokens = n
        code = self._run(self.C.llama_decode, self._context, self.batch)
        if code:
            cause = "the context is full" if code == 1 else " ".join(list(_errors)[-1:])
            raise BackendError(f"llama.cpp could not decode (code {code}): {cause}")

    def _run(self, function: Callable[..., int], *args: Any) -> int:
        """Call it, on this context's own thread where it has one; an interruption waits for its end."""
        if self._thread is None:
            return function(*args)
        future = self._thread.submit(function, *args)
        try:
            return future.result()
        except BaseException:
            wait([future])
            raise

    def decode_span(self, tokens: np.ndarray, start: int, *, seq: int = 0, outputs: bool = False) -> None:
        """Decode consecutive tokens (at most n_batch) of one sequence, the first at position `start`."""
        n = len(tokens)
        self.token[:n] = tokens
        self.pos[:n] = np.arange(start, start + n, dtype=np.int32)
        self.seq[:n] = seq
        self.wanted[:n] = outputs
        self.decode(n)

    def logits(self, n: int) -> np.ndarray:
        """(n, n_vocab) float32 copy of the logits of the last decode, which asked for n outputs."""
        pointer = self.C.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (n, self.model.n_vocab)).copy()

    def forget(self, seq: int, start: int) -> bool:
        """Drop a sequence's cache from position `start` on; False when this architecture cannot (then all is gone)."""
        if self.C.llama_memory_seq_rm(self.memory, seq, start, -1):
            return True
        self.C.llama_memory_seq_rm(self.memory, seq, -1, -1)
        return False

    def copy(self, source: int, target: int) -> None:
        """Make `target` a copy of the sequence `source`."""
        self.C.llama_memory_seq_rm(self.memory, target, -1, -1)
        self.C.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    def save(self, seq: int) -> bytes:
        """The keys and values of a sequence. Raises BackendError."""
        size = int(self.C.llama_state_seq_get_size(self._context, seq))
        buffer = (ctypes.c_uint8 * size)()
        if int(self.C.llama_state_seq_get_data(self._context, buffer, size, seq)) != size:
            raise BackendError("llama.cpp could not copy a prompt's cache")
        return bytes(buffer)

    def load(self, seq: int, data: bytes) -> bool:
        """Fill an empty sequence with what `save` gave; only with bytes of this process, as C trusts them."""
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        return int(self.C.llama_state_seq_set_data(self._context, buffer, len(data), seq)) > 0

    def clear(self) -> None:
        self.C.llama_memory_clear(self.memory, False)
