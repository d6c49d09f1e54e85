"""Check a GGUF file's header before any C code sees it.

Only metadata and the tensor table are read (a memory map; tensor data is never touched), every length is checked
against the file before it is used, and the keys that llama.cpp takes on trust must have the types it expects.
Layout: magic, version, counts, key-value pairs, tensor table, padding, tensor data (GGUF specification, versions 2, 3).
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from edge_align.errors import ModelLoadError

COUNT_LIMIT = 1_000_000  # key-value pairs or tensors; real files have hundreds
HEAD_LIMIT = 65_536  # attention heads
KEPT_TEXT = 1 << 20  # bytes of a string value that are kept

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9

_BLOCKS: dict[int, tuple[int, int]] = dict(
    # ggml type, values in a block, bytes in a block (types that occur in files)
    [(0, (1, 4)), (1, (1, 2)), (2, (32, 18)), (3, (32, 20)), (6, (32, 22)), (7, (32, 24)), (8, (32, 34))]
    + [(10, (256, 84)), (11, (256, 110)), (12, (256, 144)), (13, (256, 176)), (14, (256, 210))]
    + [(16, (256, 66)), (17, (256, 74)), (18, (256, 98)), (19, (256, 50)), (20, (32, 18))]
    + [(21, (256, 110)), (22, (256, 82)), (23, (256, 136)), (24, (1, 1)), (25, (1, 2)), (26, (1, 4))]
    + [(27, (1, 8)), (28, (1, 8)), (29, (256, 56)), (30, (1, 2)), (34, (256, 54)), (35, (256, 66)), (39, (32, 17))]
)


@dataclass(frozen=True, slots=True)
class GGUFArray:
    """An array value: the type code of its elements and how many there are (the elements are not kept)."""

    type: int
    count: int


Value = str | int | float | bool | GGUFArray


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies. `shape` is ggml's, fastest dimension first; n_bytes is 0 for a type not known here."""

    shape: tuple[int, ...]
    type: int  # ggml type
    offset: int  # bytes from the start of the file
    n_bytes: int


@dataclass(frozen=True, slots=True)
class GGUFTable:
    """What any GGUF holds: its metadata, and where its tensors lie."""

    version: int
    metadata: dict[str, Value] = field(repr=False)
    tensors: dict[str, GGUFTensor] = field(repr=False)


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What the header of a model says; `tensors` is keyed by name."""

    version: int
    architecture: str
    n_layer: int
    d_model: int
    metadata: dict[str, Value] = field(repr=False)
    tensors: dict[str, GGUFTensor] = field(repr=False)


class _Bad(Exception):
    """What is wrong, without the file's name."""


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.size, self.at = data, len(data), 0

    def take(self, n: int) -> int:
        """Move past n bytes; returns where they began."""
        start = self.at
        if n > self.size - start:
            raise _Bad("it is truncated")
        self.at = start + n
        return start

    def number(self, layout: str) -> int:
        return int(struct.unpack_from(layout, self.data, self.take(struct.calcsize(layout)))[0])

    def text(self, limit: int) -> str:
        length = self.number("<Q")
        start = self.take(length)
        if length > limit:
            raise _Bad(f"a name is {length} bytes long")
        return self.data[start : start + length].decode("utf-8", "replace")

    def skip_strings(self, count: int) -> None:
        data, size, at = self.data, self.size, self.at
        unpack = struct.Struct("<Q").unpack_from
        if count > (size - at) // 8:
            raise _Bad("it is truncated")
        for _ in range(count):
            if at + 8 > size:
                raise _Bad("it is truncated")
            at += 8 + unpack(data, at)[0]
        if at > size:
            raise _Bad("it is truncated")
        self.at = at


def read_header(path: Path) -> GGUFHeader:
    """The header of a model file. Raises ModelLoadError, in one line, for anything that is not a whole GGUF model."""
    table = read_table(path)
    try:
        architecture, n_layer, d_model = _check_keys(table.metadata)
    except _Bad as error:
        raise ModelLoadError(f"{path} is not a usable GGUF model: {error}") from None
    return GGUFHeader(table.version, architecture, n_layer, d_model, table.metadata, table.tensors)


