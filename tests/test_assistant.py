"""The assistant on the real base: when it is the base, when it is personal, and how it learns."""

import shutil

import numpy as np
import pytest
from reference.verdicts import TOPICS, verdict, write

from edge_align.assistant import Assistant
from edge_align.config import RuntimeConfig, SamplingConfig
from edge_align.errors import CorruptArtefact, IncompatibleBase, InputError, SessionClosed
from edge_align.home import Home
from edge_align.personalize import personalize, Source
from edge_align.profiles import ProfileStore
from edge_align.records import Message, user_prompt
from edge_align.store import FeedbackLog

ONE = RuntimeConfig(n_threads=1, n_ctx=512)
GREEDY = SamplingConfig(temperature=0.0, max_tokens=10)
SEEDED = SamplingConfig(max_tokens=10, seed=3)
QUESTION = "How do boats float?"


@pytest.fixture(scope="module")
def learnt(built, tmp_path_factory) -> Home:
    home = Home(tmp_path_factory.mktemp("assistant") / "home")
    shutil.copytree(built[0].packs_dir, home.packs_dir)
    clear = write(home.root.parent / "clear.jsonl", TOPICS[:24])
    assert personalize(home=home, sources=[Source("clear", clear)], runtime=ONE).activated
    return home


@pytest.fixture(scope="module")
def assistant(learnt):
    """Read-only use: tests that log or save take `own`."""
    with Assistant.open(home=learnt, runtime=ONE) as assistant:
        yield assistant


@pytest.fixture
def own(learnt, tmp_path) -> Home:
    shutil.copytree(learnt.root, tmp_path / "own")
    return Home(tmp_path / "own")


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_no_profile_strength_zero_and_unsteered_are_the_base_token_for_token(learnt, assistant, sampling):
    with Assistant.open(home=learnt, runtime=ONE, use_profile=False) as plain:
        assert plain.profile is None
        base = plain.answer(QUESTION, sampling=sampling).tokens
    assert len(base) == 10
    assert assistant.answer(QUESTION, sampling=sampling, strength=0.0).tokens == base
    assert assistant.answer(QUESTION, sampling=sampling, steered=False).tokens == base
    personal = assistant.answer(QUESTION, sampling=sampling, strength=3.0).tokens
    assert personal != base
    assert assistant.answer(QUESTION, sampling=sampling, steered=False).tokens == base  # nothing personal stays behind
    assert assistant.answer(QUESTION, sampling=sampling, strength=3.0).tokens == personal


def test_a_profile_can_be_put_down_and_taken_up_between_answers(assistant):
    loaded = assistant.profile
    assert (loaded.name, loaded.version, loaded.note) == ("default", 1, None)
    assert loaded.scale > 0 and loaded.predicted_kl > 0
    personal = assistant.answer(QUESTION, sampling=GREEDY, strength=3.0).tokens
    base = assistant.answer(QUESTION, sampling=GREEDY, steered=False).tokens
    assistant.set_profile(None)
    assert assistant.vectors(user_prompt(QUESTION)) is None
    assert assistant.answer(QUESTION, sampling=GREEDY, strength=3.0).tokens == base
    assistant.set_profile("default")
    assert assistant.answer(QUESTION, sampling=GREEDY, strength=3.0).tokens == personal


def test_strength_multiplies_the_calibrated_vectors(assistant):
    one, half = (assistant.vectors(user_prompt(QUESTION), strength=s).array for s in (1.0, -0.5))
    np.testing.assert_allclose(half, -0.5 * one, rtol=1e-6)
    for wrong in (5.0, float("nan")):
        with pytest.raises(InputError, match="strength"):
            assistant.answer(QUESTION, strength=wrong)


def test_a_stream_is_the_answer_piece_by_piece(assistant):
    chunks = list(assistant.stream(QUESTION, sampling=SEEDED))
    whole = assistant.answer(QUESTION, sampling=SEEDED)
    assert "".join(chunk.text for chunk in chunks) == whole.text and len(chunks) > 2
    assert chunks[-1].finish_reason == "length" and whole.stats.completion_tokens == 10


