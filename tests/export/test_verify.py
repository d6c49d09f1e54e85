"""`export verify`: engines that agree are told apart from engines that do not."""

import json
from pathlib import Path

import numpy as np
import pytest

from edge_align.config import RuntimeConfig
from edge_align.errors import BackendUnavailable, InputError
from edge_align.gguf_tensors import GGUFTensors
from edge_align.records import SteeringVectors
from edge_align_export.engines import open_torch
from edge_align_export.gguf_file import export_gguf
from edge_align_export.verify import bits, verify
from scripts.tiny_models import LAYERS, WIDTH, write_gguf, write_hf

ONE = RuntimeConfig(n_threads=1, n_ctx=256)
FEW = {"answers": 4, "tokens": 24, "runtime": ONE}

pytest.importorskip("transformers", reason="needs the extra `export`")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """hf/, and F16 and Q4_0 of it in dist/."""
    place = tmp_path_factory.mktemp("verify")
    folder = write_hf(place / "hf", "llama")
    (place / "dist").mkdir()
    for quant in ("F16", "Q4_0"):
        file = export_gguf(folder, place / quant, quants=[quant], threads=1)["files"][0]["file"]
        (place / quant / file).rename(place / "dist" / file)
    return place


def rows(report: dict[str, object]) -> dict[tuple[str, str, str], dict[str, object]]:
    return {(row["artefact"], row["engine"], row["vectors"]): row for row in report["rows"]}  # type: ignore[index, attr-defined]


def test_the_same_weights_agree_in_every_engine_and_rounded_ones_are_only_reported(made):
    report = verify(made / "dist", **FEW)
    assert report["reference"] == "hf-F16.gguf" and report["reference_engine"] == "PyTorch float32"
    found = rows(report)
    assert found.keys() == {
        (file, engine, vectors)
        for file, engine in (
            ("hf-F16.gguf", "llama.cpp"),
            ("hf-Q4_0.gguf", "llama.cpp"),
            ("hf-Q4_0.gguf", "PyTorch"),
        )
        for vectors in ("none", "random")
    }
    for vectors in ("none", "random"):
        same, rounded = found["hf-F16.gguf", "llama.cpp", vectors], found["hf-Q4_0.gguf", "llama.cpp", vectors]
        assert same["positions"] == 96 and same["max_difference"] < 0.05 and same["widest_gap"] < 0.1
        assert rounded["passes"] is None and rounded["max_difference"] > 10 * same["max_difference"]
    assert found["hf-F16.gguf", "llama.cpp", "none"]["preference_error"] is None
    same, rounded = (found[file, "llama.cpp", "random"] for file in ("hf-F16.gguf", "hf-Q4_0.gguf"))
    assert 0 < same["preference_error"] < rounded["preference_error"]
    json.dumps(report)


@pytest.fixture(scope="module")
def exports(made, tmp_path_factory) -> Path:
    """fp32 and int4 exports of the F16 file, and rounded/, an fp32 export of the Q4_0 file."""
    pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
    from edge_align_export.onnx_export import export_onnx

    place = tmp_path_factory.mktemp("exports")
    for name, file, precision in (("fp32", "F16", "fp32"), ("int4", "F16", "int4"), ("rounded", "Q4_0", "fp32")):
        export_onnx(made / "dist" / f"hf-{file}.gguf", place / name, precision=precision)
    return place


def folder_of(place: Path, *parts: Path) -> Path:
    place.mkdir()
    for part in parts:
        (place / part.name).symlink_to(part, target_is_directory=part.is_dir())
    return place


def test_exports_are_held_to_pytorch_and_only_floating_point_ones_are_judged(made, exports, tmp_path):
    folder = folder_of(tmp_path / "dist", made / "dist" / "hf-F16.gguf", exports / "fp32", exports / "int4")
    found = rows(verify(folder, **FEW))
    assert found.keys() == {
        (*artefact, vectors)
        for artefact in (("hf-F16.gguf", "llama.cpp"), ("fp32", "ONNX Runtime"), ("int4", "ONNX Runtime"))
        for vectors in ("none", "random")
    }
    same, rounded = (found[name, "ONNX Runtime", "random"] for name in ("fp32", "int4"))
    assert same["passes"] and same["max_difference"] <= 1e-3 and same["preference_error"] < 1e-3
    assert rounded["passes"] is None and rounded["preference_error"] > 10 * same["preference_error"]


