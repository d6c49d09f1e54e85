"""Bases that are no Llama, through llama.cpp alone: pack, personalize, generate, eval (weights from tiny_models.py)."""

from pathlib import Path

import numpy as np
import pytest
from reference.small_pack import SMALL
from reference.verdicts import TOPICS, write

from edge_align.assistant import Assistant
from edge_align.bases import find_base
from edge_align.config import PersonalizeConfig, RuntimeConfig, SamplingConfig
from edge_align.features import N_BLOCKS, NativeAnswerEncoder, open_encoder, pool
from edge_align.home import Home
from edge_align.personalize import evaluate, personalize, Source
from edge_align.records import user_prompt
from edge_align.registry import find_pack
from edge_align.runtime.activations import ActivationReader
from edge_align_export.pack import build_pack
from scripts.tiny_models import LAYERS, WIDTH, write_gguf

ONE = RuntimeConfig(n_threads=1, n_ctx=256)


@pytest.fixture(scope="module", params=["qwen2", "gemma"])
def base(request, tmp_path_factory) -> tuple[str, Home]:
    """(path of the GGUF, a home with its pack)."""
    place = tmp_path_factory.mktemp(request.param)
    model = str(write_gguf(place / f"{request.param}.gguf", request.param))
    home = Home(place / "home")
    report = build_pack(home=home, model=model, fast=True, runtime=ONE, config=SMALL)
    assert report["k"] == 12 and all(np.isfinite(value) for value in report["health"].values())
    return model, home


def test_answers_are_encoded_by_llama_cpp_as_its_own_hidden_states_say(base):
    model, _ = base
    encoder = open_encoder(Path(model))
    assert isinstance(encoder, NativeAnswerEncoder)
    answers = [[5, 6, 7], [40, 41, 42, 43, 44]]
    found = encoder.encode(answers)
    encoder.close()
    with ActivationReader.open(model, config=ONE) as reader:
        wanted = [pool(list(reader.hidden(answer, range(N_BLOCKS)))) for answer in answers]
    assert found.shape == (2, (N_BLOCKS + 1) * WIDTH + 1)
    assert np.abs(found - np.stack(wanted)).max() < 1e-4


def test_a_person_is_learnt_and_answers_change_with_strength(base, tmp_path):
    model, home = base
    feedback = write(tmp_path / "clear.jsonl", TOPICS[:24])
    report = personalize(
        home=home,
        sources=[Source("clear", feedback)],
        model=model,
        runtime=ONE,
        config=PersonalizeConfig(force=True),
    )
    assert report.activated and report.scale and report.heldout["accuracy"] > 0.7  # two styles, told apart by letters
    pack = find_pack(find_base(model, home=home), home)
    assert (pack.n_layer, pack.d_model) == (LAYERS, WIDTH) and not pack.decoder[:, 0].any()
    greedy = SamplingConfig(max_tokens=12, temperature=0.0)
    with Assistant.open(home=home, model=model, runtime=ONE) as assistant:
        question = user_prompt("How do boats float?")
        base_answer = assistant.answer(question, sampling=greedy, steered=False).tokens
        assert assistant.answer(question, sampling=greedy, strength=0.0).tokens == base_answer
        prompt = assistant.backend.render(question)
        (plain,) = assistant.backend.score(prompt, [[0]], vectors=None)
        moved = [
            np.abs(
                assistant.backend.score(prompt, [[0]], vectors=assistant.vectors(question, strength=s))[0] - plain
            ).max()
            for s in (1.0, 2.0)
        ]
    assert 1e-3 < moved[0] < moved[1]
    again = evaluate(home=home, sources=[Source("clear", write(tmp_path / "new.jsonl", TOPICS[24:]))], model=model)
    assert again["heldout"]["accuracy"] > 0.7
