"""`edge-align bench`: documents and words, on the fake engine and on the real base."""

import json

import pytest

from edge_align.runtime.fake import FakeBackend


@pytest.fixture
def fake_engine(monkeypatch):
    opened = []

    def open_backend(base, runtime, *, engine=None):
        opened.append((base.id, runtime.n_threads, engine))
        return FakeBackend()

    monkeypatch.setattr("edge_align.engines.open_backend", open_backend)
    return opened


def test_latency_says_how_fast_and_against_what(run, fake_engine):
    result = run("bench", "latency", "--runs", "3", "--tokens", "6", "--threads", "1", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert (found["engine"], found["runs"], found["tokens"]) == ("fake", 3, 6)
    assert [row["prompt_tokens"] for row in found["first_token"]] == [32, 256]
    assert found["personal_over_base"]["ci_low"] <= found["personal_over_base"]["median"]
    assert [(threads, engine) for _, threads, engine in fake_engine] == [(1, None)]
    lines = run("bench", "latency", "--runs", "3", "--tokens", "6").stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["Base", "Decoding", "", "First token", "", "First token", ""]


@pytest.mark.parametrize(
    "options", [("latency", "--runs", "1"), ("latency", "--tokens", "0"), ("personalize", "--pairs", "7")]
)
def test_sizes_out_of_range_are_refused(run, options):
    result = run("bench", *options)
    assert result.exit_code == 2 and options[1] in result.stderr and result.stderr.count("\n") == 1


def test_personalize_times_its_stages_on_the_real_base_and_leaves_nothing(run, home):
    result = run("bench", "personalize", "--pairs", "12", "--runs", "1", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["pairs"], list(found["stages_sec"])) == (12, ["encode", "fit", "calibrate", "check"])
    assert found["total_sec"] == pytest.approx(sum(found["stages_sec"].values()))
    assert not home.root.exists() or not any((home.root / "profiles").glob("*"))
