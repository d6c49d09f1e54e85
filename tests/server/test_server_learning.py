"""Learning while serving: on the default base, with a tiny pack."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
from live_server import fake_engine, serving, until
from reference.verdicts import TOPICS, verdict, write

from edge_align.config import PersonalizeConfig, RuntimeConfig, ServerConfig
from edge_align.gate import compare_on_new
from edge_align.home import Home
from edge_align.latent_dpo import draw_contrasts, LatentDPOConfig, LatentFeedback
from edge_align.personalize import personalize, Source
from edge_align.profiles import ProfileStore
from edge_align.store import FeedbackLog

ONE = RuntimeConfig(n_threads=1, n_ctx=512)
FAST = PersonalizeConfig(nll_limit=0.0, collision_limit=0.0)  # strength is not what is tested here
REFIT = replace(FAST, no_worse=True)


@pytest.fixture(autouse=True)
def not_niced(monkeypatch):
    """Other tests may keep every core busy, and a refit that gives way to them is never done."""
    monkeypatch.setattr("edge_align.server.learner.NICE", 0)


def test_thumbs_over_http_become_a_profile_that_answers_and_can_be_undone(toy_home):
    config = ServerConfig(profile="ann", learn_every=12)
    with serving(toy_home, config=config, runtime=ONE) as live:
        base = live.chat("Tell me about ships.", temperature=0).json
        assert base["edge_align"]["profile"] is None
        streams = [threading.Thread(target=live.chat, kwargs={"max_tokens": 60}) for _ in range(2)]
        for i, topic in enumerate(TOPICS[:12]):
            row = verdict(topic)
            id = live.chat(row["prompt"], max_tokens=12).json["id"]
            reply = live.ask("POST", "/v1/feedback", {"id": id, "edited": row["chosen"]})
            assert reply.json["rows"] == i + 1
            assert reply.json["learning"] == ("learning" if i == 11 else "idle")
        for stream in streams:  # answers go on during the refit
            stream.start()
        until(lambda: live.ask("GET", "/v1/profiles/ann").json["learning"] == "idle", seconds=200)
        for stream in streams:
            stream.join()
        shown = live.ask("GET", "/v1/profiles/ann").json
        assert shown["last_refit"]["state"] == "learnt" and shown["last_refit"]["activated"]
        assert shown["active_version"] == 1 and shown["feedback_rows"] == 12
        assert [(one["version"], one["active"], one["pairs"]) for one in shown["history"]] == [(1, True, 12)]
        steered = live.chat("Tell me about ships.", temperature=0).json["edge_align"]
        assert (steered["profile"], steered["version"]) == ("ann", 1)
        assert "edge_align:refits_total 1\n" in live.ask("GET", "/metrics").data.decode()
        refused = live.ask("POST", "/v1/profiles/ann/undo", {})
        assert refused.status == 409
        store = ProfileStore(toy_home)
        tensors, manifest = store.load("ann", 1)
        store.activate("ann", store.save("ann", tensors, manifest).number)
        again = live.chat("Tell me about ships.", temperature=0).json["edge_align"]
        assert again["version"] == 2  # what another process activated answers from the next request on
        assert live.ask("POST", "/v1/profiles/ann/undo", {}).json["active_version"] == 1
        assert live.chat("Tell me about ships.", temperature=0).json["edge_align"]["version"] == 1
        assert store.current() is None  # the profile in use elsewhere is not the server's business


def test_a_refit_that_predicts_new_verdicts_worse_than_the_active_version_is_not_activated(toy_home, tmp_path):
    clear = write(tmp_path / "clear.jsonl", TOPICS[:24])
    assert personalize(home=toy_home, sources=[Source("clear", clear)], runtime=ONE, config=FAST).activated
    with FeedbackLog(toy_home) as log:
        log.forget("default", everything=True)
    against = [verdict(topic) for topic in TOPICS[:24]]
    for row in against:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    noise = tmp_path / "against.jsonl"
    noise.write_text("".join(json.dumps(row) + "\n" for row in against))
    new = write(tmp_path / "new.jsonl", TOPICS[24:32])
    report = personalize(
        home=toy_home,
        sources=[Source("against", noise), Source("new", new)],
        runtime=ONE,
        config=REFIT,
    )
    assert not report.activated and "of 8 new verdicts and version 1" in report.reason
    assert ProfileStore(toy_home).active_version("default") == 1


def test_a_version_is_switched_off_when_all_verdicts_can_no_longer_be_told_from_chance(toy_home, tmp_path):
    """As many verdicts one way as the other; only a refit of the server does it, and only to what passed by itself."""
    clear = write(tmp_path / "clear.jsonl", TOPICS[:20])
    assert personalize(home=toy_home, sources=[Source("clear", clear)], runtime=ONE, config=FAST).activated
    against = [verdict(topic) for topic in TOPICS[20:40]]
    for row in against:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    noise = tmp_path / "against.jsonl"
    noise.write_text("".join(json.dumps(row) + "\n" for row in against))
    store = ProfileStore(toy_home)
    by_hand = personalize(home=toy_home, sources=[Source("against", noise)], runtime=ONE, config=FAST)
    assert by_hand.state == "refused" and by_hand.heldout["p"] > 0.2 and store.active_version("default") == 1
    report = personalize(home=toy_home, sources=[], runtime=ONE, config=REFIT)
    assert not report.activated and store.active_version("default") is None
    assert "version 1 is switched off" in report.reason and "profiles undo default" in report.reason
    assert store.undo("default") == 1
    forced = personalize(home=toy_home, sources=[], runtime=ONE, config=replace(FAST, force=True))
    assert forced.activated
    personalize(home=toy_home, sources=[], runtime=ONE, config=REFIT)
    assert store.active_version("default") == forced.version


def test_new_verdicts_are_predicted_by_neither_side_from_memory():
    rng = np.random.default_rng(0)
    truth, n, k = np.zeros(8), 60, 8
    truth[0] = 1.0
    difference = rng.normal(size=(n, k)).astype(np.float32)
    difference *= np.sign(difference @ truth)[:, None]  # the chosen one lies along the truth
    feedback = LatentFeedback(
        chosen=difference / 2,
        rejected=-difference / 2,
        pair_features=np.zeros((n, 2), np.float32),
        pair_weight=np.ones(n, np.float32),
        pair_group=np.arange(n),
        rated=np.zeros((0, k), np.float32),
        rated_up=np.zeros(0, bool),
        rated_features=np.zeros((0, 2), np.float32),
        rated_weight=np.zeros(0, np.float32),
        rated_group=np.zeros(0, np.int64),
    )
    config = LatentDPOConfig()
    contrasts = draw_contrasts(feedback, np.full(k, 0.01, np.float32), config=config, seed=0)
    new = np.arange(n) >= 40

    def compare(active):
        return compare_on_new(feedback, contrasts, new, active.astype(np.float32), config=config)

    refit, right = compare(truth)
    assert right == 1.0 and 0.7 <= refit <= 1.0
    assert compare(-truth)[1] == 0.0
    assert compare(np.zeros(k))[1] == 0.5


@pytest.mark.parametrize(("learn", "status"), [("off", 409), ("manual", 202)])
def test_learning_can_be_off_or_left_to_the_person(tmp_path, learn, status):
    home = Home(tmp_path / "home")
    config = ServerConfig(profile="ann", learn=learn, learn_every=1)
    with serving(home, open_engine=fake_engine(), config=config) as live:
        id = live.chat().json["id"]
        assert live.ask("POST", "/v1/feedback", {"id": id, "rating": "up"}).json["learning"] == "idle"
        assert live.ask("POST", "/v1/profiles/ann/learn", {}).status == status
        until(lambda: live.ask("GET", "/v1/profiles/ann").json["learning"] == "idle", seconds=100)
        report = live.ask("GET", "/v1/profiles/ann").json["last_refit"]
        assert (report is None) == (learn == "off")
        assert report is None or report["state"] == "collecting"  # one verdict is not enough
