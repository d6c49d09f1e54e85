"""llama.cpp's `common_control_vector_load_one` in Python, on the `gguf` package's reader; and a writer as repeng's."""

from pathlib import Path

import numpy as np


def load(path: Path, strength: float = 1.0) -> tuple[int, np.ndarray]:
    """(n_embd, data): the flat buffer for llama_set_adapter_cvec, which begins at block 1."""
    from gguf import GGMLQuantizationType, GGUFReader

    n_embd, data = -1, np.zeros(0, np.float32)
    for tensor in GGUFReader(path).tensors:
        head, _, tail = tensor.name.partition(".")
        assert head == "direction"
        layer = int(tail)
        assert layer > 0 and tensor.tensor_type == GGMLQuantizationType.F32 and len(tensor.shape) == 1
        assert n_embd in (-1, int(tensor.n_elements))
        n_embd = int(tensor.n_elements)
        if len(data) < n_embd * layer:
            data = np.concatenate([data, np.zeros(n_embd * layer - len(data), np.float32)])
        data[n_embd * (layer - 1) : n_embd * layer] += tensor.data * np.float32(strength)
    return n_embd, data


def write(path: Path, directions: dict[str, np.ndarray], *, model_hint: str = "llama") -> Path:
    """A file as repeng's `export_gguf` makes it; keys are what stands after `direction.`."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", model_hint)
    writer.add_uint32("controlvector.layer_count", len(directions))
    for layer, values in directions.items():
        writer.add_tensor(f"direction.{layer}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
