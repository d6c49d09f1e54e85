"""What PyTorch does not compute here goes through transformers: the same logits and slopes, recipes score and clap."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from reference.small_pack import SMALL
from reference.tiny_checkpoints import make_checkpoint

from edge_align.config import RuntimeConfig
from edge_align.errors import BackendUnavailable, CorruptArtefact
from edge_align.home import Home
from edge_align.records import SteeringVectors
from edge_align.runtime.llamacpp import LlamaCppBackend
from edge_align.runtime.onnx import OnnxBackend
from edge_align.runtime.torch_ref import LlamaReference
from edge_align_export.clap import ClapConfig
from edge_align_export.clap_loss import freeze, FrozenDecoder, HookedDecoder, make_batch
from edge_align_export.hooked import HookedModel
from edge_align_export.onnx_export import export_onnx
from edge_align_export.pack import build_pack
from scripts.tiny_models import LAYERS, WIDTH, write_gguf

ONE = RuntimeConfig(n_threads=1, n_ctx=256)
STEERED = range(1, 3)
PROMPTS, ANSWERS = [[5, 6, 7, 8], [40, 41], [9, 10, 11]], [[12, 13, 14], [42, 43, 44, 45, 46], [20]]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("qwen") / "qwen.gguf", "qwen2")


def vectors(seed: int, rows: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, len(STEERED), WIDTH)) * 0.3).float()


def batch():
    return make_batch(PROMPTS, ANSWERS, torch.zeros(3, 1), n=3)


def test_answers_cost_what_they_cost_in_llama_cpp_each_under_its_own_vectors(qwen):
    """llama.cpp keeps its cache in half precision: within .01 nats of some fifteen."""
    added = vectors(0, 3)
    frozen = freeze(HookedModel.open(qwen), batch(), STEERED)
    assert isinstance(frozen, HookedDecoder) and frozen.n_tokens.tolist() == [3, 5, 1]
    for given in (None, added):
        found = frozen.nll(given).detach().numpy()
        with LlamaCppBackend.open(qwen, config=ONE) as backend:
            for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
                array = np.zeros((LAYERS, WIDTH), np.float32)
                if given is not None:
                    array[list(STEERED)] = added[i].numpy()
                logits = backend.score(prompt, [answer], vectors=SteeringVectors(array))[0].astype(np.float64)
                wanted = sum(np.log(np.exp(row).sum()) - row[token] for row, token in zip(logits, answer, strict=True))
                assert found[i] == pytest.approx(wanted, abs=0.01)


def test_a_llama_has_the_same_costs_and_slopes_as_in_our_own_reference(tmp_path):
    path = write_gguf(tmp_path / "llama.gguf", "llama")
    found = []
    for model in (LlamaReference(path), HookedModel.open(path)):
        added = vectors(1, 3).requires_grad_()
        frozen = freeze(model, batch(), STEERED)
        assert isinstance(frozen, FrozenDecoder) == isinstance(model, LlamaReference)
        nll = frozen.nll(added)
        (slope,) = torch.autograd.grad(nll.sum(), added)
        found.append((nll.detach().numpy(), slope.numpy()))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-4)
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-4)
    assert np.abs(found[0][1]).max() > 0.1


def test_attention_whose_scores_are_bounded_is_computed_with_the_bound(tmp_path):
    """transformers' usual attention leaves Gemma 2's out; ONNX Runtime's own operator has it."""
    folder = make_checkpoint("gemma2", tmp_path / "gemma2")
    export_onnx(folder, tmp_path / "out", precision="fp32")
    with OnnxBackend.open(tmp_path / "out", config=ONE) as backend:
        (wanted,) = backend.score(PROMPTS[0], [ANSWERS[1]], vectors=None)
    got = HookedModel.open(folder).score(PROMPTS[0], ANSWERS[1])
    np.testing.assert_allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize("recipe", ["score", "clap"])
def test_recipes_that_need_gradients_make_a_pack_of_a_base_that_is_no_llama(qwen, tmp_path, recipe):
    clap = ClapConfig(steps=2, prompts=1) if recipe == "clap" else None
    report = build_pack(
        home=Home(tmp_path), model=str(qwen), recipe=recipe, fast=True, runtime=ONE, config=SMALL, clap=clap
    )
    assert report["k"] == 12
    assert {"nll_none", "nll_own_latent", "loop_gain"} <= report["health"].keys()
    assert all(np.isfinite(value) for value in report["health"].values())


def test_a_file_that_lacks_a_weight_is_refused_rather_than_filled_in_by_chance(qwen, tmp_path):
    reader = gguf.GGUFReader(qwen)
    writer = gguf.GGUFWriter(tmp_path / "less.gguf", "qwen2")
    for name, one in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, *inner = one.types
            if kind == gguf.GGUFValueType.ARRAY:
                writer.add_array(name, one.contents())
            else:
                writer.add_key_value(name, one.contents(), kind)
    for tensor in reader.tensors:
        if tensor.name != "blk.2.ffn_up.weight":
            writer.add_tensor(tensor.name, tensor.data)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(CorruptArtefact, match=r"no weight for .*layers\.2\.mlp\.up_proj"):
        HookedModel.open(tmp_path / "less.gguf")
    with pytest.raises(BackendUnavailable, match="not supported"):
        HookedModel.open(write_gguf(tmp_path / "gemma.gguf", "gemma"))
