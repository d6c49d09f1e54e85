"""What llama.cpp can compute on in this build: asked of ggml, which knows its own devices."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal

from edge_align.errors import BackendUnavailable
from edge_align.runtime.llama_native import api, NativeModel

Kind = Literal["cpu", "gpu", "accelerator"]

_KINDS: dict[int, Kind] = {0: "cpu", 1: "gpu", 2: "gpu", 3: "accelerator"}  # ggml_backend_dev_type; 2: integrated


@dataclass(frozen=True, slots=True)
class Device:
    """name: ggml's, such as CUDA0, Metal, CPU. title: the maker's."""

    name: str
    title: str
    kind: Kind


def devices() -> list[Device]:
    """Every device of this build, in the order llama.cpp uses them. Raises BackendUnavailable."""
    api()
    try:
        from llama_cpp._ggml import libggml

        count = libggml["ggml_backend_dev_count"]
        get = libggml["ggml_backend_dev_get"]
        texts = [libggml[f"ggml_backend_dev_{what}"] for what in ("name", "description")]
        kind = libggml["ggml_backend_dev_type"]
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise BackendUnavailable("this build of llama-cpp-python does not say which devices it has") from error
    count.restype, get.restype, get.argtypes = ctypes.c_size_t, ctypes.c_void_p, [ctypes.c_size_t]
    kind.argtypes, kind.restype = [ctypes.c_void_p], ctypes.c_int
    found = []
    for text in texts:
        text.argtypes, text.restype = [ctypes.c_void_p], ctypes.c_char_p
    for index in range(count()):
        handle = get(index)
        name, title = (" ".join(text(handle).decode("utf-8", "replace").split()) for text in texts)
        found.append(Device(name, title, _KINDS.get(kind(handle), "accelerator")))
    return found


def device_of(model: NativeModel) -> str:
    """ "cpu", or the GPU's name and how much of the model it holds."""
    on_gpu, layers = model.offloaded
    if not on_gpu:
        return "cpu"
    names = [f"{device.name} ({device.title})" for device in devices() if device.kind == "gpu"]
    return f"{', '.join(names) or 'gpu'}, {on_gpu} of {layers} layers"
