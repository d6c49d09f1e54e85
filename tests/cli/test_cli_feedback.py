import json
import os
import stat

import pytest

from edge_align.store import FeedbackLog

GOOD = {"prompt": "What is tea?", "chosen": "A drink.", "rejected": "I do not know."}
THUMB = {"prompt": "What is tea?", "completion": "Leaves in water.", "label": True}


@pytest.fixture
def mixed(tmp_path):
    """Two usable rows of two formats, and three that are not."""
    path = tmp_path / "mixed.jsonl"
    lines = [json.dumps(GOOD), "{broken", json.dumps(THUMB), json.dumps(GOOD | {"chosen": "x", "rejected": "x"})]
    path.write_text("\n".join([*lines, json.dumps({"prompt": "alone"})]) + "\n")
    return path


def test_import_logs_usable_rows_once_and_names_the_others(run, home, mixed):
    first = run("feedback", "import", str(mixed), "--json")
    assert first.exit_code == 0 and first.stderr == ""
    document = json.loads(first.stdout)
    assert {key: document[key] for key in ("profile", "added", "duplicates", "read", "usable", "dropped_count")} == {
        "profile": "default",
        "added": 2,
        "duplicates": 0,
        "read": 5,
        "usable": 2,
        "dropped_count": 3,
    }
    assert document["kinds"] == {"pair": 1, "up": 1}
    assert {row["file"] for row in document["dropped"]} == {str(mixed)}
    assert [row["line"] for row in document["dropped"]] == [2, 4, 5]
    again = run("feedback", "import", str(mixed))
    assert "5 read, 2 usable, 3 dropped" in again.stdout
    assert f"{mixed}:4: chosen and rejected are the same text" in again.stdout
    assert "0 rows added to default, 2 were there already" in again.stdout
    assert "\x1b" not in again.stdout
    with FeedbackLog(home) as log:
        assert log.count("default") == 2


def test_import_reads_stdin(run):
    result = run("feedback", "import", "-", "--profile", "work", "--json", input=json.dumps(GOOD) + "\n")
    assert json.loads(result.stdout)["added"] == 1
    assert json.loads(run("feedback", "stats", "--profile", "work", "--json").stdout)["sources"] == {"trl": 1}


def test_only_the_first_ten_dropped_rows_are_spelt_out(run, tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + "[1]\n" * 25)
    result = run("feedback", "validate", str(path))
    assert result.exit_code == 0
    assert result.stdout.count(f"{path}:") == 10
    assert "and 15 more" in result.stdout
    assert len(json.loads(run("feedback", "validate", str(path), "--json").stdout)["dropped"]) == 25