def test_empty_questions_and_unknown_profiles_are_refused_and_change_nothing(assistant, learnt):
    for prompt in ("  ", (), (Message("user", " "),)):
        with pytest.raises(InputError, match="empty"):
            assistant.answer(prompt)
    with pytest.raises(InputError, match="unknown profile nobody"):
        assistant.set_profile("nobody")
    assert assistant.profile.name == "default"
    with pytest.raises(InputError, match="unknown profile"):
        Assistant.open(home=learnt, profile="nobody", runtime=ONE)


def test_a_closed_assistant_answers_no_more(learnt):
    assistant = Assistant.open(home=learnt, runtime=ONE)
    assistant.close()
    assistant.close()
    with pytest.raises(SessionClosed):
        assistant.answer(QUESTION)


def test_a_profile_of_another_base_is_refused_with_every_mismatch(own):
    store = ProfileStore(own)
    tensors, manifest = store.load("default", 1)
    wrong = store.save("default", tensors, {**manifest, "base_hash": "sha256:other", "d_model": 64})
    store.activate("default", wrong.number)
    with pytest.raises(IncompatibleBase) as caught:
        Assistant.open(home=own, runtime=ONE)
    assert "base_hash" in str(caught.value) and "d_model" in str(caught.value)


def test_a_corrupted_profile_gives_way_to_the_version_before_and_says_so(own):
    store = ProfileStore(own)
    tensors, manifest = store.load("default", 1)
    store.activate("default", store.save("default", tensors, manifest).number)
    damaged = own.profiles_dir / "default" / "v0002" / "encoder.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-3] ^= 0xFF
    damaged.write_bytes(data)
    with Assistant.open(home=own, runtime=ONE) as assistant:
        assert assistant.profile.version == 1 and "version 1 is used instead of 2" in assistant.profile.note
    (own.profiles_dir / "default" / "v0001" / "manifest.json").write_text("{}")
    with pytest.raises(CorruptArtefact, match="personalize again"):
        Assistant.open(home=own, runtime=ONE)


def test_a_profile_that_wants_nothing_is_the_base(own):
    store = ProfileStore(own)
    tensors, manifest = store.load("default", 1)
    nothing = store.save("default", {**tensors, "mean": 0 * tensors["mean"]}, manifest)
    store.activate("default", nothing.number)
    with Assistant.open(home=own, runtime=ONE) as assistant:
        assert assistant.vectors(user_prompt(QUESTION)) is None
        steered, base = (assistant.answer(QUESTION, sampling=GREEDY, steered=s).tokens for s in (True, False))
    assert steered == base


def test_a_prompt_dependent_profile_steers_each_prompt_its_own_way(own):
    store = ProfileStore(own)
    tensors, manifest = store.load("default", 1)
    rng = np.random.default_rng(0)
    k = len(tensors["mean"])
    head = {
        "head_in": rng.normal(size=(2, 16)).astype(np.float32),
        "head_out": rng.normal(size=(k, 2)).astype(np.float32),
    }
    store.activate("default", store.save("default", tensors | head, manifest).number)
    with Assistant.open(home=own, runtime=ONE) as assistant:
        boats, again, bread = (assistant.vectors(user_prompt(q)).array for q in (QUESTION, QUESTION, "Bake me bread."))
    np.testing.assert_array_equal(boats, again)
    assert np.abs(boats - bread).max() > 0.01 * np.abs(boats).max()


def test_an_assistant_learns_from_what_it_was_told(toy_home):
    with Assistant.open(home=toy_home, runtime=ONE) as assistant:
        assert assistant.profile is None
        for topic in TOPICS[:6]:
            row = verdict(topic)
            assistant.prefer(user_prompt(row["prompt"]), row["chosen"], row["rejected"], origin="retry")
        assert assistant.learn().state == "collecting" and assistant.profile is None
        for topic in TOPICS[6:20]:
            row = verdict(topic)
            assistant.rate(user_prompt(row["prompt"]), row["chosen"], True)
            assistant.rate(user_prompt(row["prompt"]), row["rejected"], False)
        report = assistant.learn()
        assert report.pairs == {"retry": 6, "opposed": 14} and report.activated
        assert (assistant.profile.name, assistant.profile.version) == ("default", 1)
        assert assistant.vectors(user_prompt(QUESTION)) is not None
    with FeedbackLog(toy_home) as log:
        rows = list(log.rows("default"))
    assert len(rows) == 34 and {row.model for row in rows} == {"smollm2-135m-instruct"} and all(row.ts for row in rows)
