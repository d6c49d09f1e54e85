import json

import numpy as np
import pytest

from edge_align.profiles import ProfileStore


@pytest.fixture
def store(home):
    """Profile `me` with versions 1 and 2, of which 2 is active, and in use."""
    store = ProfileStore(home)
    for number in (1, 2):
        manifest = {"model": "double", "heldout": {"accuracy": 0.8 + number / 100, "n": 50}}
        store.save("me", {"mean": np.full(4, number, dtype=np.float32)}, manifest)
        store.activate("me", number)
    store.use("me")
    return store


def document(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_list_shows_profiles_and_logs_without_one(run, store):
    run("feedback", "add", "--profile", "new", "--prompt", "q", "--completion", "a", "--up")
    listed = document(run("profiles", "list", "--json"))["profiles"]
    assert [(one["name"], one["current"], one["active"], one["versions"], one["feedback_rows"]) for one in listed] == [
        ("me", True, 2, 2, 0),
        ("new", False, None, 0, 1),
    ]
    lines = run("profiles", "list").stdout.splitlines()
    assert lines[1].split()[:4] == ["me", "in", "use", "2"]
    assert lines[2].split()[:2] == ["new", "none"]


def test_an_empty_home_lists_no_profiles(run, home):
    result = run("profiles", "list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "personalize" in result.stderr
    assert document(run("profiles", "list", "--json")) == {"profiles": []}
    assert not home.root.exists()


def test_show_is_about_the_profile_in_use_unless_named(run, store):
    shown = document(run("profiles", "show", "--json"))
    assert (shown["name"], shown["version"], shown["active"], shown["versions"]) == ("me", 2, 2, [1, 2])
    earlier = document(run("profiles", "show", "me", "--version", "1", "--json"))
    assert earlier["manifest"]["heldout"]["accuracy"] == 0.81
    assert "2 (active)" in run("profiles", "show").stdout
    assert run("profiles", "show", "you").exit_code == 2
    assert run("profiles", "show", "me", "--version", "7").exit_code == 2


def test_use_chooses_a_profile_a_version_or_none(run, store):
    assert run("profiles", "use", "--none").stdout == "No profile is in use.\n"
    assert store.current() is None
    assert run("profiles", "show").exit_code == 2
    assert document(run("profiles", "use", "me", "--version", "1", "--json")) == {"current": "me", "active": 1}
    assert (store.current(), store.active_version("me")) == ("me", 1)
    assert run("profiles", "use", "me").stdout == "me is in use, version 1.\n"
    for arguments in ((), ("me", "--none"), ("you",), ("--none", "--version", "1")):
        assert run("profiles", "use", *arguments).exit_code == 2


def test_history_and_undo(run, store):
    versions = document(run("profiles", "history", "--json"))["versions"]
    assert [(one["version"], one["active"]) for one in versions] == [(1, False), (2, True)]
    assert "81 % of 50" in run("profiles", "history", "me").stdout
    assert run("profiles", "undo").stdout == "me is at version 1 again.\n"
    assert store.active_version("me") == 1
    assert run("profiles", "undo", "--json").exit_code == 2


def test_rename_takes_the_feedback_along(run, store):
    run("feedback", "add", "--profile", "me", "--prompt", "q", "--completion", "a", "--up")
    renamed = document(run("profiles", "rename", "me", "you", "--json"))
    assert renamed == {"name": "you", "before": "me", "feedback_rows": 1}
    assert (store.names(), store.current()) == (("you",), "you")
    assert document(run("feedback", "stats", "--profile", "you", "--json"))["rows"] == 1


def test_rename_onto_another_profile_changes_nothing(run, store):
    run("feedback", "add", "--profile", "me", "--prompt", "q", "--completion", "a", "--up")
    run("feedback", "add", "--profile", "you", "--prompt", "q", "--completion", "a", "--up")
    for before, new in (("me", "you"), ("you", "me"), ("nobody", "else"), ("me", "../x")):
        assert run("profiles", "rename", before, new).exit_code == 2
    assert store.names() == ("me",)
    assert document(run("feedback", "stats", "--profile", "me", "--json"))["rows"] == 1


def test_rm_needs_a_yes_and_keeps_the_feedback_unless_told(run, store):
    run("feedback", "add", "--profile", "me", "--prompt", "q", "--completion", "a", "--up")
    assert run("profiles", "rm", "me").exit_code == 2
    assert store.names() == ("me",)
    removed = run("profiles", "rm", "me", "--yes")
    assert removed.stdout == "me is gone.\n" and "feedback forget --all --profile me" in removed.stderr
    assert store.names() == ()
    assert run("profiles", "rm", "me", "--yes").exit_code == 2
    assert document(run("profiles", "rm", "me", "--yes", "--with-feedback", "--json"))["forgotten"] == 1


def test_export_and_import_on_another_home(run, store, tmp_path):
    file = tmp_path / "me.edge-align"
    exported = document(run("profiles", "export", "me", str(file), "--json"))
    assert (exported["version"], exported["size_bytes"]) == (2, file.stat().st_size)
    assert run("profiles", "export", "me", str(file)).exit_code == 2
    assert run("profiles", "export", "me", str(file), "--version", "1", "--force").exit_code == 0
    other = ("--home", str(tmp_path / "other"))
    assert document(run(*other, "profiles", "import", str(file), "--json")) == {
        "name": "me",
        "version": 1,
        "activated": True,
    }
    assert run(*other, "profiles", "import", str(file), "--no-activate").stdout == "me version 2 is kept.\n"
    assert document(run(*other, "profiles", "show", "me", "--json"))["active"] == 1
    file.write_bytes(file.read_bytes()[:-30])
    assert run(*other, "profiles", "import", str(file)).exit_code == 2
    assert run(*other, "profiles", "import", str(tmp_path / "nothing")).exit_code == 2


def test_a_damaged_version_is_listed_and_undo_passes_over_it(run, store, home):
    (home.profiles_dir / "me" / "v0002" / "encoder.safetensors").write_bytes(b"x")
    assert run("profiles", "show").exit_code == 2
    damaged = document(run("profiles", "history", "--json"))["versions"][1]
    assert "damaged" in damaged["damage"]
    assert run("profiles", "undo").stdout == "me is at version 1 again.\n"
