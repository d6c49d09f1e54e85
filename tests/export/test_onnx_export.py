"""Exported graphs compute what transformers computes, steering included; bad input is named and leaves nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.tiny_checkpoints import as_transformers_5, KINDS, make_checkpoint

from edge_align.config import RuntimeConfig
from edge_align.errors import (
    BackendUnavailable,
    CorruptArtefact,
    EdgeAlignError,
    InputError,
    ModelLoadError,
    StorageError,
)
from edge_align.onnx_files import read_export
from edge_align.records import SteeringVectors
from edge_align.runtime.onnx import OnnxBackend
from edge_align.runtime.onnx_session import library
from edge_align_export import onnx_export
from edge_align_export.onnx_export import export_onnx
from edge_align_export.onnx_weights import quantise_affine

ONE_THREAD = RuntimeConfig(n_threads=1, n_ctx=256)
TOKENS = np.random.default_rng(0).integers(0, 256, 40).tolist()


def random_vectors(n_layer: int, d_model: int, seed: int = 0, size: float = 1.0) -> SteeringVectors:
    array = np.random.default_rng(seed).normal(size=(n_layer, d_model)) * size
    array[0] = 0
    return SteeringVectors(array)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("tiny") / "qwen2")


def by_transformers(folder: Path, tokens: list[int], vectors: np.ndarray | None, start: int) -> np.ndarray:
    """Logits (T, n_vocab) of transformers' own model, vectors added to block outputs from position `start` on."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()

    def add(row: np.ndarray) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            states = states.clone()
            states[:, start:] += torch.from_numpy(np.array(row))
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return hook

    if vectors is not None:
        for layer, row in zip(model.model.layers, vectors, strict=True):
            layer.register_forward_hook(add(row))
    with torch.no_grad():
        return np.asarray(model(torch.tensor([tokens])).logits[0].numpy())


def by_the_graph(source: Path, out: Path) -> np.ndarray:
    """Logits after each of TOKENS but the last, (T - 1, n_vocab), of the fp32 export of `source`."""
    export_onnx(source, out, precision="fp32")
    with OnnxBackend.open(out, config=ONE_THREAD) as backend:
        (logits,) = backend.score(TOKENS[:1], [TOKENS[1:]], vectors=None)
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_graph_agrees_with_transformers(kind: str, tmp_path: Path) -> None:
    """Prefill, then one long and many single steps, past the sliding windows."""
    source = make_checkpoint(kind, tmp_path / kind)
    export_onnx(source, tmp_path / "out", precision="fp32")
    n_prompt = 21
    prompt, completion = TOKENS[:n_prompt], TOKENS[n_prompt:]
    with OnnxBackend.open(tmp_path / "out", config=ONE_THREAD) as backend:
        vectors = random_vectors(backend.info.n_layer, backend.info.d_model)
        for steering in (None, vectors):
            array = None if steering is None else steering.array
            expected = by_transformers(source, TOKENS, array, n_prompt - 1)[n_prompt - 1 : -1]
            (together,) = backend.score(prompt, [completion], vectors=steering)
            assert np.abs(together - expected).max() <= 1e-3
        row, singly = backend._row, []
        assert row is not None
        for i, token in enumerate([prompt[-1], *completion[:-1]]):
            row.ask(token, n_prompt - 1 + i, vectors.array[None])
            singly.append(row.logits())
    assert np.abs(np.array(singly) - expected).max() <= 1e-3


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-2}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "rope_theta": 500.0}),
        ("mistral", {"sliding_window": None, "head_dim": 32}),
        ("qwen2", {"rope_theta": 1e6, "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 8}),
        ("qwen3", {"attention_bias": True, "head_dim": 32, "num_key_value_heads": 4}),
        ("smollm3", {"no_rope_layers": [0, 1, 1, 0]}),
        ("smollm3", {"no_rope_layer_interval": 2, "attention_bias": True}),
        ("granite", {"tie_word_embeddings": False, "attention_bias": False}),
        ("gemma", {"attention_bias": True}),
        ("gemma3_text", {"query_pre_attn_scalar": 64, "tie_word_embeddings": False, "rope_local_base_freq": 500.0}),
        ("gemma3_text", {"layer_types": ["full_attention"] + ["sliding_attention"] * 3}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("gemma3_text", {"final_logit_softcapping": 3.0}),
        ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
    ],
)
def test_settings_mean_what_they_mean_to_transformers(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    source = make_checkpoint(kind, tmp_path / kind, **settings)
    got = by_the_graph(source, tmp_path / "out")
    assert np.abs(got - by_transformers(source, TOKENS, None, 0)[:-1]).max() <= 1e-3


@pytest.mark.parametrize(
    ("kind", "settings", "match"),
    [
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 3.0}}, "rotary scaling 'yarn'"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "qwen2 models with a sliding window"),
        ("gemma3_text", {"attn_logit_softcapping": 3.0}, "attn_logit_softcapping"),  # transformers passes it over
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_what_the_graph_does_not_compute_is_refused_by_name(
    kind: str, settings: dict[str, Any], match: str, tmp_path: Path
) -> None:
    source = make_checkpoint(kind, tmp_path / kind, **settings)
    refused(source, tmp_path / "out", BackendUnavailable, match)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_transformers_5_gives_the_same_graph(kind: str, tmp_path: Path) -> None:
    """It spells rotary settings otherwise; read as the older ones, they would be passed over without a word."""
    source = make_checkpoint(kind, tmp_path / kind)
    expected = by_transformers(source, TOKENS, None, 0)[:-1]
    as_transformers_5(source)
    got = by_the_graph(source, tmp_path / "out")
    assert np.abs(got - expected).max() <= 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")  # of PyTorch's tracer
def test_an_exported_graph_agrees_with_the_one_that_optimum_traces(kind: str, tmp_path: Path) -> None:
    """Two exporters that share nothing, one ONNX Runtime."""
    from optimum.exporters.onnx import main_export

    # its traces leave out the bound on Gemma 2's scores (optimum-onnx 0.1.0)
    settings = {"attn_logit_softcapping": None} if kind == "gemma2" else {}
    source = make_checkpoint(kind, tmp_path / kind, **settings)
    main_export(
        source,
        output=tmp_path / "traced",
        task="text-generation",
        library_name="transformers",
        no_post_process=True,
        do_validation=False,
    )
    session = library().InferenceSession(str(tmp_path / "traced" / "model.onnx"), providers=["CPUExecutionProvider"])
    tokens = np.array([TOKENS])
    given = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "position_ids": np.arange(len(TOKENS))[None]}
    (expected,) = session.run(["logits"], {one.name: given[one.name] for one in session.get_inputs()})
    got = by_the_graph(source, tmp_path / "out")
    assert np.abs(got - expected[0, :-1]).max() <= 1e-4


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.05), ("int8", 0.4), ("int4", 4.0)])
def test_lower_precisions_stay_near_the_full_one(
    checkpoint: Path, tmp_path: Path, precision: str, tolerance: float
) -> None:
    """Random weights are the worst case for four bits; the base's own figures stand in the decision note."""
    export_onnx(checkpoint, tmp_path / "out", precision=precision)
    expected = by_transformers(checkpoint, TOKENS, None, 0)
    with OnnxBackend.open(tmp_path / "out", config=ONE_THREAD) as backend:
        (got,) = backend.score(TOKENS[:1], [TOKENS[1:]], vectors=None)
        assert np.abs(got - expected[:-1]).max() <= tolerance
        assert read_export(tmp_path / "out").precision == precision


