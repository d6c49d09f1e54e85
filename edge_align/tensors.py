"""Named arrays in a safetensors file, checked in full before anything uses them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edge_align.errors import CorruptArtefact, InputError
from edge_align.files import read_file, shown, write_atomic

if TYPE_CHECKING:
    import numpy as np

Expected = Mapping[str, tuple[str, tuple[int | None, ...]]]
"""Tensor name -> (numpy dtype name, shape); None in a shape stands for any size."""

TENSOR_LIMIT = 2 * 2**30  # bytes of one file
LISTED = 8  # mismatches spelt out in one message


def dump_tensors(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a safetensors file. Raises InputError for NaN, infinity and types the format lacks."""
    import numpy as np
    from safetensors.numpy import save

    for name, array in tensors.items():
        if array.dtype.kind not in "biuf":
            raise InputError(f"tensor {name!r} has dtype {array.dtype}; only numbers can be stored")
        if not np.isfinite(array).all():
            raise InputError(f"tensor {name!r} holds NaN or infinity; it is not stored")
    return save({name: np.asarray(array, order="C") for name, array in tensors.items()})


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file atomically, mode 0600. Raises StorageError, InputError."""
    write_atomic(path, dump_tensors(tensors))


def parse_tensors(data: bytes, expected: Expected | None, *, name: str) -> dict[str, np.ndarray]:
    """The arrays in `data`, read-only. Raises CorruptArtefact that calls the bytes `name` and lists every mismatch."""
    import numpy as np
    from safetensors.numpy import load

    try:
        tensors = load(data)
    except Exception as error:  # whatever a parser raises on foreign bytes, the bytes are damaged
        raise CorruptArtefact(f"{name} is damaged: not readable as safetensors") from error
    wrong = []
    if expected is not None:
        wrong += [f"tensor {key!r} is missing" for key in expected if key not in tensors]
        wrong += [f"tensor {ascii(key)[:60]} is unknown" for key in tensors if key not in expected]
    for key, array in tensors.items():
        if expected is not None and key in expected:
            dtype, shape = expected[key]
            if array.dtype.name != dtype or not _fits(array.shape, shape):
                wanted = ", ".join("any" if size is None else str(size) for size in shape)
                wrong.append(f"tensor {key!r} is {array.dtype} {array.shape}, expected {dtype} ({wanted})")
        if not np.isfinite(array).all():
            wrong.append(f"tensor {ascii(key)[:60]} holds NaN or infinity")
        array.setflags(write=False)
    if wrong:
        more = [f"and {len(wrong) - LISTED} more"] if len(wrong) > LISTED else []
        raise CorruptArtefact(f"{name} is damaged: {'; '.join(wrong[:LISTED] + more)}")
    return tensors


def load_tensors(path: Path, expected: Expected | None, *, limit: int = TENSOR_LIMIT) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file of at most `limit` bytes, read-only.

    expected: None checks only that all values are finite. Raises StorageError, and CorruptArtefact with every mismatch.
    """
    return parse_tensors(read_file(path, limit=limit), expected, name=shown(path))


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(w is None or s == w for s, w in zip(shape, wanted, strict=True))
