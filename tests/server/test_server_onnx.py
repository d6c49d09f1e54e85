"""The server on an ONNX export: profiles side by side, what it refuses, and which engine the command takes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_server import Live, serving
from reference.tiny_checkpoints import make_checkpoint

from edge_align.bases import find_base
from edge_align.config import RuntimeConfig, SamplingConfig
from edge_align.home import Home
from edge_align.profiles import ProfileStore
from edge_align.records import join_chunks, SteeringVectors, user_prompt

pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
pytest.importorskip("transformers", reason="needs the extra `export`")

from edge_align.runtime.onnx import OnnxBackend  # noqa: E402
from edge_align_export.onnx_export import export_onnx  # noqa: E402

ONE_THREAD = RuntimeConfig(n_threads=1, n_ctx=256)
QUESTION = "How do boats float?"


def vectors_of(seed: int, n_layer: int, d_model: int) -> np.ndarray:
    array = np.random.default_rng(seed).normal(size=(n_layer, d_model)).astype(np.float32) * 1.5
    array[0] = 0
    return array


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    export_onnx(make_checkpoint("llama", folder / "tiny"), folder / "export", precision="fp32")
    return folder / "export"


@pytest.fixture(scope="module")
def live(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The profiles ann and bob are vectors, which need no pack."""
    home = Home(tmp_path_factory.mktemp("served") / "home")
    base, store = find_base(str(export)), ProfileStore(home)
    for seed, name in enumerate(("ann", "bob")):
        tensors = {"vectors": vectors_of(seed, base.n_layer, base.d_model), "scale": np.ones(1, np.float32)}
        manifest = {"form": "vectors", "base": base.id, "base_hash": base.hash}
        manifest |= {"n_layer": base.n_layer, "d_model": base.d_model, "kl_budget": 0.4, "predicted_kl": 0.3}
        store.activate(name, store.save(name, tensors, manifest).number)
    with serving(home, model=str(export), runtime=ONE_THREAD) as served:
        yield served


def ask(live: Live, profile: str | None, **more: Any) -> Any:
    steering = {"enabled": False} if profile is None else {"profile": profile}
    reply = live.chat(QUESTION, model=live.service.model_id, temperature=0, steering=steering, **more)
    assert reply.status == 200, reply.data
    return reply.json


def test_profiles_are_answered_side_by_side_as_each_alone(live: Live, export: Path) -> None:
    expected = {}
    with OnnxBackend.open(export, config=ONE_THREAD) as backend:
        prompt = backend.render(user_prompt(QUESTION))
        for seed, name in ((None, None), (0, "ann"), (1, "bob")):
            array = None if seed is None else vectors_of(seed, backend.info.n_layer, backend.info.d_model)
            answer = backend.generate(
                prompt,
                vectors=None if array is None else SteeringVectors(array),
                sampling=SamplingConfig(temperature=0.0, max_tokens=24),
            )
            expected[name] = join_chunks(list(answer)).text
    assert len(set(expected.values())) == 3
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda name: (name, ask(live, name)), [*expected, *expected]))
    for name, reply in found:
        assert reply["choices"][0]["message"]["content"] == expected[name]
    slots = [slot.backend for slot in live.service.decoder._slots]
    assert len(slots) > 1 and len({id(backend._row.rows) for backend in slots}) == 1  # decoded in one batch


def test_what_the_engine_cannot_do_is_refused_by_name(live: Live) -> None:
    reply = live.ask("POST", "/v1/embeddings", {"input": "a", "model": live.service.model_id})
    assert reply.status == 400 and "makes no embeddings" in reply.json["error"]["message"]
    reply = live.chat(QUESTION, model=live.service.model_id, logprobs=True)
    assert reply.status == 400 and "logprobs" in reply.json["error"]["message"]
