"""Steering vectors as a llama.cpp control vector: a GGUF of tensors `direction.N`, N the block they are added after.

The format is what llama.cpp's `--control-vector` loads and repeng writes: F32, one dimension, N from 1 (block 0 cannot
be steered there either), blocks without a tensor unsteered, spellings of one N added up, no other tensors. llama.cpp's
own cvector-generator writes what it read after block i as `direction.(i + 1)`; `shift=-1` puts that right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_align.errors import CorruptArtefact, InputError, ModelLoadError
from edge_align.files import replacing, shown
from edge_align.gguf_header import GGUFTable, GGUFTensor, read_table, Value
from edge_align.records import SteeringVectors

OWN = "edge_align."  # prefix of the metadata keys that are ours; other programs pass over them
ARCHITECTURE = "controlvector"
SIZE_LIMIT = 2**30  # bytes of a file to read
SHIFT_LIMIT = 8

_F32 = 0
_DIRECTION = re.compile(r"direction\.([0-9]{1,6})")


@dataclass(frozen=True, slots=True)
class ControlVector:
    """A control vector as a base takes it. dropped: its N that lead to a block below 1, which cannot be steered."""

    vectors: SteeringVectors
    model_hint: str | None  # the architecture its writer named
    facts: dict[str, Value]  # our own metadata, without the prefix
    dropped: tuple[int, ...]


def write_control_vector(
    path: Path, vectors: SteeringVectors, *, architecture: str, facts: Mapping[str, str | int | float | bool]
) -> None:
    """Write `vectors` as `direction.1` to `direction.(n_layer - 1)`, atomically, mode 0600.

    architecture: the base's `general.architecture`. facts: kept under `edge_align.*`. Raises StorageError.
    """
    from gguf import GGUFWriter

    with replacing(path) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", architecture)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", vectors.n_layer - 1)
        for key, value in facts.items():
            if isinstance(value, bool):
                writer.add_bool(OWN + key, value)
            elif isinstance(value, int):
                writer.add_uint64(OWN + key, value)
            elif isinstance(value, float):
                writer.add_float64(OWN + key, value)
            else:
                writer.add_string(OWN + key, value)
        for layer in range(1, vectors.n_layer):
            writer.add_tensor(f"direction.{layer}", vectors.array[layer])
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def read_control_vector(path: Path, *, n_layer: int, d_model: int, shift: int = 0) -> ControlVector:
    """A control vector for a base of these sizes, `direction.N` going to block N + shift.

    Raises InputError (no such file, a shift out of range), CorruptArtefact, which lists everything that is wrong.
    """
    if not -SHIFT_LIMIT <= shift <= SHIFT_LIMIT:
        raise InputError(f"shift is {shift}; it must lie between {-SHIFT_LIMIT} and {SHIFT_LIMIT}")
    if not path.is_file():
        raise InputError(f"{shown(path)} does not exist, or is no file")
    if path.stat().st_size > SIZE_LIMIT:
        raise CorruptArtefact(f"{shown(path)} is larger than any control vector")
    try:
        table = read_table(path)
    except ModelLoadError as error:
        raise CorruptArtefact(str(error)) from None
    places, wrong = _places(table, n_layer=n_layer, d_model=d_model, shift=shift)
    data = np.memmap(path, dtype=np.uint8, mode="r")
    array = np.zeros((n_layer, d_model), np.float32)
    dropped = []
    for name, (layer, tensor) in places.items():
        values = np.array(data[tensor.offset : tensor.offset + tensor.n_bytes]).view("<f4")
        if not np.isfinite(values).all():
            wrong.append(f"{name} holds NaN or infinity")
        elif layer < 1:
            dropped.append(layer - shift)
        else:
            array[layer] += values
    if not wrong and not array.any():
        wrong.append("it steers no block")
    if wrong:
        more = [f"and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        raise CorruptArtefact(f"{shown(path)} does not fit as a control vector: {'; '.join(wrong[:8] + more)}")
    hint = table.metadata.get(f"{ARCHITECTURE}.model_hint")
    facts = {key.removeprefix(OWN): value for key, value in table.metadata.items() if key.startswith(OWN)}
    return ControlVector(SteeringVectors(array), str(hint) if hint is not None else None, facts, tuple(sorted(dropped)))


def _places(
    table: GGUFTable, *, n_layer: int, d_model: int, shift: int
) -> tuple[dict[str, tuple[int, GGUFTensor]], list[str]]:
    """Tensor name -> (block, tensor), and what is wrong with the others."""
    found: dict[str, tuple[int, GGUFTensor]] = {}
    wrong: list[str] = []
    for name, tensor in table.tensors.items():
        match = _DIRECTION.fullmatch(name)
        if match is None or not int(match[1]):
            wrong.append(f"its tensor {ascii(name)[:40]} is no direction.N with N from 1")
        elif tensor.type != _F32 or len(tensor.shape) != 1:
            wrong.append(f"{name} is not one row of F32")
        elif tensor.shape[0] != d_model:
            wrong.append(f"{name} has width {tensor.shape[0]}, the base {d_model}")
        elif int(match[1]) + shift >= n_layer:
            wrong.append(f"{name} would go to block {int(match[1]) + shift}, the base's last is {n_layer - 1}")
        else:
            found[name] = (int(match[1]) + shift, tensor)
    return found, wrong