def test_validate_keeps_nothing_and_fails_only_when_nothing_is_usable(run, home, mixed, tmp_path):
    assert run("feedback", "validate", str(mixed)).exit_code == 0
    useless = tmp_path / "useless.jsonl"
    useless.write_text('{"text": "hello"}\n')
    result = run("feedback", "validate", str(useless), "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["dropped"][0]["line"] == 1
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert not home.root.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"\x00\x01\x02" * 99, ""),
        (b"\x1f\x8b\x08\x00", "gzip"),
    ],
)
@pytest.mark.parametrize("verb", ["import", "validate"])
def test_a_file_that_cannot_be_read_is_one_line_and_exit_2(run, tmp_path, content, says, verb):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    result = run("feedback", verb, str(path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr and result.stderr.count("\n") == 1
    failed = run("feedback", verb, str(path), "--json")
    assert json.loads(failed.stdout)["error"]["type"] == "InputError"


def test_add_a_pair_and_a_thumb_from_text_file_and_stdin(run, home, tmp_path):
    answer = tmp_path / "answer.txt"
    answer.write_text("Leaves,\nin water.\n")
    arguments = ("--prompt", "What is tea?", "--chosen", f"@{answer}", "--rejected", "-", "--tag", "kitchen")
    assert run("feedback", "add", *arguments, input="No idea.\n").stdout == "Logged; default has 1 row now.\n"
    arguments = ("--prompt", "@@home", "--completion", "Yes.", "--down", "--system", "Be brief.")
    thumb = run("feedback", "add", *arguments, "--json")
    assert json.loads(thumb.stdout) == {"profile": "default", "added": 1, "rows": 2}
    with FeedbackLog(home) as log:
        pair, rating = log.rows("default")
    assert (pair.chosen, pair.rejected, pair.tags) == ("Leaves,\nin water.", "No idea.", ("kitchen",))
    assert [message.content for message in rating.prompt] == ["Be brief.", "@home"]
    assert (rating.completion, rating.label, rating.origin) == ("Yes.", False, "thumb")


def test_a_verdict_that_returns_to_an_earlier_one_counts_as_the_newest(run):
    for verdict in ("--up", "--down", "--up"):
        run("feedback", "add", "--prompt", "q", "--completion", "a", verdict)
    assert json.loads(run("feedback", "stats", "--json").stdout)["kinds"] == {"up": 2, "down": 1}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--chosen", "a"),
        ("--chosen", "a", "--rejected", "a"),
        ("--chosen", "a", "--rejected", " "),
        ("--completion", "a"),
        ("--completion", "a", "--up", "--down"),
        ("--up",),
        ("--chosen", "a", "--rejected", "b", "--completion", "c", "--up"),
        ("--chosen", "-", "--rejected", "-"),
        ("--chosen", "@/does/not/exist", "--rejected", "b"),
        ("--chosen", "a\x00", "--rejected", "b"),
        ("--chosen", "a\udc80", "--rejected", "b"),
        ("--chosen", "a", "--rejected", "b", "--profile", "../x"),
    ],
)
def test_add_refuses_what_is_no_verdict(run, home, arguments):
    result = run("feedback", "add", "--prompt", "q", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert not home.feedback_db.exists()


def test_list_pages_from_the_newest_and_shows_no_control_characters(run):
    for number in range(5):
        run("feedback", "add", "--prompt", f"question\x1b[31m {number}", "--completion", "a [bold]b[/bold]", "--up")
    page = run("feedback", "list", "--limit", "2", "--offset", "1")
    assert [line.split()[0] for line in page.stdout.splitlines()[1:]] == ["4", "3"]
    assert "\x1b" not in page.stdout and "[bold]b[/bold]" in page.stdout
    assert "--offset 3" in page.stderr
    document = json.loads(run("feedback", "list", "--json", "--limit", "1").stdout)
    assert (document["total"], document["rows"][0]["id"]) == (5, 5)
    assert document["rows"][0]["row"]["label"] is True
    assert run("feedback", "list", "--profile", "none").stderr == "No feedback for none yet.\n"


def test_stats_tell_what_training_makes_of_the_rows(run):
    for answer, verdict in (("a", "--up"), ("b", "--down"), ("c", "--up")):
        run("feedback", "add", "--prompt", "q", "--completion", answer, verdict)
    document = json.loads(run("feedback", "stats", "--json").stdout)
    assert (document["rows"], document["pairs"], document["ratings"]) == (3, {"opposed": 1}, 1)
    assert "1 pair, 1 single rating" in run("feedback", "stats").stdout


def test_export_and_import_lose_nothing(run, home, mixed, tmp_path):
    run("feedback", "import", str(mixed))
    text = run("feedback", "export").stdout
    assert len(text.splitlines()) == 2
    out = tmp_path / "out.jsonl"
    assert json.loads(run("feedback", "export", "--out", str(out), "--json").stdout)["rows"] == 2
    assert out.read_text() == text
    assert stat.S_IMODE(os.stat(out).st_mode) == 0o600
    assert run("feedback", "import", str(out), "--profile", "copy").exit_code == 0
    with FeedbackLog(home) as log:
        assert [*log.rows("copy")] == [*log.rows("default")]
    document = json.loads(run("feedback", "export", "--json").stdout)
    assert [json.dumps(row, ensure_ascii=False) for row in document["rows"]] == text.splitlines()


def test_forget_by_id_text_or_all_and_only_with_a_yes(run, home):
    for number in range(4):
        run("feedback", "add", "--prompt", f"question {number}", "--completion", "Answer", "--up")
    refused = run("feedback", "forget", "--all")
    assert refused.exit_code == 2 and "--yes" in refused.stderr
    assert json.loads(run("feedback", "forget", "1", "--yes", "--json").stdout) == {
        "profile": "default",
        "forgotten": 1,
        "rows": 3,
    }
    assert run("feedback", "forget", "--matching", "QUESTION 2", "-y").stdout == "1 row forgotten; 2 left.\n"
    assert run("feedback", "forget", "99", "--yes").exit_code == 2
    assert run("feedback", "forget", "1", "--all", "--yes").exit_code == 2
    assert run("feedback", "forget", "--yes").exit_code == 2
    assert run("feedback", "forget", "--all", "--yes").stdout == "2 rows forgotten; 0 left.\n"


def test_a_damaged_log_is_one_line_and_exit_2(run, home):
    run("feedback", "add", "--prompt", "q", "--completion", "a", "--up")
    for leftover in home.root.glob("feedback.db-*"):
        leftover.unlink()
    home.feedback_db.write_bytes(b"not a database" * 1000)
    for verb in ("list", "stats", "export"):
        result = run("feedback", verb)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
