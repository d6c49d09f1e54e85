"""ONNX Runtime sessions, and a decoder graph with its key-value cache in place (`edge_align_export.onnx_graph`)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_align.config import RuntimeConfig
from edge_align.errors import BackendError, BackendUnavailable, ModelLoadError
from edge_align.files import shown
from edge_align.onnx_files import OnnxModel

QUIET = 4  # fatal only: everything else comes as an exception too


@dataclass(frozen=True, slots=True)
class Provider:
    """Where a session runs, and why there."""

    names: tuple[str, ...]
    device: str  # "cpu" or "cuda"
    reason: str


def choose_provider(config: RuntimeConfig, available: list[str]) -> Provider:
    """CUDA when layers for a GPU are asked for, else the CPU. Raises BackendUnavailable when CUDA is not there."""
    if not config.n_gpu_layers:
        offer = "; --n-gpu-layers -1 uses CUDA" if "CUDAExecutionProvider" in available else ""
        return Provider(("CPUExecutionProvider",), "cpu", f"CPU: no GPU layers were asked for{offer}")
    if "CUDAExecutionProvider" not in available:
        raise BackendUnavailable(
            "this onnxruntime has no CUDA provider; leave out --n-gpu-layers, or run: pip uninstall onnxruntime "
            'and then pip install "edge-align[onnx-gpu]"'
        )
    return Provider(("CUDAExecutionProvider", "CPUExecutionProvider"), "cuda", "CUDA: GPU layers were asked for")


def library() -> Any:
    """onnxruntime. Raises BackendUnavailable when it is not installed or does not load."""
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        raise BackendUnavailable('onnxruntime is not installed; run: pip install "edge-align[onnx]"') from error
    return onnxruntime


def open_session(path: Path, config: RuntimeConfig) -> tuple[Any, Provider]:
    """A session on a graph file. Raises ModelLoadError, BackendUnavailable."""
    runtime = library()
    provider = choose_provider(config, runtime.get_available_providers())
    options = runtime.SessionOptions()
    options.intra_op_num_threads = config.n_threads  # 0: one per physical core
    options.inter_op_num_threads = 1
    options.log_severity_level = QUIET
    try:
        session = runtime.InferenceSession(str(path), options, providers=list(provider.names))
    except Exception as error:  # pybind classes without a common ancestor of their own
        raise ModelLoadError(f"ONNX Runtime cannot load {shown(path)}: {one_line(error)}") from error
    if provider.device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise BackendUnavailable("the CUDA provider does not start; check that CUDA and cuDNN are installed")
    return session, provider


def check_graph(session: Any, model: OnnxModel) -> None:
    """Does the graph have the inputs it is run with? Raises ModelLoadError that names what is wrong."""
    shapes = {value.name: value.shape for value in session.get_inputs()}
    where = shown(model.folder)
    if "steering" not in shapes:
        raise ModelLoadError(
            f"the graph in {where} has no steering input, so it cannot be personalised; make it with: "
            "edge-align export onnx"
        )
    expected = {
        "steering": [model.n_layer, model.d_model],
        "past.0.key": [model.n_head_kv, model.d_head],
        f"past.{model.n_layer - 1}.value": [model.n_head_kv, model.d_head],
    }
    for name, sizes in expected.items():
        found = [size for size in shapes.get(name, ()) if isinstance(size, int)]
        if found != sizes:
            raise ModelLoadError(f"the graph in {where} takes {name} of sizes {found}; its manifest says {sizes}")
    if f"past.{model.n_layer}.key" in shapes:
        raise ModelLoadError(f"the graph in {where} has more blocks than the {model.n_layer} of its manifest")


class _Bound:
    """Buffers bound to one shape of call: written in place, run again and again."""

    def __init__(self, decoder: OnnxDecoder, key: tuple[int, int, int, int, int]) -> None:
        row, batch, length, n_wanted, rows = key
        model = decoder.model
        self.tokens = np.zeros((batch, length), np.int64)
        self.last = np.zeros(batch, np.int32)
        self.total = np.zeros((), np.int32)
        self.steering = np.zeros((rows, model.n_layer, model.d_model), np.float32)
        self.given: np.ndarray | None = None  # what `steering` was filled from
        self.wanted = np.zeros(n_wanted, np.int64)
        self.logits = np.zeros((batch, n_wanted, model.n_vocab), np.float32)
        binding = self.binding = decoder.session.io_binding()
        for name in ("tokens", "last", "total", "steering", "wanted"):
            array = getattr(self, name)
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, self.logits.shape, self.logits.ctypes.data)
        shape = [batch, model.n_head_kv, decoder.room, model.d_head]
        offset = row * decoder.row_bytes
        for name, value in decoder.cache.items():
            place = (decoder.device, 0, decoder.float, shape, value.data_ptr() + offset)
            binding.bind_input(f"past.{name}", *place)
            binding.bind_output(f"present.{name}", *place)


class OnnxDecoder:
    """A decoder graph with a cache of `rows` rows of `room` tokens; what a row holds is the caller's to know."""

    def __init__(self, session: Any, model: OnnxModel, *, device: str, rows: int, room: int) -> None:
        runtime = library()
        self.session, self.model, self.device, self.rows, self.room = session, model, device, rows, room
        kind = next(value.type for value in session.get_inputs() if value.name == "past.0.key")
        self.float: Any = np.float16 if kind == "tensor(float16)" else np.float32
        shape = [rows, model.n_head_kv, room, model.d_head]
        self.row_bytes = int(np.prod(shape[1:])) * np.dtype(self.float).itemsize
        try:
            self.cache = {
                f"{il}.{part}": runtime.OrtValue.ortvalue_from_shape_and_type(shape, self.float, device, 0)
                for il in range(model.n_layer)
                for part in ("key", "value")
            }
        except Exception as error:
            raise BackendError(f"no memory for a context of {rows} x {room} tokens: {one_line(error)}") from error
        self._bound: dict[tuple[int, int, int, int, int], _Bound] = {}

    def run(
        self,
        tokens: np.ndarray,
        held: np.ndarray,
        *,
        steering: np.ndarray | None,
        wanted: np.ndarray,
        row: int = 0,
    ) -> np.ndarray:
        """Logits (batch, len(wanted), n_vocab) float32 of `tokens` (batch, length), valid until the next call.

        held (batch,): tokens that each row from `row` on holds already. More than one token at a time needs a batch
        of one. steering (1 or batch, n_layer, d_model), never written to between calls; None: the base.
        """
        batch, length = tokens.shape
        key = (row, batch, length, len(wanted), 1 if steering is None else len(steering))
        bound = self._bound.get(key)
        if bound is None:
            self._bound = {key: _Bound(self, key)}  # decoding repeats one shape; others come and go
            bound = self._bound[key]
        bound.tokens[:] = tokens
        bound.last[:] = held + (length - 1)
        bound.total[...] = held.max() + length
        bound.wanted[:] = wanted
        if steering is not bound.given:  # the same array step after step
            bound.steering[:] = 0.0 if steering is None else steering
            bound.given = steering
        try:
            self.session.run_with_iobinding(bound.binding)
        except Exception as error:
            raise BackendError(f"ONNX Runtime could not decode: {one_line(error)}") from error
        return bound.logits

    def save(self, row: int, n: int) -> bytes:
        """Keys and values of the first `n` tokens of a row."""
        return b"".join(self._array(value)[row, :, :n].tobytes() for value in self.cache.values())

    def load(self, row: int, data: bytes, n: int) -> bool:
        """Put what `save` gave for `n` tokens into a row; False where it is of another size."""
        shape = (len(self.cache), self.model.n_head_kv, n, self.model.d_head)
        if n > self.room or len(data) != int(np.prod(shape)) * np.dtype(self.float).itemsize:
            return False
        for value, part in zip(self.cache.values(), np.frombuffer(data, self.float).reshape(shape), strict=True):
            whole = self._array(value)
            whole[row, :, :n] = part
            if self.device != "cpu":
                value.update_inplace(whole)  # the memory that is bound to the graph
        return True

    def _array(self, value: Any) -> np.ndarray:
        """(rows, n_head_kv, room, d_head): the cache's own memory on a CPU, a copy of another device's."""
        if self.device != "cpu":
            return np.asarray(value.numpy())
        shape = value.shape()
        bytes_of = (ctypes.c_byte * (self.row_bytes * shape[0])).from_address(value.data_ptr())
        return np.frombuffer(bytes_of, self.float).reshape(shape)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
