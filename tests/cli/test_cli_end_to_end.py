"""The main road in processes of their own: learn on the real base with its pack, answer, test, go back."""

import json
import subprocess
import sys

import pytest

TOPICS = (
    "tea coffee bread rain snow music chess boats trains maps clocks bees cats dogs soup paint glass wood stars rivers "
    "books shoes hats lamps gardens kites bells drums coins stamps"
).split()


def verdict(topic: str) -> dict[str, str]:
    """A person who likes warm answers in the first person."""
    return {
        "prompt": f"Tell me about {topic}.",
        "chosen": f"I love {topic}! I think I would enjoy {topic} every day, and my friends and I often talk of it.",
        "rejected": f"The term {topic} refers to a category of items. Various organizations produce reports on it.",
    }


def edge_align(*args: str, input: str = "") -> dict:
    command = [sys.executable, "-m", "edge_align.cli.main", *args, "--json"]
    done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def feedback(tmp_path):
    """24 verdicts to learn from, with one line that is no verdict, and 6 that are kept back."""
    known, unseen = tmp_path / "known.jsonl", tmp_path / "unseen.jsonl"
    known.write_text("".join(json.dumps(verdict(topic)) + "\n" for topic in TOPICS[:24]) + "{broken\n")
    unseen.write_text("".join(json.dumps(verdict(topic)) + "\n" for topic in TOPICS[24:]))
    return known, unseen


def test_from_a_feedback_file_to_personal_answers_and_back(home, base_path, feedback):
    known, unseen = map(str, feedback)
    report = edge_align("personalize", "--feedback", known, "--threads", "1")
    assert (report["profile"], report["version"], report["activated"], report["state"]) == (
        "default",
        1,
        True,
        "learnt",
    )
    assert (report["rows"]["read"], report["rows"]["used"], report["rows"]["dropped"][0]["line"]) == (25, 24, 25)
    assert report["pairs"] == {"preference": 24}
    assert report["heldout"]["accuracy"] > 0.9 and report["heldout"]["p"] <= 0.02
    assert [*report["stages_sec"]] == ["read", "encode", "fit", "calibrate", "check", "save"]

    question = ("generate", "How do boats float?", "--max-tokens", "16", "--threads", "1")
    both = edge_align(*question, "--compare")
    assert (both["personal"]["profile"], both["personal"]["version"], both["base"]["profile"]) == ("default", 1, None)
    assert both["personal"]["text"] != both["base"]["text"]
    assert edge_align(*question, "--strength", "0")["text"] == both["base"]["text"]
    assert edge_align(*question)["text"] == both["personal"]["text"]

    tested = edge_align("eval", "--feedback", unseen)
    assert (tested["heldout"]["n"], tested["heldout"]["accuracy"]) == (6, 1.0)

    chat = edge_align("chat", "--max-tokens", "8", "--threads", "1", input="Hi\n/down\n/edit I am glad!\n/learn\n")
    assert chat["verdicts"] == {"up": 0, "down": 1, "edit": 1, "retry": 0}
    assert (chat["reports"][0]["version"], chat["version"]) == (2, 2)
    assert chat["reports"][0]["pairs"] == {"preference": 24, "edit": 1}
    assert edge_align("profiles", "undo")["active"] == 1
    assert [check["status"] for check in edge_align("doctor")["checks"] if check["name"] == "profile"] == ["ok"]
