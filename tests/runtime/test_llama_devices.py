"""Which devices llama.cpp has, and what it says about layers on a GPU. There is no GPU where these tests run."""

import pytest

from edge_align.config import RuntimeConfig
from edge_align.errors import BackendUnavailable
from edge_align.runtime.llama_devices import devices
from edge_align.runtime.llama_native import api, parse_offload
from edge_align.runtime.llamacpp import LlamaCppBackend
from scripts.tiny_models import write_gguf


def test_the_processor_is_a_device_with_a_name():
    assert [device.title for device in devices() if device.kind == "cpu" and device.name == "CPU"][0]


def test_layers_on_a_gpu_are_read_off_llama_cpps_own_words():
    assert parse_offload("load_tensors: offloaded 12/31 layers to GPU\n") == (12, 31)
    assert parse_offload("load_tensors: layer   0 assigned to device CPU") == parse_offload("") == (0, 0)


def test_a_build_without_a_gpu_says_cpu_and_refuses_layers_for_one(tmp_path):
    if api().llama_supports_gpu_offload():
        pytest.skip("this build has a GPU")
    model = write_gguf(tmp_path / "tiny.gguf")
    with LlamaCppBackend.open(model, config=RuntimeConfig(n_threads=1, n_ctx=64)) as backend:
        assert backend.info.device == "cpu"
    with pytest.raises(BackendUnavailable, match="no GPU support"):
        LlamaCppBackend.open(model, config=RuntimeConfig(n_gpu_layers=-1))
