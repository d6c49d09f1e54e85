"""Verdicts over HTTP: what they become, who sees them, and that erased is erased."""

import sqlite3

import pytest
from click.testing import CliRunner
from live_server import bearer, fake_engine, keys_of, serving

from edge_align.cli.main import cli
from edge_align.config import ServerConfig
from edge_align.errors import UnsupportedVersion
from edge_align.home import Home
from edge_align.pairs import build
from edge_align.records import FeedbackRow, user_prompt
from edge_align.server.answers import Answer, AnswerStore
from edge_align.store import FeedbackLog


@pytest.fixture
def live(tmp_path):
    home = Home(tmp_path / "home")
    (home.profiles_dir / "ann").mkdir(parents=True)
    with serving(home, open_engine=fake_engine(), config=ServerConfig(learn="off", profile="ann")) as live:
        live.home = home
        yield live


def logged(live, profile="ann"):
    with FeedbackLog(live.home) as log:
        return [*log.rows(profile)]


def given(live, content="How do boats float?", **more):
    body = live.chat(content, **more).json
    return body["id"], body["choices"][0]["message"]["content"]


def judge(live, **body):
    return live.ask("POST", "/v1/feedback", body)


@pytest.mark.parametrize(
    ("rating", "label", "weight"),
    [("up", True, 1.0), ("down", False, 1.0), (10, True, 1.8), (6, True, 0.2), (5, False, 0.2), (1, False, 1.8)],
)
def test_a_rating_becomes_a_row_about_the_answer_of_that_id(live, rating, label, weight):
    id, text = given(live)
    reply = judge(live, id=id, rating=rating, reason="because")
    assert reply.json["added"] == ["up" if label else "down"] and reply.json["rows"] == 1
    (row,) = logged(live)
    assert (row.prompt, row.completion, row.label) == (user_prompt("How do boats float?"), text, label)
    assert row.weight == pytest.approx(weight)  # |rating - 5.5| / 2.5
    assert (row.reason, row.id, row.origin, row.source) == ("because", id, "thumb", "server")


def test_a_streamed_answer_can_be_judged_as_soon_as_it_has_ended(live):
    id = live.chat(stream=True).events[0]["id"]
    assert judge(live, id=id, rating="up").status == 200


def test_an_edit_becomes_a_pair_that_prefers_it(live):
    id, text = given(live)
    assert judge(live, id=id, edited="By displacing water.").json["added"] == ["pair"]
    (row,) = logged(live)
    assert (row.chosen, row.rejected, row.origin) == ("By displacing water.", text, "edit")


def test_preferring_one_answer_over_another_to_the_same_messages_is_a_pair(live):
    (first, better), (second, worse) = given(live, seed=1), given(live, seed=2)
    assert judge(live, id=first, preferred_over=second).status == 200
    (row,) = logged(live)
    assert (row.chosen, row.rejected) == (better, worse)
    other, _ = given(live, "Why is the sky blue?")
    refused = judge(live, id=first, preferred_over=other)
    assert refused.status == 400 and "other messages" in refused.json["error"]["message"]


def test_choices_of_one_answer_are_told_apart_by_their_index(live):
    body = live.chat(n=2).json
    texts = [choice["message"]["content"] for choice in body["choices"]]
    judge(live, id=body["id"], index=1, preferred_over=body["id"], preferred_over_index=0)
    (row,) = logged(live)
    assert [row.chosen, row.rejected] == texts[::-1]


def test_opposite_verdicts_on_the_same_messages_become_a_pair(live):
    (first, good), (second, bad) = given(live, seed=1), given(live, seed=2)
    judge(live, id=first, rating="up")
    judge(live, id=second, rating="down")
    (pair,) = build(logged(live)).pairs
    assert (pair.chosen, pair.rejected, pair.origin) == (good, bad, "opposed")


def test_a_changed_mind_counts_however_often_it_changes(live):
    id, _ = given(live)
    for rating in ("up", "down", "up"):
        judge(live, id=id, rating=rating)
    (rating,) = build(logged(live)).ratings
    assert rating.label is True


def test_a_verdict_goes_to_the_profile_that_the_request_meant_even_unsteered(live):
    id, _ = given(live, steering={"enabled": False})
    assert judge(live, id=id, rating="up").json["profile"] == "ann"


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"rating": "up"}, 400, "id is missing"),
        ({"id": "nope", "rating": "up"}, 404, "no such answer"),
        ({"id": "ID"}, 400, "no verdict"),
        ({"id": "ID", "rating": 11}, 400, "1 to 10"),
        ({"id": "ID", "rating": 0}, 400, "1 to 10"),
        ({"id": "ID", "rating": True}, 400, "1 to 10"),
        ({"id": "ID", "rating": {"a": 1}}, 400, "1 to 10"),
        ({"id": "ID", "edited": "  "}, 400, "empty"),
        ({"id": "ID", "edited": "a\x00b"}, 400, "NUL"),
        ({"id": "ID", "rating": "up", "index": 7}, 404, "no such answer"),
        ({"id": "ID", "rating": "up", "index": -1}, 400, "index"),
        ({"id": "ID", "preferred_over": "ID"}, 400, "same text"),
        ({"id": ["x"], "rating": "up"}, 400, "id"),
    ],
)
def test_a_verdict_that_makes_no_sense_is_refused_with_a_sentence(live, body, status, says):
    id, _ = given(live)
    reply = judge(live, **{key: id if value == "ID" else value for key, value in body.items()})
    assert reply.status == status and says in reply.json["error"]["message"]
    assert logged(live) == []


