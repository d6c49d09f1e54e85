"""Profiles to and from control vectors, on the real base with a tiny pack."""

import ctypes

import numpy as np
import pytest
from reference import naive_control_vector as naive

from edge_align.assistant import Assistant
from edge_align.bases import find_base
from edge_align.config import RuntimeConfig, SamplingConfig
from edge_align.encoder import PreferenceEncoder
from edge_align.errors import IncompatibleBase, InputError
from edge_align.exchange import export_control_vector, import_control_vector
from edge_align.home import Home
from edge_align.kl import measured_kl, sampled_probe
from edge_align.personalize import evaluate
from edge_align.profiles import ProfileStore
from edge_align.records import SteeringVectors, user_prompt
from edge_align.registry import find_pack
from edge_align.runtime.llama_native import NativeContext

ONE = RuntimeConfig(n_threads=1, n_ctx=512)


@pytest.fixture
def home(toy_home) -> Home:
    """Profile `me`, constant, and `turning`, which depends on the prompt; `me` is in use."""
    base = find_base(home=toy_home)
    pack = find_pack(base, toy_home)
    rng = np.random.default_rng(0)
    mean = rng.normal(size=pack.k).astype(np.float32)
    store = ProfileStore(toy_home)
    p = pack.prompt_projection.shape[1]
    head = {"head_in": rng.normal(size=(1, p)).astype(np.float32), "head_out": np.ones((pack.k, 1), np.float32)}
    for name, more in (("me", {}), ("turning", head)):
        tensors = {"mean": mean, "scale": np.array([pack.scale_for(mean[None], 0.3)], np.float32)} | more
        manifest = {
            "base_hash": base.hash,
            "pack_hash": pack.hash,
            "n_layer": pack.n_layer,
            "d_model": pack.d_model,
            "k": pack.k,
        }
        store.activate(name, store.save(name, tensors, manifest).number)
    store.use("me")
    return toy_home


def logits_with_buffer(backend, prompt: list[int], n_embd: int, data: np.ndarray) -> np.ndarray:
    """The prompt but its last token unsteered, then the last one under a buffer set through the C API alone."""
    context = NativeContext(backend._model, n_ctx=512, n_batch=64, n_threads=1)
    try:
        context.decode_span(np.array(prompt[:-1], np.int32), 0)
        n_layer = backend.info.n_layer
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        code = context.C.llama_set_adapter_cvec(context.pointer, pointer, len(data), n_embd, 1, n_layer - 1)
        assert code == 0
        context.decode_span(np.array(prompt[-1:], np.int32), len(prompt) - 1, outputs=True)
        return context.logits(1)[0]
    finally:
        context.close()


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_an_exported_profile_gives_llama_cpp_the_logits_of_our_own_steering(home, backend, tmp_path, strength):
    path = tmp_path / "me.gguf"
    document = export_control_vector(path, home=home, strength=strength)
    assert (document["profile"], document["version"], document["mean_over_prompts"]) == ("me", 1, False)
    prompt = backend.render(user_prompt("Why is the sky blue?"))
    with Assistant.open(home=home, runtime=ONE) as assistant:
        vectors = assistant.vectors(user_prompt("Why is the sky blue?"), strength=strength)
    (ours,) = backend.score(prompt, [[0]], vectors=vectors)
    (base,) = backend.score(prompt, [[0]], vectors=None)
    theirs = logits_with_buffer(backend, prompt, *naive.load(path))
    assert np.abs(ours[0] - base[0]).max() > 0.1
    assert np.abs(theirs - ours[0]).max() < 1e-3  # two contexts, other batch sizes
    pack = find_pack(find_base(home=home), home)
    tensors, _ = ProfileStore(home).load("me")
    z = PreferenceEncoder.from_tensors(tensors).latent() * strength
    assert document["predicted_kl"] == pytest.approx(pack.predicted_kl(z), rel=1e-6)


def test_a_profile_that_depends_on_the_prompt_is_written_as_its_mean_and_says_so(home, tmp_path):
    constant = export_control_vector(tmp_path / "a.gguf", home=home, profile="me")
    turning = export_control_vector(tmp_path / "b.gguf", home=home, profile="turning")
    assert not constant["mean_over_prompts"] and turning["mean_over_prompts"]
    assert naive.load(tmp_path / "a.gguf")[1].tolist() == naive.load(tmp_path / "b.gguf")[1].tolist()


