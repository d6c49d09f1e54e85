"""Weights of a GGUF as float32 arrays: the tensor data is mapped, and only what is asked for is dequantised."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from edge_align.errors import ModelLoadError
from edge_align.gguf_header import GGUFHeader, read_header


class GGUFTensors:
    """An open GGUF. Raises ModelLoadError when the file is no GGUF model, or lacks a tensor that is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: GGUFHeader = read_header(path)

    @cached_property
    def _file(self) -> np.ndarray:
        return np.memmap(self.path, dtype=np.uint8, mode="r")

    def read(self, name: str) -> np.ndarray:
        """The whole tensor: (rows, columns) or (n,) float32."""
        values = self._dequantise(name, None)
        return values[0] if len(self.header.tensors[name].shape) == 1 else values

    def rows(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Some rows of a matrix: (len(indices), columns) float32."""
        return self._dequantise(name, indices)

    def _dequantise(self, name: str, indices: np.ndarray | None) -> np.ndarray:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.header.tensors.get(name)
        if tensor is None:
            raise ModelLoadError(f"{self.path} has no tensor {name}")
        n_rows = int(np.prod(tensor.shape[1:]))
        data = self._file[tensor.offset : tensor.offset + tensor.n_bytes].reshape(n_rows, -1)
        if indices is not None:
            data = data[indices]
        kind = GGMLQuantizationType(tensor.type)
        if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):  # gguf takes these typed, the others as bytes
            data = np.ascontiguousarray(data).view(np.float32 if kind == GGMLQuantizationType.F32 else np.float16)
        try:
            return np.array(dequantize(data, kind), dtype=np.float32)
        except NotImplementedError:
            raise ModelLoadError(f"{self.path} stores {name} as {kind.name}, which cannot be read here") from None
