"""The weights of an ONNX export: one file, written front to back, so that memory holds one of them at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from onnx import helper, TensorProto

from edge_align.errors import BackendUnavailable

BLOCK = 32  # values that share a scale (and, with 4 bits, a zero point)
FITS = 4  # of step and offset to a block's levels
ALIGNMENT = 4096  # of every tensor in the file: it is memory-mapped
BITS = {"fp32": 0, "fp16": 0, "int8": 8, "int4": 4}

Make = Callable[[], np.ndarray]


class WeightFile:
    """Tensors of one export. A name that was written before is not written again: graphs share their weights."""

    def __init__(
        self, file: BinaryIO, *, name: str, precision: str, tell: Callable[[int], None] = lambda _bytes: None
    ) -> None:
        self._file, self._name, self._tell = file, name, tell
        self.precision, self.bits = precision, BITS[precision]
        self._float: Any = np.float16 if precision == "fp16" else np.float32
        self._written: dict[str, TensorProto] = {}

    def matrix(self, name: str, make: Make) -> TensorProto:
        """A tensor in the precision that activations have."""
        if name not in self._written:
            self._write(name, make().astype(self._float, order="C"))
        return self._written[name]

    def constant(self, name: str, array: np.ndarray) -> TensorProto:
        """A small tensor inside the graph (shapes and widths, which ONNX Runtime reads while it loads)."""
        return helper.make_tensor(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, array.tobytes(), raw=True
        )

    def quantised(self, name: str, make: Make) -> list[TensorProto]:
        """[packed, scales] of a matrix (rows out, columns in) for MatMulNBits: 8 bits, symmetric."""
        return self._several([f"{name}.q8", f"{name}.scales"], lambda: quantise_symmetric(make()))

    def quantised_affine(self, name: str, make: Make) -> list[TensorProto]:
        """[packed, scales, zero points] of a matrix widened by its offsets, see `quantise_affine`: 4 bits."""
        return self._several([f"{name}.q4", f"{name}.scales", f"{name}.zeros"], lambda: quantise_affine(make()))

    def _several(self, names: list[str], make: Callable[[], tuple[np.ndarray, ...]]) -> list[TensorProto]:
        if names[0] not in self._written:
            for part, array in zip(names, make(), strict=True):
                self._write(part, array)
        return [self._written[part] for part in names]

    def quantised_table(self, name: str, make: Make) -> list[TensorProto]:
        """[packed, scales] of an 8-bit table for GatherBlockQuantized: the bytes of `quantised`, other shape."""
        packed, scales = self.quantised(name, make)
        reshaped = TensorProto()
        reshaped.CopyFrom(scales)
        reshaped.name = f"{scales.name}.table"
        reshaped.dims.append(1)
        return [packed, reshaped]

    def _write(self, name: str, array: np.ndarray) -> None:
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._name), ("offset", self._file.tell()), ("length", array.nbytes)):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
        self._file.write(np.ascontiguousarray(array).data)
        self._written[name] = tensor
        self._tell(self._file.tell())


def quantise_symmetric(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8-bit (packed, scales) of a float32 matrix (rows out, columns in), by ONNX Runtime's own kernel.

    packed (n, k / BLOCK, BLOCK) uint8 around 128, scales (n, k / BLOCK) float32. Raises BackendUnavailable for widths
    that are no multiple of BLOCK, or without onnxruntime.
    """
    try:
        from onnxruntime.capi import _pybind_state as kernels
    except ImportError as error:
        raise BackendUnavailable(
            'int8 and int4 need ONNX Runtime; run: pip install "edge-align[export,onnx]"'
        ) from error
    n, k = _check_width(matrix)
    packed = np.zeros((n, k // BLOCK, BLOCK), np.uint8)
    scales = np.zeros((n, k // BLOCK), np.float32)
    unused = np.zeros((n, k // BLOCK), np.uint8)
    kernels.quantize_matmul_8bits(packed, np.ascontiguousarray(matrix.T), scales, unused, BLOCK, n, k, True)
    return packed, scales


def quantise_affine(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """4-bit (packed, scales, zero points) of a float32 matrix (rows out, columns in) whose blocks may begin anywhere.

    MatMulNBits is fast only with whole-numbered zero points, which shift a block by up to half a step: as much error
    as the four bits themselves, and it would come on top of a Q4_1 source's own. So what is left of each block's
    offset becomes a further column, BLOCK times the offset, to be multiplied by the mean of the block's inputs: a
    Q4_1 source comes out almost exactly.

    packed (n, blocks, BLOCK / 2), scales (n, blocks), zero points two in a byte (n, blocks / 2 rounded up), where
    blocks counts those of the k + k / BLOCK columns. Raises BackendUnavailable as above.
    """
    n, k = _check_width(matrix)
    values = matrix.reshape(n, k // BLOCK, BLOCK)
    low, scales, levels = _fitted(values)
    zeros = np.clip(np.rint(-low / scales), 0, 15)
    offsets = (low + zeros * scales) * BLOCK
    offsets = np.pad(offsets, ((0, 0), (0, -offsets.shape[1] % BLOCK))).reshape(n, -1, BLOCK)
    low = np.minimum(offsets.min(-1), 0.0)
    more_scales = _steps(low, np.maximum(offsets.max(-1), 0.0))
    more_zeros = np.rint(-low / more_scales)
    more_levels = np.rint(offsets / more_scales[..., None] + more_zeros[..., None])
    levels, scales, zeros = (
        np.concatenate(pair, axis=1) for pair in ((levels, more_levels), (scales, more_scales), (zeros, more_zeros))
    )
    zeros = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
    return _nibbles(levels), scales, _nibbles(zeros)


def _fitted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(value of level 0, step, levels 0 to 15) of blocks (..., BLOCK): float32 (...), (...) and (..., BLOCK).

    The 16 levels begin evenly over a block's range; then step and offset are fitted by least squares to the levels,
    and the levels to those, in turn, each of which can only make the squared error smaller.
    """
    low, step = values.min(-1), _steps(values.min(-1), values.max(-1))
    mean = values.mean(-1)
    for turn in range(FITS + 1):
        levels = np.clip(np.rint((values - low[..., None]) / step[..., None]), 0, 15)
        if turn < FITS:
            middle = levels.mean(-1)
            apart = levels - middle[..., None]
            slope = np.einsum("...i,...i", apart, values) / np.maximum(np.einsum("...i,...i", apart, apart), 1e-12)
            step = np.maximum(slope, 1e-12).astype(np.float32)
            low = mean - step * middle
    return low, step, levels


def _check_width(matrix: np.ndarray) -> tuple[int, int]:
    n, k = matrix.shape
    if k % BLOCK:
        raise BackendUnavailable(f"a matrix is {k} wide, no multiple of {BLOCK}; export with --precision fp32 or fp16")
    return n, k


def _steps(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """float32 distance of 16 levels between two values; never 0."""
    return np.asarray(np.maximum((high - low) / 15, 1e-12), np.float32)


def _nibbles(levels: np.ndarray) -> np.ndarray:
    """Numbers 0 to 15, two in a byte along the last axis, the first in the low half."""
    clipped = np.clip(levels, 0, 15).astype(np.uint8)
    return np.asarray(clipped[..., 0::2] | clipped[..., 1::2] << 4)
