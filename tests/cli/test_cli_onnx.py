"""`export onnx`, an export as --model, --engine, and what doctor says about onnxruntime."""

import json
import sys
from pathlib import Path

import pytest
from reference.tiny_checkpoints import make_checkpoint

from edge_align.bases import find_base
from edge_align.cli import doctor
from edge_align_export.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("tiny") / "tiny-qwen")


def test_a_checkpoint_is_exported_and_answers(run, checkpoint: Path, tmp_path: Path) -> None:
    made = run("export", "onnx", "--from", str(checkpoint), "--out", str(tmp_path / "out"), "--json")
    assert made.exit_code == 0, made.stderr
    report = json.loads(made.stdout)
    assert (report["base"], report["precision"], report["n_layer"]) == ("tiny-qwen", "int4", 4)
    arguments = ["generate", "hi", "--no-profile", "--max-tokens", "5", "--threads", "1", "--json"]
    answers = [run(*arguments, "--model", str(tmp_path / "out"), *engine) for engine in ((), ("--engine", "onnx"))]
    first, second = (json.loads(answer.stdout) for answer in answers)
    assert first["text"] == second["text"] and first["model"] == "tiny-qwen"
    shown = run("models", "show", str(tmp_path / "out"))
    assert shown.exit_code == 0 and "qwen2, 4 blocks of width 64" in shown.stdout


def test_it_is_said_when_four_bits_are_fewer_than_the_source_has(run, checkpoint: Path, tmp_path: Path) -> None:
    for precision, said in (("int4", ["Note"]), ("int8", [])):
        out = str(tmp_path / precision)
        shown = run("export", "onnx", "--from", str(checkpoint), "--precision", precision, "--out", out).stdout
        assert [line.split()[0] for line in shown.splitlines()] == ["Export", "Model", *said, "Next"]
    assert open_checkpoint(find_base("smollm2-135m-instruct").path).bits == pytest.approx(5.0, abs=0.05)  # Q4_1


def test_what_cannot_be_exported_or_run_is_one_line_and_code_2(run, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "mine").mkdir(parents=True)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.onnx").write_bytes(b"x")
    for arguments, words in (
        (["export", "onnx", "--from", str(checkpoint), "--out", str(out)], "is not empty"),
        (["export", "onnx", "--from", "no-such", "--out", str(tmp_path / "new")], "neither a GGUF file nor a folder"),
        (["generate", "hi", "--engine", "onnx"], "edge-align export onnx --from"),
        (["serve", "--port", "0", "--engine", "onnx"], "edge-align export onnx --from"),
        (["generate", "hi", "--model", str(foreign)], "is not a finished ONNX export of edge-align"),
        (["generate", "hi", "--model", str(foreign / "model.onnx")], "is not a finished ONNX export of edge-align"),
        (["generate", "hi", "--model", str(out)], "neither a file nor one of the known ids"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1, result.stderr


def pretend(folder: Path, name: str) -> None:
    """Make a distribution look installed."""
    info = folder / f"{name.replace('-', '_')}-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")


def test_doctor_sees_both_distributions_of_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = doctor._onnxruntime()
    assert check.status == "ok" and "CPU" in check.detail
    pretend(tmp_path, "onnxruntime-gpu")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (check,) = doctor._onnxruntime()
    assert check.status == "broken" and "both are installed" in check.detail


def test_doctor_sees_a_promised_cuda_provider_that_is_not_there() -> None:
    """The CPU build is what is installed here; the GPU distribution would promise more."""
    check = doctor._providers("onnxruntime-gpu 9.9", promised=True)
    assert check.status == "broken" and "has no CUDA provider" in check.detail
