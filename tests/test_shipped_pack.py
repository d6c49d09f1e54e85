"""The shipped pack on the real base: the README's promise in small. The full figures come from `bench/quality.py`."""

from pathlib import Path

import numpy as np
import pytest

from edge_align.assistant import Assistant
from edge_align.bases import find_base
from edge_align.config import RuntimeConfig, SamplingConfig
from edge_align.home import Home
from edge_align.kl import measured_kl, open_probe
from edge_align.personalize import personalize, Source
from edge_align.records import user_prompt
from edge_align.registry import find_pack
from edge_align.simulation.judges import simple_words
from edge_align.simulation.prompts import prompts
from edge_align.simulation.users import win_rate

EXAMPLE = Path(__file__).parent.parent / "examples" / "feedback.jsonl"


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("home"))
    report = personalize(home=home, sources=[Source("example", EXAMPLE)], runtime=RuntimeConfig(n_threads=1))
    return home, report


def test_the_example_feedback_is_learnt_and_switched_on(learnt):
    _, report = learnt
    assert report.activated and report.state == "learnt" and report.reason is None
    assert report.heldout is not None
    assert report.heldout["accuracy"] > 0.65 and report.heldout["p"] <= 0.02
    assert 0.1 < report.predicted_kl < 0.25  # the budget, of which one hundred pairs do not earn all
    assert report.profile_bytes <= 4096


def test_answers_to_unseen_questions_use_simpler_words(learnt):
    """If the true share is .9, as on validation prompts, five of twelve or fewer has odds of 1 in 20,000."""
    home, _ = learnt
    unseen = [user_prompt(text) for text in prompts("validation")[:12]]
    sampling = SamplingConfig(max_tokens=40, seed=5)
    with Assistant.open(home=home, runtime=RuntimeConfig(n_threads=1)) as assistant:
        tokens = [assistant.backend.render(prompt) for prompt in unseen]
        vectors = assistant.vectors(unseen[0])
        base = [answer.text for answer in assistant.backend.generate_batch(tokens, vectors=None, sampling=sampling)]
        ours = [answer.text for answer in assistant.backend.generate_batch(tokens, vectors=vectors, sampling=sampling)]
    assert win_rate(simple_words, ours, base) > 5 / 12


def test_predicted_kl_is_near_the_measured_one(learnt, backend):
    """Decode-only, teacher-forced on sampled base answers; factor 2 here for six short answers, 1.5 in the bench."""
    home, report = learnt
    base = find_base()
    pack = find_pack(base, home)
    with Assistant.open(home=home, runtime=RuntimeConfig(n_threads=1)) as assistant:
        vectors = assistant.vectors(user_prompt("Why?"))
    tokens = [backend.render(user_prompt(text)) for text in prompts("validation")[20:26]]
    answers = backend.generate_batch(tokens, vectors=None, sampling=SamplingConfig(max_tokens=32, seed=3))
    probe = open_probe(backend, tokens, [list(answer.tokens) for answer in answers])
    measured = measured_kl(backend, probe, vectors)
    assert np.abs(np.log(report.predicted_kl / measured)) < np.log(2.0)
    assert pack.manifest["health"]["kl_factor_median"] < 1.25