def test_verdicts_can_be_seen_the_newest_first_and_erased_by_row_text_or_all(live):
    for i, question in enumerate(["First?", "Second?", "Third walrus?"]):
        id, _ = given(live, question, seed=i)
        judge(live, id=id, rating="up")
    page = live.ask("GET", "/v1/feedback?limit=2").json
    assert page["total"] == 3
    assert [one["messages"][0]["content"] for one in page["data"]] == ["Third walrus?", "Second?"]
    assert live.ask("GET", "/v1/feedback?limit=2&offset=2").json["data"][0]["messages"][0]["content"] == "First?"
    assert live.ask("GET", "/v1/feedback?limit=-1").status == 400
    assert live.ask("DELETE", "/v1/feedback", {"rows": [page["data"][1]["row"]]}).json["deleted"] == 1
    assert live.ask("DELETE", "/v1/feedback", {"matching": "WALRUS"}).json["deleted"] == 1
    assert live.ask("DELETE", "/v1/feedback", {}).status == 400
    assert live.ask("DELETE", "/v1/feedback", {"everything": True}).json["deleted"] == 1
    assert live.ask("GET", "/v1/feedback").json["total"] == 0


def test_nothing_of_what_is_erased_stays_on_the_disk(live):
    question = "pumpernickel-question"
    id, text = given(live, question)
    judge(live, id=id, edited="marmalade-edit")
    live.ask("DELETE", "/v1/feedback", {"everything": True})
    files = [path for path in live.home.root.rglob("*") if path.is_file()]
    assert {"feedback.db", "answers.db"} <= {path.name for path in files}
    for path in files:
        data = path.read_bytes()
        assert question.encode() not in data and b"marmalade-edit" not in data and text.encode() not in data, path
    assert judge(live, id=id, rating="up").status == 404  # the remembered answer is gone too


def test_each_key_sees_and_erases_its_own_profile_only(tmp_path):
    home = Home(tmp_path / "home")
    config = ServerConfig(learn="off")
    with serving(home, open_engine=fake_engine(), keys=keys_of(ann=("ann",), bob=("bob",)), config=config) as live:
        for name in ("ann", "bob"):
            id = live.chat(f"from {name}", headers=bearer(name)).json["id"]
            assert live.ask("POST", "/v1/feedback", {"id": id, "rating": "up"}, bearer(name)).json["profile"] == name
        seen = live.ask("GET", "/v1/feedback", headers=bearer("ann")).json
        assert seen["total"] == 1 and seen["data"][0]["messages"][0]["content"] == "from ann"
        assert live.ask("DELETE", "/v1/feedback", {"everything": True}, bearer("ann")).json["deleted"] == 1
        assert live.ask("GET", "/v1/feedback", headers=bearer("bob")).json["total"] == 1


# -- the store of answers ----------------------------------------------------------------------------------------------
def answer(id="a", owner="", profile="ann", text="By Archimedes."):
    return Answer(id, 0, owner, profile, user_prompt("How do boats float?"), text, "base")


def test_answers_are_kept_for_a_number_of_days_and_then_deleted(tmp_path):
    import time

    home, now = Home(tmp_path / "home"), time.time()
    with AnswerStore(home, keep_days=2) as store:
        store.add([answer("old")], now=now - 2 * 86400 - 60)
        store.add([answer("young")], now=now - 2 * 86400 + 60)
        assert store.find("old", 0, owner="") is None
        assert store.find("young", 0, owner="").text == "By Archimedes."
        assert store.expire(now=now) == 1 and store.count() == 1


def test_a_verdict_waits_for_the_disk_and_an_answer_does_not(tmp_path):
    home = Home(tmp_path / "home")
    with AnswerStore(home, keep_days=1) as answers, FeedbackLog(home) as log:
        answers.add([answer()])
        log.append("ann", [FeedbackRow(user_prompt("How?"), completion="So.", label=True)])
        modes = [owner._db.read("PRAGMA synchronous")[0][0] for owner in (answers, log)]
    assert modes == [1, 2]  # NORMAL, FULL


def test_nothing_is_kept_with_keep_days_zero(tmp_path):
    with AnswerStore(Home(tmp_path / "home"), keep_days=0) as store:
        store.add([answer()])
    assert not (tmp_path / "home").exists()


def test_an_answer_is_found_by_its_owner_only_and_as_it_was(tmp_path):
    with AnswerStore(Home(tmp_path / "home"), keep_days=1) as store:
        store.add([answer(owner="ann", text="größer 👍")])
        assert store.find("a", 0, owner="bob") is None and store.find("a", 1, owner="ann") is None
        found = store.find("a", 0, owner="ann")
        assert (found.text, found.prompt, found.profile) == ("größer 👍", user_prompt("How do boats float?"), "ann")
    assert (tmp_path / "home" / "answers.db").stat().st_mode & 0o077 == 0


def test_a_store_of_a_newer_edge_align_is_refused(tmp_path):
    home = Home(tmp_path / "home")
    with AnswerStore(home, keep_days=1) as store:
        store.add([answer()])
    with sqlite3.connect(home.answers_db) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with AnswerStore(home, keep_days=1) as store, pytest.raises(UnsupportedVersion):
        store.find("a", 0, owner="")


def test_forgetting_on_the_command_line_erases_the_remembered_answers_too(tmp_path):
    home = Home(tmp_path / "home")
    with AnswerStore(home, keep_days=1) as store:
        store.add([answer("a", profile="ann", text="zanzibar-answer"), answer("b", profile="bob")])
    command = ["--home", str(home.root), "feedback", "forget", "--all", "--yes", "--profile", "ann"]
    assert CliRunner().invoke(cli, command).exit_code == 0
    with AnswerStore(home, keep_days=1) as store:
        assert store.count() == 1 and store.find("b", 0, owner="") is not None
    assert b"zanzibar" not in home.answers_db.read_bytes()
