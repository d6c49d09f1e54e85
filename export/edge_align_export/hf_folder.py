"""A model folder as Hugging Face writes it: config.json, tokenizer.json, safetensors; checked before conversion."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TYPE_CHECKING

import numpy as np

from edge_align.errors import CorruptArtefact, InputError
from edge_align.files import JSON_LIMIT, parse_json_object, read_file, shown

if TYPE_CHECKING:
    import torch

TOKENIZER_LIMIT = 64 * 2**20  # bytes; the largest in use have about 35 MB
LISTED = 8
OTHER_CONVERTER = "llama.cpp's convert_hf_to_gguf.py converts it; give its GGUF with --from"


@dataclass(frozen=True)
class HFFolder:
    """Checked settings and, per weight, the file it lies in and its shape. Nothing is in memory yet."""

    path: Path
    config: dict[str, Any] = field(repr=False)
    tokenizer: dict[str, Any] = field(repr=False)
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    files: dict[str, Path] = field(repr=False)

    @property
    def architecture(self) -> str:
        """The class that `config.json` names, such as LlamaForCausalLM."""
        return str((self.config.get("architectures") or ["?"])[0])

    @property
    def n_values(self) -> int:
        """Numbers in all weights."""
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes.values())

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number of `config.json`. Raises InputError."""
        value = self.config.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise InputError(f"{shown(self.path / 'config.json')}: {name} is {ascii(value)[:40]}")
        return value

    def number(self, name: str, default: float) -> float:
        """A positive number of `config.json`. Raises InputError."""
        value = self.config.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise InputError(f"{shown(self.path / 'config.json')}: {name} is {ascii(value)[:40]}")
        return float(value)

    def read(self, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        """(name, float32 array) of these weights, one in memory at a time. Raises CorruptArtefact for NaN."""
        from safetensors import safe_open

        with ExitStack() as stack:
            opened = {
                path: stack.enter_context(safe_open(path, framework="pt"))  # numpy has no bfloat16
                for path in sorted({self.files[name] for name in names})
            }
            for name in names:
                tensor: torch.Tensor = opened[self.files[name]].get_tensor(name)
                array = tensor.float().numpy()
                if not np.isfinite(array).all():
                    raise CorruptArtefact(f"{shown(self.files[name])}: {name} holds NaN or infinity")
                yield name, array


def open_folder(path: Path) -> HFFolder:
    """Read settings and headers. Raises InputError (a file is not there) and CorruptArtefact (one is damaged)."""
    if not path.is_dir():
        raise InputError(f"{shown(path)} is neither a GGUF file nor a folder")
    for name, what in (("config.json", "the settings"), ("tokenizer.json", "the tokenizer")):
        if not (path / name).is_file():
            more = ""
            if name == "tokenizer.json" and (path / "tokenizer.model").is_file():
                more = f"; it has a SentencePiece model, which is not converted here: {OTHER_CONVERTER}"
            raise InputError(f"{shown(path)} has no {name}, {what} of the model{more}")
    config = parse_json_object(
        read_file((path / "config.json").resolve(), limit=JSON_LIMIT), shown(path / "config.json")
    )
    tokenizer = parse_json_object(
        read_file((path / "tokenizer.json").resolve(), limit=TOKENIZER_LIMIT), shown(path / "tokenizer.json")
    )
    if config.get("quantization_config"):
        raise InputError(f"the weights in {shown(path)} are quantised already; give the folder they were made from")
    shapes, files = _weights(path)
    return HFFolder(path, config, tokenizer, shapes, files)


def _weights(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Path]]:
    """Shapes and files of all weights, from the headers; safetensors refuses a file that is not whole."""
    from safetensors import safe_open, SafetensorError

    found = sorted(path.glob("*.safetensors"))
    index = path / "model.safetensors.index.json"
    if index.is_file():
        listed = parse_json_object(read_file(index.resolve(), limit=JSON_LIMIT), shown(index)).get("weight_map")
        names = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
        missing = [name for name in names if not (path / name).is_file() or Path(name).name != name]
        if missing or not names:
            raise CorruptArtefact(
                f"{shown(index)} names files that are not there: {', '.join(missing[:LISTED]) or 'none'}"
            )
        found = [path / name for name in names]
    if not found:
        pickled = next(path.glob("*.bin"), None)
        more = f"; {pickled.name} is a pickle, which is never opened: save it as safetensors" if pickled else ""
        raise InputError(f"{shown(path)} has no weights (*.safetensors){more}")
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, Path] = {}
    for file in found:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (it is no mapping)
                    shapes[name], files[name] = tuple(tensors.get_slice(name).get_shape()), file
        except (SafetensorError, OSError) as error:
            raise CorruptArtefact(
                f"{shown(file)} is damaged or truncated: {' '.join(str(error).split())[:120]}"
            ) from error
    return shapes, files