def test_a_floating_point_export_of_a_rounded_file_is_judged_against_that_file_alone(made, exports, tmp_path):
    full, small = (made / "dist" / f"hf-{name}.gguf" for name in ("F16", "Q4_0"))
    row = ("rounded", "ONNX Runtime", "none")
    both = rows(verify(folder_of(tmp_path / "both", full, small, exports / "rounded"), **FEW))
    assert both[row]["passes"] is None
    alone = verify(folder_of(tmp_path / "alone", small, exports / "rounded"), **FEW)
    assert rows(alone)[row]["passes"] and rows(alone)[row]["max_difference"] <= 1e-3
    foreign = verify(folder_of(tmp_path / "foreign", full, exports / "rounded"), **FEW)
    assert rows(foreign)[row]["passes"] is False and not foreign["ok"]


def test_a_rounded_file_alone_is_reported_and_not_judged(made, tmp_path):
    """llama.cpp multiplies 4-bit weights by activations of 8 bits: it differs from the same weights in float32."""
    report = verify(folder_of(tmp_path / "dist", made / "dist" / "hf-Q4_0.gguf"), **FEW)
    found = rows(report)["hf-Q4_0.gguf", "llama.cpp", "none"]
    assert report["ok"] and found["passes"] is None and found["max_difference"] > 1e-3


def test_a_folder_of_exports_alone_is_held_to_the_least_rounded_one_and_says_so(exports, tmp_path):
    report = verify(folder_of(tmp_path / "dist", exports / "fp32", exports / "int4"), **FEW)
    assert (report["reference"], report["reference_engine"]) == ("fp32", "ONNX Runtime")
    assert "PyTorch reads no ONNX export" in report["notes"][0]
    assert {row["artefact"] for row in report["rows"]} == {"int4"}


def test_a_folder_of_transformers_is_a_reference_with_the_same_steering(made):
    """Two independent references, one with hooks on transformers' blocks: equal also where they are steered."""
    report = verify(made / "dist", reference=made / "hf", **FEW)
    for vectors in ("none", "random"):
        assert rows(report)["hf-F16.gguf", "PyTorch", vectors]["max_difference"] < 0.02  # weights rounded to F16
    with open_torch(made / "hf", ONE) as score:
        plain = score([5, 6, 7], [8, 9], None)
        array = np.zeros((LAYERS, WIDTH), np.float32)
        array[LAYERS - 1] = 1.0
        moved = score([5, 6, 7], [8, 9], SteeringVectors(array))
        again = score([5, 6, 7], [8, 9], None)
    assert plain.shape == (2, 700) and np.abs(moved - plain).max() > 0.1 and np.array_equal(plain, again)


def test_one_changed_tensor_is_a_failure(made, tmp_path):
    source = made / "dist" / "hf-F16.gguf"
    tensor = GGUFTensors(source).header.tensors["blk.3.ffn_down.weight"]
    data = bytearray(source.read_bytes())
    data[tensor.offset : tensor.offset + tensor.n_bytes] = bytes(tensor.n_bytes)
    (tmp_path / "changed.gguf").write_bytes(data)
    report = verify(tmp_path, reference=made / "hf", **FEW)
    assert not report["ok"] and [row["passes"] for row in report["rows"]] == [False] * 4


def test_a_base_that_pytorch_does_not_compute_is_held_to_llama_cpp_and_says_so(tmp_path):
    write_gguf(tmp_path / "a.gguf", "gemma")
    export_gguf(tmp_path / "a.gguf", tmp_path / "out", quants=["Q8_0"], threads=1)
    report = verify(tmp_path, **FEW)
    assert report["reference_engine"] == "llama.cpp" and "gemma" in report["notes"][0]
    assert {row["artefact"] for row in report["rows"]} == {"out/a-Q8_0.gguf"}


def test_bits_of_a_file_are_those_of_its_matrices(made, tmp_path):
    assert bits(write_gguf(tmp_path / "f32.gguf")) == 32.0
    assert bits(made / "dist" / "hf-F16.gguf") == 16.0
    assert 4.5 <= bits(made / "dist" / "hf-Q4_0.gguf") < 9.0  # 18 bytes for 32 weights; the head stays wider


def test_nothing_to_compare_is_said(tmp_path):
    for match in ("is no folder", "holds no GGUF and no ONNX export"):
        with pytest.raises(InputError, match=match):
            verify(tmp_path / "none" if "folder" in match else tmp_path, **FEW)
    write_gguf(tmp_path / "plamo.gguf", "plamo2")
    with pytest.raises(BackendUnavailable, match="ignores steering vectors"):
        verify(tmp_path, **FEW)
