"""personalize and evaluate on the real base with a tiny pack: what they report, refuse, keep and fall back to."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from reference.verdicts import TOPICS, verdict, write

from edge_align.bases import find_base
from edge_align.config import PersonalizeConfig, RuntimeConfig
from edge_align.errors import IncompatibleBase, InputError, NothingUsable, PackMissing, StorageError
from edge_align.home import Home
from edge_align.personalize import evaluate, personalize, PersonalizeReport, Source
from edge_align.profiles import ProfileStore
from edge_align.store import FeedbackLog

ONE = RuntimeConfig(n_threads=1, n_ctx=512)
KEYS = {
    *("profile", "version", "model", "rows", "pairs", "heldout", "scale", "predicted_kl", "nll_ratio", "stages_sec"),
    *("collision_ratio", "profile_bytes", "activated", "reason"),
}


def learn(home: Home, *paths, progress=None, **options) -> PersonalizeReport:
    sources = [Source(path.name, path) for path in paths]
    unchecked = {"nll_limit": 0.0, "collision_limit": 0.0}  # what the check samples takes seconds
    config = PersonalizeConfig(**unchecked | options)
    return personalize(home=home, sources=sources, config=config, runtime=ONE, progress=progress)


@pytest.fixture(scope="module")
def clear(tmp_path_factory):
    return write(tmp_path_factory.mktemp("texts") / "clear.jsonl", TOPICS[:24])


@pytest.fixture(scope="module")
def learnt(built, clear, tmp_path_factory):
    """One run that passes: (its home, its report, what progress told). Tests copy the home before they change it."""
    home = Home(tmp_path_factory.mktemp("learnt") / "home")
    shutil.copytree(built[0].packs_dir, home.packs_dir)
    told = []
    return home, learn(home, clear, progress=lambda *stage: told.append(stage)), told


@pytest.fixture
def home(learnt, tmp_path):
    shutil.copytree(learnt[0].root, tmp_path / "copy")
    return Home(tmp_path / "copy")


def test_the_report_says_what_was_done(learnt):
    home, report, told = learnt
    said = json.loads(json.dumps(report.to_dict()))
    assert said.keys() >= KEYS
    assert said["rows"].keys() >= {"read", "used", "dropped"}
    assert set(said["heldout"]) == {"accuracy", "ci_low", "ci_high", "p", "n"}
    assert (report.profile, report.version, report.model) == ("default", 1, "smollm2-135m-instruct")
    assert (report.rows["read"], report.rows["used"], report.rows["dropped"]) == (24, 24, [])
    assert (report.pairs, report.ratings, report.state) == ({"preference": 24}, 0, "learnt")
    assert report.activated and report.reason is None
    assert report.heldout["n"] == 24 and report.heldout["accuracy"] > 0.9 and report.heldout["p"] <= 0.02
    assert list(report.stages_sec) == ["read", "encode", "fit", "calibrate", "save"]
    assert all(seconds >= 0 for seconds in report.stages_sec.values())
    assert report.profile_bytes <= 4096 and not report.depends_on_prompt
    assert report.scale > 0 and 0 < report.predicted_kl <= 0.5 * 1.001  # the budget is a ceiling
    assert [stage for stage, done in told if done == 0.0] == list(report.stages_sec)
    assert [stage for stage, done in told if done == 1.0][-1] == "save"


def test_answers_are_tried_and_a_profile_that_costs_fluency_is_made_weaker(home, learnt):
    kept, lowered = learn(home, nll_limit=100.0), learn(home, nll_limit=1.0)
    assert list(kept.stages_sec) == ["read", "encode", "fit", "calibrate", "check", "save"]
    assert (kept.scale, kept.predicted_kl) == (learnt[1].scale, pytest.approx(learnt[1].predicted_kl))
    assert learnt[1].nll_ratio is None and kept.nll_ratio > 1.0
    assert lowered.nll_ratio < kept.nll_ratio and lowered.scale < kept.scale
    assert lowered.predicted_kl < kept.predicted_kl
    manifest = ProfileStore(home).load("default", lowered.version)[1]
    assert manifest["nll_ratio"] == pytest.approx(lowered.nll_ratio, abs=1e-4)
    assert kept.collision_ratio is None and manifest["collision_ratio"] is None


def test_a_profile_that_makes_answers_alike_is_made_weaker(home, learnt):
    kept = learn(home, collision_limit=100.0)
    assert kept.scale == learnt[1].scale and kept.nll_ratio is None
    limit = (1.0 + kept.collision_ratio) / 2
    lowered = learn(home, collision_limit=limit)
    assert kept.collision_ratio > limit >= lowered.collision_ratio and lowered.scale < kept.scale
    manifest = ProfileStore(home).load("default", lowered.version)[1]
    assert manifest["collision_ratio"] == pytest.approx(lowered.collision_ratio, abs=1e-4)


def test_the_same_file_again_adds_no_row_and_gives_the_same_profile(home, clear):
    again = learn(home, clear)
    assert (again.version, again.rows["duplicates"], again.rows["logged"]) == (2, 24, 24)
    store = ProfileStore(home)
    (first, _), (second, _) = store.load("default", 1), store.load("default", 2)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    with FeedbackLog(home) as log:
        assert log.count("default") == 24


def test_the_log_alone_is_enough_and_half_the_budget_costs_half(home, learnt):
    half = learn(home, kl_budget=PersonalizeConfig().kl_budget / 2)
    assert (half.rows["read"], half.version) == (0, 2)
    assert half.predicted_kl == pytest.approx(learnt[1].predicted_kl / 2, rel=1e-3)
    assert half.heldout == learnt[1].heldout


def test_under_eight_verdicts_are_collected_and_nothing_is_saved(toy_home, tmp_path):
    report = learn(toy_home, write(tmp_path / "few.jsonl", TOPICS[:5]))
    assert (report.state, report.version, report.activated) == ("collecting", None, False)
    assert "3 more" in report.reason and report.heldout is None and report.scale is None
    assert ProfileStore(toy_home).names() == ()
    more = learn(toy_home, write(tmp_path / "more.jsonl", TOPICS[5:7]))
    assert more.rows["logged"] == 7 and "1 more" in more.reason


def test_shuffled_labels_are_refused_saved_and_activated_only_by_force(toy_home, tmp_path):
    noise = write(tmp_path / "noise.jsonl", TOPICS, shuffled=1)
    refused = learn(toy_home, noise)
    store = ProfileStore(toy_home)
    assert (refused.state, refused.version, refused.activated) == ("refused", 1, False)
    assert refused.heldout["p"] > 0.02 and "chance" in refused.reason
    assert store.versions("default") == (1,) and store.active_version("default") is None
    forced = learn(toy_home, force=True)
    assert (forced.state, forced.version, forced.activated) == ("refused", 2, True) and "--force" in forced.reason
    assert store.active_version("default") == 2 and store.current() == "default"


def test_a_version_that_is_not_to_be_activated_waits(home):
    report = learn(home, activate=False, seed=5)
    assert (report.state, report.version, report.activated) == ("learnt", 2, False) and "--no-activate" in report.reason
    assert ProfileStore(home).active_version("default") == 1


def test_bad_rows_are_skipped_with_their_line_and_reason(toy_home, tmp_path):
    path = write(tmp_path / "mixed.jsonl", TOPICS[:8])
    with path.open("a") as file:
        file.write('{"prompt": "Q", "chosen": "same", "rejected": "same"}\nnot json\n')
    report = learn(toy_home, path)
    assert (report.rows["read"], report.rows["used"]) == (10, 8)
    assert [(row["file"], row["line"]) for row in report.rows["dropped"]] == [("mixed.jsonl", 9), ("mixed.jsonl", 10)]
    assert "same" in report.rows["dropped"][0]["reason"]


def test_nothing_usable_names_the_first_problem(toy_home, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "Q", "chosen": "same", "rejected": "same"}\n')
    with pytest.raises(NothingUsable, match=r"bad\.jsonl:1"):
        learn(toy_home, path)
    with pytest.raises(NothingUsable, match="no feedback yet"):
        learn(toy_home)


def test_without_a_pack_nothing_is_read_and_the_error_says_how_to_get_one(tmp_path, clear, monkeypatch):
    monkeypatch.setattr("edge_align.registry.shipped_packs", lambda: tmp_path / "none")
    with pytest.raises(PackMissing, match=r"edge-align export pack .*minutes"):
        learn(Home(tmp_path / "bare"), clear)
    assert not (tmp_path / "bare" / "feedback.db").exists()


def test_two_at_once_on_one_profile_are_one_and_a_clear_error(home, clear):
    with home.lock("default"), pytest.raises(StorageError, match="another edge-align process is working on profile"):
        learn(home, clear)
    assert ProfileStore(home).versions("default") == (1,)


def test_ratings_alone_are_learnt_from(toy_home, tmp_path):
    path = tmp_path / "thumbs.jsonl"
    rows = []
    for i, topic in enumerate(TOPICS[:30]):
        row = verdict(topic)
        rows.append(
            {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = learn(toy_home, path)
    assert (report.pairs, report.ratings, report.state) == ({}, 30, "learnt")
    assert report.heldout["accuracy"] > 0.8


class TestEvaluating:
    def test_counts_how_often_unseen_verdicts_are_predicted(self, home, tmp_path):
        unseen = write(tmp_path / "unseen.jsonl", TOPICS[30:])
        found = evaluate(home=home, sources=[Source("unseen.jsonl", unseen)], runtime=ONE)
        assert (found["profile"], found["version"], found["rows"]["used"]) == ("default", 1, 10)
        assert found["heldout"]["accuracy"] == 1.0 and found["heldout"]["n"] == 10
        with FeedbackLog(home) as log:
            assert log.count("default") == 24  # nothing of it was logged

    def test_turns_round_when_the_labels_do(self, home, tmp_path):
        row = verdict("salt")
        path = tmp_path / "flipped.jsonl"
        path.write_text(json.dumps({**row, "chosen": row["rejected"], "rejected": row["chosen"]}))
        assert evaluate(home=home, sources=[Source("f", path)], runtime=ONE)["heldout"]["accuracy"] == 0.0

    def test_needs_a_profile_and_a_pair(self, home, toy_home, tmp_path, clear):
        with pytest.raises(InputError, match="no profile"):
            evaluate(home=toy_home, sources=[Source("c", clear)], runtime=ONE)
        lone = tmp_path / "lone.jsonl"
        lone.write_text('{"prompt": "Q", "completion": "A", "label": true}\n')
        with pytest.raises(NothingUsable):
            evaluate(home=home, sources=[Source("lone.jsonl", lone)], runtime=ONE)

    def test_refuses_a_profile_of_another_base(self, home, clear):
        store = ProfileStore(home)
        tensors, manifest = store.load("default", 1)
        other = store.save("default", tensors, {**manifest, "base_hash": "sha256:other", "pack_hash": "sha256:too"})
        store.activate("default", other.number)
        with pytest.raises(IncompatibleBase) as caught:
            evaluate(home=home, sources=[Source("c", clear)], runtime=ONE)
        assert "base_hash" in str(caught.value) and "pack_hash" in str(caught.value)


def test_the_manifest_of_a_profile_says_what_it_fits(home):
    _, manifest = ProfileStore(home).load("default", 1)
    base = find_base()
    assert manifest["base_hash"] == base.hash and (manifest["n_layer"], manifest["d_model"]) == (30, 576)
    assert manifest["pairs"] == 24 and not any("love" in str(value) for value in manifest.values())


def test_settings_out_of_range_are_refused():
    for wrong in ({"kl_budget": 0.0}, {"kl_budget": float("nan")}, {"nll_limit": 0.9}, {"seed": -1}):
        with pytest.raises(InputError):
            PersonalizeConfig(**wrong)
    assert 0.0 < dataclasses.asdict(PersonalizeConfig())["kl_budget"] < 1.0