def naive_product(packed: np.ndarray, scales: np.ndarray, zeros: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What MatMulNBits computes, written out: (level - zero point) * scale, times x and the means of its blocks."""
    n, blocks, _ = packed.shape
    out = np.zeros(n)
    wide = np.concatenate([x, x.reshape(-1, 32).mean(1)])
    wide = np.pad(wide, (0, blocks * 32 - len(wide)))
    for row in range(n):
        for block in range(blocks):
            zero = zeros[row, block // 2] >> (4 * (block % 2)) & 15
            for i in range(32):
                level = packed[row, block, i // 2] >> (4 * (i % 2)) & 15
                out[row] += (float(level) - float(zero)) * scales[row, block] * wide[block * 32 + i]
    return out


def test_a_matrix_on_a_grid_of_16_levels_survives_four_bits_whatever_its_offsets() -> None:
    """Q4_1's own grid: level * step + offset. Plain zero points alone leave over ten times the error."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 16, (6, 3, 32))
    levels[..., 0], levels[..., 1] = 0, 15
    step, offset = rng.uniform(0.01, 0.03, (6, 3, 1)), rng.uniform(-0.3, -0.1, (6, 3, 1))
    matrix = (levels * step + offset).reshape(6, 96).astype(np.float32)
    x = rng.normal(size=96) + 0.5
    error = naive_product(*quantise_affine(matrix), x) - matrix @ x
    rounded = (np.rint(offset / step) * step - offset).repeat(32, -1).reshape(6, 96) @ x
    assert np.abs(error).max() < 0.05  # the offsets' own steps are a fifteenth of a weight's
    assert np.sqrt((error**2).mean()) < np.sqrt((rounded**2).mean()) / 10


def test_four_bits_are_fitted_to_a_block_and_not_just_spread_over_its_range() -> None:
    """A tenth less squared error than exact even steps from smallest to largest have; blocks of one value stay."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(16, 96)).astype(np.float32)
    matrix[0], matrix[1, :32] = 0.25, 0.0
    packed = quantise_affine(matrix)
    got = np.stack([naive_product(*packed, x) for x in np.eye(96)], axis=1)
    blocks = matrix.reshape(16, 3, 32).astype(np.float64)
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    step = np.maximum(high - low, 1e-12) / 15
    spread = (low + np.rint((blocks - low) / step) * step).reshape(16, 96)
    assert np.square(got - matrix).sum() < 0.9 * np.square(spread - matrix).sum()
    assert np.abs(got[0] - 0.25).max() < 0.02 and np.abs(got[1, :32]).max() < 0.02


# -- bad input -----------------------------------------------------------------------------------------------------
def refused(source: Path, out: Path, error: type[EdgeAlignError], match: str, precision: str = "fp32") -> None:
    with pytest.raises(error, match=match):
        export_onnx(source, out, precision=precision)
    assert not out.exists() or not any(out.iterdir())


def changed(checkpoint: Path, tmp_path: Path, **values: Any) -> Path:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | values))
    return Path(copy)


def test_an_export_is_readable_by_its_owner_alone(checkpoint: Path, tmp_path: Path) -> None:
    export_onnx(checkpoint, tmp_path / "out", precision="int8")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert "model.onnx.data" in modes and set(modes.values()) == {0o600}


def test_an_unknown_architecture_is_named_with_those_that_can_be_exported(checkpoint: Path, tmp_path: Path) -> None:
    source = changed(checkpoint, tmp_path, model_type="mamba")
    refused(source, tmp_path / "out", BackendUnavailable, "'mamba' cannot be exported; these can: llama")


def test_a_missing_tokenizer_weight_or_config_is_named(checkpoint: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path / "out", InputError, "neither a GGUF file nor a folder")
    source = changed(checkpoint, tmp_path, num_hidden_layers=6)
    refused(source, tmp_path / "out", ModelLoadError, "has no weight for 4")
    (source / "tokenizer.json").unlink()
    refused(source, tmp_path / "out", ModelLoadError, "has no tokenizer.json")
    (source / "config.json").unlink()
    refused(source, tmp_path / "out", InputError, "has no config.json")


def test_truncated_weights_and_nan_are_found(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    source = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = np.nan
    save_file(tensors, path)
    refused(source, tmp_path / "out", ModelLoadError, "1.up holds NaN")
    path.write_bytes(path.read_bytes()[:5000])
    refused(source, tmp_path / "out", ModelLoadError, "damaged or truncated")


def test_a_truncated_gguf_is_refused(base_path: Path, tmp_path: Path) -> None:
    (tmp_path / "half.gguf").write_bytes(base_path.read_bytes()[: 50 << 20])
    refused(tmp_path / "half.gguf", tmp_path / "out", ModelLoadError, "truncated")


def test_a_folder_with_files_a_file_and_an_unknown_precision_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(InputError, match="is not empty"):
        export_onnx(checkpoint, tmp_path / "full")
    with pytest.raises(InputError, match="is a file"):
        export_onnx(checkpoint, tmp_path / "full" / "mine")
    with pytest.raises(InputError, match="unknown precision 'int3'"):
        export_onnx(checkpoint, tmp_path / "out", precision="int3")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_too_little_disk_is_found_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(onnx_export.shutil, "disk_usage", lambda _path: usage)
    refused(checkpoint, tmp_path / "out", StorageError, "make room")


def test_an_interrupted_export_leaves_nothing_that_loads_and_does_not_stop_the_next(
    checkpoint: Path, tmp_path: Path
) -> None:
    def stop(stage: str, done: float) -> None:
        if (stage, done) == ("seal", 0.0):  # everything but the manifest is written
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        export_onnx(checkpoint, out, precision="int4", progress=stop)
    assert not out.exists()
    with pytest.raises(CorruptArtefact, match="is missing"):
        read_export(tmp_path / "out.partial")
    export_onnx(checkpoint, out, precision="int4")
    assert read_export(out).n_layer == 4 and not (tmp_path / "out.partial").exists()


def test_every_damage_to_an_export_is_listed_at_once(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_onnx(checkpoint, out)
    (out / "chat_template.jinja").unlink()
    weights = out / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CorruptArtefact, match="chat_template.jinja is missing; the content of model.onnx.data is not"):
        read_export(out)


def resealed(out: Path, **changes: Any) -> None:
    """Give a changed export a manifest that its files fit again."""
    from edge_align.files import sha256_file

    manifest = json.loads((out / "manifest.json").read_text()) | changes
    for name, entry in manifest["files"].items():
        entry |= {"sha256": sha256_file(out / name), "bytes": (out / name).stat().st_size}
    (out / "manifest.json").write_text(json.dumps(manifest))


def test_a_graph_without_a_steering_input_or_of_other_sizes_is_named_as_such(checkpoint: Path, tmp_path: Path) -> None:
    import onnx

    out = tmp_path / "out"
    export_onnx(checkpoint, out, precision="fp32")
    resealed(out, n_head_kv=4)
    with pytest.raises(ModelLoadError, match="takes past.0.key of sizes"):
        OnnxBackend.open(out)
    graph = onnx.load(out / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        node.input[:] = ["other" if name == "steering" else name for name in node.input]
    for value in graph.graph.input:
        value.name = "other" if value.name == "steering" else value.name
    onnx.save(graph, out / "model.onnx")
    resealed(out)
    with pytest.raises(ModelLoadError, match="has no steering input"):
        OnnxBackend.open(out)