def test_an_exported_profile_comes_back_as_the_same_steering(home, tmp_path):
    export_control_vector(tmp_path / "me.gguf", home=home, strength=0.5)
    document = import_control_vector(tmp_path / "me.gguf", "back", home=home, runtime=ONE)
    assert (document["scale"], document["notes"]) == (1.0, [])  # under the budget: kept as it is
    ProfileStore(home).activate("back", document["version"])
    question = user_prompt("How do boats float?")
    with Assistant.open(home=home, profile="me", runtime=ONE) as assistant:
        ours = assistant.vectors(question, strength=0.5)
        assistant.set_profile("back")
        back = assistant.vectors(question)
        assert assistant.profile.encoder is None and assistant.profile.predicted_kl > 0
        greedy = SamplingConfig(max_tokens=8, temperature=0)
        steered = assistant.answer(question, sampling=greedy)
        assistant.set_profile("me")
        assert assistant.answer(question, sampling=greedy, strength=0.5).tokens == steered.tokens
    assert np.abs(back.array - ours.array).max() < 1e-7


def test_a_loud_file_is_scaled_down_to_the_budget_and_needs_no_pack(backend, base_path, tmp_path):
    home = Home(tmp_path / "bare")  # no pack of any kind but the shipped one, which is not asked for
    rng = np.random.default_rng(1)
    rows = {str(layer): rng.normal(size=576).astype(np.float32) for layer in range(8, 16)}
    path = naive.write(tmp_path / "loud.gguf", rows, model_hint="mistral")
    document = import_control_vector(path, "loud", home=home, kl_budget=0.2, runtime=ONE)
    assert document["scale"] < 1.0 and document["predicted_kl"] == pytest.approx(0.2, rel=0.021)
    assert len(document["notes"]) == 2 and "mistral" in document["notes"][0]
    array = np.zeros((30, 576), np.float32)
    for layer, row in rows.items():
        array[int(layer)] = row * np.float32(document["scale"])
    measured = measured_kl(backend, sampled_probe(backend, seed=5), SteeringVectors(array))
    assert 0.1 < measured < 0.4  # other answers of the base, the same order of KL
    store = ProfileStore(home)
    store.activate("loud", document["version"])
    store.use("loud")
    with Assistant.open(home=home, runtime=ONE) as assistant:
        assert np.abs(assistant.vectors(user_prompt("Why?")).array - array).max() < 1e-6


def test_a_control_vector_is_taken_by_an_onnx_export_and_measured_there(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
    from reference.tiny_checkpoints import make_checkpoint

    from edge_align.runtime.onnx import OnnxBackend
    from edge_align_export.onnx_export import export_onnx

    export_onnx(make_checkpoint("llama", tmp_path / "tiny"), tmp_path / "export", precision="fp32")
    base = find_base(str(tmp_path / "export"))
    array = np.zeros((base.n_layer, base.d_model), np.float32)
    array[1:] = np.random.default_rng(2).normal(size=array[1:].shape) * 4
    path = naive.write(tmp_path / "loud.gguf", {str(i): array[i] for i in range(1, base.n_layer)}, model_hint="llama")
    home = Home(tmp_path / "home")
    document = import_control_vector(path, "loud", home=home, model=str(base.path), kl_budget=0.05, runtime=ONE)
    assert document["scale"] < 1.0 and document["predicted_kl"] == pytest.approx(0.05, rel=0.021)
    with OnnxBackend.open(base.path, config=ONE) as backend:
        measured = measured_kl(backend, sampled_probe(backend), SteeringVectors(array * document["scale"]))
    assert measured == pytest.approx(document["predicted_kl"], rel=1e-3)


def test_imported_vectors_judge_no_answers(home, tmp_path):
    export_control_vector(tmp_path / "me.gguf", home=home)
    document = import_control_vector(tmp_path / "me.gguf", "raw", home=home, runtime=ONE)
    ProfileStore(home).activate("raw", document["version"])
    with pytest.raises(InputError, match="not a latent that could judge"):
        evaluate(home=home, sources=[], profile="raw")


def test_a_vector_of_another_base_is_refused_by_its_hash(home, tmp_path):
    from edge_align.control_vector import write_control_vector

    array = np.zeros((30, 576), np.float32)
    array[9] = 1
    path = tmp_path / "other.gguf"
    write_control_vector(path, SteeringVectors(array), architecture="llama", facts={"base_hash": "sha256:" + "0" * 64})
    with pytest.raises(IncompatibleBase, match="made for base sha256:0000"):
        import_control_vector(path, "other", home=home)


def test_an_existing_file_is_replaced_only_when_told(home, tmp_path):
    path = tmp_path / "me.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="exists"):
        export_control_vector(path, home=home)
    assert path.read_bytes() == b"mine"
    export_control_vector(path, home=home, overwrite=True)
    assert path.read_bytes()[:4] == b"GGUF"
    with pytest.raises(InputError, match="nothing to write"):
        export_control_vector(tmp_path / "zero.gguf", home=home, strength=0.0)
