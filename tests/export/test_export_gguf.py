"""`export gguf`: folders made by scripts/tiny_models.py, against transformers and the PyTorch reference."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from reference.tiny_checkpoints import as_transformers_5

from edge_align.config import RuntimeConfig
from edge_align.errors import (
    BackendError,
    BackendUnavailable,
    CorruptArtefact,
    InputError,
    ModelLoadError,
    StorageError,
)
from edge_align.files import sha256_file
from edge_align.gguf_tensors import GGUFTensors
from edge_align.runtime.llamacpp import LlamaCppBackend
from edge_align.runtime.torch_ref import LlamaReference
from edge_align_export.gguf_file import export_gguf
from edge_align_export.hf_to_gguf import interleave
from edge_align_export.quantise import bits_per_weight, FTYPES, quantise
from scripts.tiny_models import HF_CLASSES, write_gguf, write_hf

TEXT = "Hello there, it's 12345 o'clock.\n\n\tWhat's the matter, naïve 中文 🚀?"
ONE = RuntimeConfig(n_threads=1, n_ctx=256)

transformers = pytest.importorskip("transformers", reason="needs the extra `export`")


GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3, "logits_scaling": 0.5}


@pytest.fixture(scope="module", params=HF_CLASSES)
def folder(request, tmp_path_factory) -> Path:
    settings = GRANITE if request.param == "granite" else {}
    return write_hf(tmp_path_factory.mktemp("hf") / f"Tiny {request.param}", request.param, **settings)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_hf(tmp_path_factory.mktemp("hf") / "tiny", "llama")


def reference(folder: Path) -> tuple[list[int], np.ndarray]:
    """Token ids of TEXT and logits at every position but the last, by transformers."""
    import torch

    ids = transformers.AutoTokenizer.from_pretrained(folder).encode(TEXT)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return ids, model(torch.tensor([ids])).logits[0, :-1].numpy()


def llama_cpp(path: Path) -> tuple[list[int], np.ndarray]:
    with LlamaCppBackend.open(path, config=ONE) as backend:
        ids = backend.tokenize(TEXT)
        (logits,) = backend.score(ids[:1], [ids[1:]], vectors=None)
        return ids, logits


# f16 keys and values in llama.cpp's cache move logits by up to .01 here; Q8_0 rounds weights to 1 part in 250
@pytest.mark.parametrize(("quant", "tolerance"), [("F32", 0.03), ("F16", 0.03), ("Q8_0", 0.5)])
def test_a_folder_gives_the_tokens_and_logits_that_transformers_has(folder, tmp_path, quant, tolerance):
    manifest = export_gguf(folder, tmp_path / "out", quants=[quant], threads=1)
    assert manifest["files"][0]["file"] == f"{folder.name.replace(' ', '-')}-{quant}.gguf"
    ids, wanted = reference(folder)
    tokens, logits = llama_cpp(tmp_path / "out" / manifest["files"][0]["file"])
    assert tokens == ids
    assert np.abs(logits - wanted).max() < tolerance < np.abs(wanted).max() / 4
    if quant != "Q8_0":
        assert (logits.argmax(1) == wanted.argmax(1)).mean() >= 0.95


@pytest.mark.parametrize("newer", [False, True])
def test_llama_3_rope_scaling_and_wide_heads_come_along(tmp_path, newer):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    folder = write_hf(tmp_path / "hf", "llama", rope_scaling=scaling, head_dim=32, rope_theta=500.0)
    ids, wanted = reference(folder)
    if newer:
        as_transformers_5(folder)
    manifest = export_gguf(folder, tmp_path / "out", quants=["F32"], threads=1)
    _, logits = llama_cpp(tmp_path / "out" / manifest["files"][0]["file"])
    assert len(ids) > 40  # past the original context, where scaling tells
    with pytest.raises(BackendUnavailable, match="scaled rotary embeddings and heads of another width"):
        LlamaReference(tmp_path / "out" / manifest["files"][0]["file"])  # it would compute something else
    assert np.abs(logits - wanted).max() < 0.03


HF_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def dequantised(source: Path, template: Path, folder: Path) -> Path:
    """A Llama GGUF as a folder with float32 weights, settings and tokenizer of `template`; heads one row at a time."""
    from safetensors.numpy import save_file

    tensors, weights = GGUFTensors(source), {}
    for name in tensors.header.tensors:
        array = tensors.read(name)
        *block, kind, end = name.removeprefix("blk.").split(".")
        if kind in ("attn_q", "attn_k"):
            d_head = 16
            order = [h * d_head + 2 * (i % 8) + i // 8 for h in range(len(array) // d_head) for i in range(d_head)]
            array = array[order]
        inside = f"layers.{block[0]}." if block else ""
        weights["lm_head.weight" if kind == "output" else f"model.{inside}{HF_NAMES[kind]}.{end}"] = array
    folder.mkdir()
    for file in template.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_gguf_goes_to_a_folder_and_back_without_a_change(tmp_path, llama):
    """GGUF -> dequantised folder -> GGUF F16: the PyTorch reference computes the same on both files."""
    first = tmp_path / "first" / export_gguf(llama, tmp_path / "first", quants=["Q8_0"], threads=1)["files"][0]["file"]
    folder = dequantised(first, llama, tmp_path / "hf")
    second = (
        tmp_path / "second" / export_gguf(folder, tmp_path / "second", quants=["F16"], threads=1)["files"][0]["file"]
    )
    tokens = list(range(5, 60))
    before, after = (LlamaReference(path).score(tokens[:1], tokens[1:]) for path in (first, second))
    assert np.abs(before - after).max() < 0.02  # Q8_0's products are rounded to F16, by 1 part in 2,048
    ids, wanted = reference(folder)
    assert np.abs(LlamaReference(second).score(ids[:1], ids[1:]) - wanted).max() < 0.02
    assert np.abs(llama_cpp(second)[1] - wanted).max() < 0.03


def test_a_gguf_is_quantised_by_llama_cpp_and_described(tmp_path):
    source = write_gguf(tmp_path / "tiny-F32.gguf", "gemma")
    told: list[tuple[str, float]] = []
    manifest = export_gguf(source, tmp_path / "out", quants=["Q4_0"], threads=1, progress=lambda *at: told.append(at))
    made = tmp_path / "out" / "tiny-Q4_0.gguf"
    (file,) = manifest["files"]
    assert (file["file"], file["quant"], file["sha256"]) == (made.name, "Q4_0", sha256_file(made))
    assert manifest["source_sha256"] == sha256_file(source) and manifest["notes"] == []
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert made.stat().st_size < source.stat().st_size / 3
    assert os.stat(made).st_mode & 0o777 == 0o600
    for stage in ("check", "quantise Q4_0"):
        done = [part for name, part in told if name == stage]
        assert done == sorted(done) and done[-1] == 1.0
    a, b = (GGUFTensors(path).read("blk.2.ffn_up.weight") for path in (source, made))
    assert 0 < np.abs(a - b).max() < 0.1 * np.abs(a).max()
    again = export_gguf(made, tmp_path / "again", quants=["Q8_0"], threads=1)
    assert "quantised already" in again["notes"][0] and again["files"][0]["file"] == "tiny-Q8_0.gguf"


@pytest.mark.parametrize("quants", [["F16", "Q8_0", "Q4_0"], ["Q8_0", "Q4_0", "Q8_0"], ["F32", "Q4_0"]])
def test_several_types_at_once_are_the_files_that_each_would_be(llama, tmp_path, quants):
    manifest = export_gguf(llama, tmp_path / "out", quants=quants, threads=1)
    wanted = list(dict.fromkeys(quants))
    assert [made["quant"] for made in manifest["files"]] == wanted
    names = {made["file"] for made in manifest["files"]}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"manifest.json"}
    for made in manifest["files"]:
        alone = export_gguf(llama, tmp_path / made["quant"], quants=[made["quant"]], threads=1)["files"]
        assert alone == [made]


def test_a_type_that_fails_takes_the_others_with_it(llama, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise BackendError("no")

    monkeypatch.setattr("edge_align_export.gguf_file.quantise", fail)
    refuse(llama, tmp_path, BackendError, "no", quants=["F16", "Q8_0"])
    refuse(llama, tmp_path, InputError, "unknown type 'Q9'", quants=["F16", "Q9"])


def test_rows_of_a_rotated_half_become_neighbours():
    rows = np.arange(8)[:, None].repeat(3, 1)
    assert interleave(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_every_type_offered_is_one_of_llama_cpps(tmp_path):
    from llama_cpp import llama_cpp as C

    for name, number in FTYPES.items():
        assert number == (C.LLAMA_FTYPE_ALL_F32 if name == "F32" else getattr(C, f"LLAMA_FTYPE_MOSTLY_{name}"))
        assert 3 < bits_per_weight(name) <= 32


# -- bad input ---------------------------------------------------------------------------------------------------------
def broken(llama: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    copy = tmp_path / "broken"
    copy.mkdir()
    for file in llama.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def refuse(source: Path, tmp_path: Path, error: type[Exception], match: str, **options: object) -> None:
    """The error is one line, and nothing is left in the folder, which may not even exist."""
    out = tmp_path / "refused"
    with pytest.raises(error, match=match) as caught:
        export_gguf(source, out, threads=1, **({"quants": ["F16"]} | options))
    assert "\n" not in str(caught.value)
    assert not out.exists() or list(out.iterdir()) == []


def test_a_folder_that_lacks_something_says_what(llama, tmp_path):
    for name, match in (("tokenizer.json", "no tokenizer.json"), ("config.json", "no config.json")):
        copy = broken(llama, tmp_path / name)
        (copy / name).unlink()
        refuse(copy, tmp_path, InputError, match)
    copy = broken(llama, tmp_path / "w")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refuse(copy, tmp_path, InputError, "is a pickle")
    refuse(tmp_path / "nothing", tmp_path, InputError, "neither a GGUF file nor a folder")
    (copy / "tokenizer.json").rename(copy / "tokenizer.model")
    refuse(copy, tmp_path, InputError, "SentencePiece.*convert_hf_to_gguf.py")


@pytest.fixture(autouse=True)
def parents(tmp_path):
    for name in ("tokenizer.json", "config.json", "w"):
        (tmp_path / name).mkdir()


def test_an_architecture_not_converted_here_names_what_converts_it(llama, tmp_path):
    copy = broken(llama, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    for change, match in (
        ({"architectures": ["PhiForCausalLM"]}, "PhiForCausalLM.*only LlamaForCausalLM.*convert_hf_to_gguf.py"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantised already"),
        ({"hidden_size": "big"}, "hidden_size is 'big'"),
    ):
        (copy / "config.json").write_text(json.dumps(config | change))
        refuse(copy, tmp_path, InputError, match)


def test_settings_that_llama_cpp_takes_for_granted_are_held_to_that(tmp_path):
    other = write_hf(tmp_path / "smollm3", "smollm3", no_rope_layers=[0, 1, 1, 0])
    refuse(other, tmp_path, InputError, r"no_rope_layers \[0, 1, 1, 0\], not converted here")
    refuse(write_hf(tmp_path / "granite", "granite", logits_scaling=0.0), tmp_path, InputError, "logits_scaling is 0.0")


def test_damaged_weights_are_found_before_anything_is_written(llama, tmp_path):
    copy = broken(llama, tmp_path)
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:-1000])
    refuse(copy, tmp_path, CorruptArtefact, "damaged or truncated")
    (copy / "model.safetensors").write_bytes(whole)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5, "intermediate_size": 64}))
    with pytest.raises(CorruptArtefact) as caught:
        export_gguf(copy, tmp_path / "refused", quants=["F16"])
    assert "layers.4.input_layernorm.weight is missing" in str(caught.value) and "more" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "error", "match"), [(np.nan, CorruptArtefact, "NaN"), (1e6, CorruptArtefact, "BF16")]
)
def test_nan_and_numbers_beyond_f16_leave_no_file(llama, tmp_path, value, error, match):
    from safetensors.torch import load_file, save_file

    copy = broken(llama, tmp_path)
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][5, 7] = value
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    for quant in ("F16", "Q4_0"):
        refuse(copy, tmp_path, error, match, quants=[quant])


def test_a_gguf_with_nan_or_cut_short_is_refused(tmp_path):
    source = write_gguf(tmp_path / "tiny.gguf", "qwen2")
    tensor = GGUFTensors(source).header.tensors["blk.1.ffn_up.weight"]
    data = bytearray(source.read_bytes())
    data[tensor.offset + 400 : tensor.offset + 404] = np.float32(np.nan).tobytes()
    source.write_bytes(data)
    refuse(source, tmp_path, CorruptArtefact, "NaN or infinity in blk.1.ffn_up.weight")
    source.write_bytes(data[:-5])
    refuse(source, tmp_path, ModelLoadError, "truncated")


def test_a_folder_in_use_no_room_and_an_unknown_type_are_refused(llama, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty .it holds mine.txt"):
        export_gguf(llama, tmp_path / "full")
    refuse(llama, tmp_path, InputError, "unknown type 'Q4'", quants=["Q4"])
    usage = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    refuse(llama, tmp_path, StorageError, "are needed, 1 MB are free; .*--out")


def test_a_quantiser_that_fails_says_why(tmp_path):
    source = tmp_path / "none.gguf"
    source.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(BackendError, match="could not quantise none.gguf to Q4_0: .{10}"):
        quantise(source, tmp_path / "out.gguf", "Q4_0", tell=lambda _done: None)


def test_ctrl_c_leaves_nothing_that_loads_and_the_next_run_starts_clean(tmp_path):
    """The process is stopped while a stage is under way; what is left, if anything, has a temporary name."""
    source, out = write_gguf(tmp_path / "tiny.gguf", "qwen2"), tmp_path / "out"
    code = (
        "import sys, time; from pathlib import Path; from edge_align_export.gguf_file import export_gguf\n"
        "def slow(stage, done):\n    print(stage, flush=True); time.sleep(0.5 if 'quantise' in stage else 0)\n"
        "export_gguf(Path(sys.argv[1]), Path(sys.argv[2]), quants=['Q8_0'], progress=slow)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for how in (signal.SIGINT, signal.SIGKILL):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(source), str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        ) as process:
            assert process.stdout is not None
            while "quantise" not in (line := process.stdout.readline()) and line:
                pass
            time.sleep(0.1)
            process.send_signal(how)
        assert process.returncode != 0
        assert [path.name for path in out.iterdir() if not path.name.startswith(".tmp-")] == []
    assert export_gguf(source, out, quants=["Q8_0"], threads=1)["files"][0]["file"] == "tiny-Q8_0.gguf"
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "tiny-Q8_0.gguf"]
