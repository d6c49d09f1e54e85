import json
import os
import signal
import stat

import pytest

from edge_align.store import FeedbackLog


@pytest.fixture
def logged(home):
    """The rows of a profile, as (origin, preferred or rated text, rejected text or verdict)."""

    def rows(profile="default"):
        with FeedbackLog(home) as log:
            return [
                (row.origin, row.chosen or row.completion, row.rejected if row.is_pair else row.label)
                for row in log.rows(profile)
            ]

    return rows


def chat(run, *lines, options=()):
    result = run("chat", *options, input="".join(line + "\n" for line in lines))
    assert result.exit_code == 0, result.stderr
    return result


def answer(question, seed, who="default"):
    return f"{who} answers {question!r} with seed {seed}"


def test_answers_go_to_stdout_and_each_has_its_own_seed(run, engine):
    result = chat(run, "Hi", "", "Bye", options=("--seed", "7"))
    assert result.stdout == f"{answer('Hi', 7)}\n{answer('Bye', 8)}\n"


def test_the_conversation_is_the_prompt_of_the_next_turn(run, engine, home):
    chat(run, "Hi", "Bye", "/down", options=("--system", "Be brief."))
    with FeedbackLog(home) as log:
        (row,) = log.rows("default")
    assert [(message.role, message.content) for message in row.prompt] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", answer("Hi", 0)),
        ("user", "Bye"),
    ]


def test_a_verdict_is_logged_at_once_and_once(run, engine, logged):
    seen = []
    engine.during_answer = staticmethod(lambda: seen.append(len(logged())))
    result = chat(run, "Hi", "/up", "/up", "Bye", "/down")
    assert seen == [0, 0, 0, 1, 1, 1]
    assert logged() == [("thumb", answer("Hi", 0), True), ("thumb", answer("Bye", 1), False)]
    assert "/up is in the log already" in result.stderr


def test_a_rated_retry_is_a_pair_with_the_answer_before(run, engine, logged):
    chat(run, "Hi", "/retry", "/up", "/retry", "/down")
    assert logged() == [
        ("retry", answer("Hi", 1), answer("Hi", 0)),
        ("retry", answer("Hi", 1), answer("Hi", 2)),
    ]


def test_a_retry_that_says_the_same_is_only_rated(run, engine, logged):
    engine.same_answers = True
    chat(run, "Hi", "/retry", "/up")
    assert logged() == [("thumb", "default answers 'Hi'", True)]


def test_an_edit_is_preferred_and_becomes_what_was_said(run, engine, home):
    chat(run, "Hi", "/edit Hello there.", "Bye", "/up")
    with FeedbackLog(home) as log:
        edit, thumb = log.rows("default")
    assert (edit.origin, edit.chosen, edit.rejected) == ("edit", "Hello there.", answer("Hi", 0))
    assert thumb.prompt[1].content == "Hello there."


def test_edit_without_text_opens_the_editor(run, engine, logged, tmp_path, monkeypatch):
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "Better." > "$1"\n')
    editor.chmod(editor.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("EDITOR", str(editor))
    chat(run, "Hi", "/edit")
    assert logged() == [("edit", "Better.", answer("Hi", 0))]
    monkeypatch.setenv("EDITOR", "false")
    result = chat(run, "Hi", "/edit", "/edit " + answer("Hi", 0), "Bye")
    assert "Error: " in result.stderr and "nothing logged" in result.stderr
    assert len(logged()) == 1 and answer("Bye", 1) in result.stdout


def test_profile_and_strength_change_on_the_way(run, engine, logged):
    result = chat(run, "a", "/profile work", "b", "/up", "/profile off", "c", "/strength 0.5", "/strength", "/profile")
    assert result.stdout.splitlines() == [answer("a", 0), answer("b", 1, "work"), answer("c", 2, "base")]
    assert logged("work") == [("thumb", answer("b", 1, "work"), True)]
    assert result.stderr.count("Strength 0.5.") == 2


@pytest.mark.parametrize(
    "line", ["/nonsense", "/up", "/edit x", "/retry", "/strength much", "/strength 9", "/profile x"]
)
def test_what_goes_wrong_with_a_line_is_one_line_and_does_not_end_the_chat(run, engine, line, logged):
    result = chat(run, line, "Hi")
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert result.stdout == answer("Hi", 0) + "\n"
    assert logged() == []


def test_a_line_that_begins_with_a_space_is_sent(run, engine):
    assert chat(run, " /up is a command").stdout == answer("/up is a command", 0) + "\n"


def test_quit_ends_and_new_begins_again(run, engine, home):
    result = chat(run, "Hi", "/new", "Bye", "/up", "/quit", "unread")
    assert len(result.stdout.splitlines()) == 2
    with FeedbackLog(home) as log:
        (row,) = log.rows("default")
    assert [message.content for message in row.prompt] == ["Bye"]


def test_ctrl_c_stops_the_answer_and_not_the_chat(run, engine):
    calls = []

    def press_once():
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    engine.during_answer = staticmethod(press_once)
    result = chat(run, "Hi", "Bye")
    assert result.stdout == f"default answers \n{answer('Bye', 1)}\n"
    assert "(stopped)" in result.stderr
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_learn_reports_in_a_line(run, engine):
    result = chat(run, "Hi", "/up", "/learn", options=("--profile", "work"))
    assert result.stderr.splitlines()[-1] == (
        "Learnt work version 3, 1.2 KiB, active; it predicts 87 % of 10 held-out preferences "
        "(95 % interval 79-92 %), chance p = .005."
    )


def test_json_is_one_document_at_the_end(run, engine):
    result = chat(run, "Hi", "/up", "/learn", options=("--json",))
    document = json.loads(result.stdout)
    assert answer("Hi", 0) in result.stderr
    assert document["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": answer("Hi", 0)},
    ]
    assert document["verdicts"] == {"up": 1, "down": 0, "edit": 0, "retry": 0}
    assert [report["version"] for report in document["reports"]] == [3]
    assert (document["model"], document["profile"], document["strength"]) == ("double", "default", 1.0)


def test_help_names_every_command(run, engine):
    from edge_align.cli import conversation

    text = chat(run, "/help").stderr
    names = ("help", "up", "down", "edit", "retry", "learn", "profile", "strength", "new", "quit")
    assert [name for name in names if name != "help" and f"/{name}" not in text] == []
    assert conversation.HELP in text