def read_table(path: Path) -> GGUFTable:
    """Metadata and tensor table of a GGUF of any kind. Raises ModelLoadError, in one line, for anything else."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(data))
    except _Bad as error:
        raise ModelLoadError(f"{path} is not a usable GGUF model: {error}") from None
    except ValueError:  # an empty file cannot be mapped
        raise ModelLoadError(f"{path} is not a GGUF model: it is empty") from None
    except OSError as error:
        raise ModelLoadError(f"cannot read the model {path}: {error.strerror or error}") from None


def _parse(c: _Cursor) -> GGUFTable:
    if c.size < 24 or c.data[:4] != b"GGUF":
        raise _Bad("it does not begin with GGUF")
    c.at = 4
    version = c.number("<I")
    if version not in (2, 3):
        raise _Bad(f"its version is {version}; 2 and 3 are supported")
    n_tensors, n_pairs = c.number("<Q"), c.number("<Q")
    if not 0 < n_tensors <= COUNT_LIMIT or not 0 < n_pairs <= COUNT_LIMIT:
        raise _Bad(f"it claims {n_tensors} tensors and {n_pairs} metadata keys")
    metadata: dict[str, Value] = {}
    for _ in range(n_pairs):
        key = c.text(65_535)
        if not key or key in metadata:
            raise _Bad(f"the key {key!r} is empty or repeated")
        metadata[key] = _value(c)
    return GGUFTable(version, metadata, _tensor_table(c, n_tensors, _alignment(metadata)))


def _value(c: _Cursor) -> Value:
    kind = c.number("<I")
    if kind == _STRING:
        return c.text(KEPT_TEXT)
    if kind == _ARRAY:
        of, count = c.number("<I"), c.number("<Q")
        if of == _STRING:
            c.skip_strings(count)
        elif of in _SCALARS:
            c.take(count * struct.calcsize(_SCALARS[of]))
        else:
            raise _Bad(f"an array has the unknown element type {of}")
        return GGUFArray(of, count)
    if kind not in _SCALARS:
        raise _Bad(f"a value has the unknown type {kind}")
    layout = _SCALARS[kind]
    value: Value = struct.unpack_from(layout, c.data, c.take(struct.calcsize(layout)))[0]
    return value


def _alignment(metadata: dict[str, Value]) -> int:
    value = metadata.get("general.alignment", 32)
    if not isinstance(value, int) or not 0 < value <= 1 << 20 or value & (value - 1):
        raise _Bad(f"its alignment is {value!r}")
    return value


def _check_keys(metadata: dict[str, Value]) -> tuple[str, int, int]:
    """(architecture, n_layer, d_model), with the keys that C code reads unchecked checked here."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", architecture):
        raise _Bad("it does not name its architecture")
    sizes = []
    for name in ("block_count", "embedding_length"):
        value = metadata.get(f"{architecture}.{name}")
        if not isinstance(value, int) or not 0 < value <= COUNT_LIMIT:
            raise _Bad(f"{architecture}.{name} is {value!r}")
        sizes.append(value)
    for name, value in metadata.items():
        limit = HEAD_LIMIT if "head_count" in name else 1 << 31  # C multiplies these as 32-bit numbers
        if name.startswith(f"{architecture}.") and isinstance(value, int) and not 0 <= value < limit:
            raise _Bad(f"{name} is {value}")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, GGUFArray) or tokens.type != _STRING or not tokens.count:
        raise _Bad("it has no vocabulary")
    for name, of, same in (("scores", 6, True), ("token_type", 5, True), ("merges", _STRING, False)):
        array = metadata.get(f"tokenizer.ggml.{name}")
        if array is None:
            continue
        if not isinstance(array, GGUFArray) or array.type != of or (same and array.count != tokens.count):
            raise _Bad(f"tokenizer.ggml.{name} does not fit the vocabulary")
    for name in ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"):
        if not isinstance(metadata.get(name, ""), str):
            raise _Bad(f"{name} is not a text")
    return architecture, sizes[0], sizes[1]


def _tensor_table(c: _Cursor, n_tensors: int, alignment: int) -> dict[str, GGUFTensor]:
    tensors: dict[str, GGUFTensor] = {}
    end = 0
    for _ in range(n_tensors):
        name = c.text(63)
        n_dims = c.number("<I")
        if name in tensors or not 1 <= n_dims <= 4:
            raise _Bad(f"the tensor {name!r} is repeated or has {n_dims} dimensions")
        shape = struct.unpack_from(f"<{n_dims}Q", c.data, c.take(8 * n_dims))
        kind, offset = c.number("<I"), c.number("<Q")
        size = prod(shape)
        if not 0 < size < 1 << 48 or offset % alignment:
            raise _Bad(f"the tensor {name!r} has shape {shape} at offset {offset}")
        block, n_bytes = _BLOCKS.get(kind, (1, 0))  # a type newer than this table: only its place is checked
        if shape[0] % block:
            raise _Bad(f"rows of the tensor {name!r} are not whole blocks")
        end = max(end, offset + size // block * n_bytes)
        tensors[name] = GGUFTensor(shape, kind, offset, size // block * n_bytes)
    data = c.at + -c.at % alignment
    if data + end > c.size:
        raise _Bad(f"it is truncated: {data + end} bytes are needed, {c.size} are there")
    return {name: replace(tensor, offset=data + tensor.offset) for name, tensor in tensors.items()}
