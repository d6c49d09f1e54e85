import dataclasses
import inspect
import io
import json
import re
from pathlib import Path

import pytest
from cli_double import DoubleAssistant, REPORT

from edge_align.assistant import Assistant
from edge_align.cli.output import stages
from edge_align.cli.report import accuracy_in_words, next_command, show_report
from edge_align.errors import PackMissing
from edge_align.personalize import evaluate, personalize, PersonalizeReport
from edge_align.simulation.prompts import compare_prompts
from edge_align.store import FeedbackLog
from edge_align_export.pack import build_pack


def test_the_double_takes_and_gives_what_the_engine_does():
    for name in ("open", "set_profile", "stream", "rate", "prefer", "learn"):
        real = inspect.signature(getattr(Assistant, name)).parameters
        double = inspect.signature(getattr(DoubleAssistant, name)).parameters
        assert {*double} <= {*real}, name
        assert all(real[key].kind == double[key].kind for key in double), name
    assert {*REPORT} == {field.name for field in dataclasses.fields(PersonalizeReport)}


def test_personalize_passes_its_options_and_prints_the_document(run, engine, home):
    result = run(
        *("personalize", "--feedback", "a.jsonl", "--feedback", "-", "--profile", "work", "--model", "m.gguf"),
        *("--user", "u", "--kl-budget", "0.5", "--seed", "4", "--no-activate", "--force", "--json"),
        input="stdin rows",
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == REPORT | {"profile": "work"}
    (asked,) = engine.asked
    assert [source.name for source in asked["sources"]] == ["a.jsonl", "stdin"]
    assert asked["sources"][0].open == Path("a.jsonl")
    assert isinstance(asked["sources"][1].open, io.IOBase)
    assert {*asked} <= {*inspect.signature(personalize).parameters}
    assert (asked["home"], asked["profile"], asked["model"], asked["user"]) == (home, "work", "m.gguf", "u")
    config = asked["config"]
    assert (config.kl_budget, config.seed, config.activate, config.force) == (0.5, 4, False, True)


def test_personalize_without_files_learns_from_the_log(run, engine):
    assert run("personalize").exit_code == 0
    (asked,) = engine.asked
    assert (asked["sources"], asked["profile"], asked["model"]) == ([], "default", None)
    assert asked["config"].activate is True


def test_the_report_in_words(run, engine):
    assert run("personalize").stdout.splitlines() == [
        "Rows      12 read, 10 used, 2 dropped",
        "          a.jsonl:4: chosen is empty",
        "          a.jsonl:4: chosen is empty",
        "Log       11 rows, 1 of those read were there already",
        "Pairs     10 (9 preference, 1 edit), and 1 single rating",
        "Answers   2 % lie outside what the latent pack covers",
        "Accuracy  predicts 87 % of 10 held-out preferences (95 % interval 79-92 %), chance p = .005",
        "Strength  scale 2.31, predicted KL 0.25 nats per token; its answers have 1.12 x the base's NLL, "
        "the same words 1.08 x as often",
        "Time      read 0.1 s, encode 1.5 s, fit 0.2 s, together 1.9 s",
        "Profile   default version 3, 1.2 KiB, active",
        'Next      edge-align generate "How do I get better at cooking?" --compare',
    ]


def test_a_refused_and_a_collecting_report_say_why_and_what_to_do(capsys):
    refused = REPORT | {
        "profile": "work",
        "activated": False,
        "state": "refused",
        "reason": "it cannot be told from chance; about 30 more verdicts are needed",
        "heldout": {"accuracy": 0.55, "ci_low": 0.4, "ci_high": 0.7, "p": 0.31, "n": 20},
    }
    show_report(refused)
    text = capsys.readouterr().out
    assert "predicts 55 % of 20 held-out preferences (95 % interval 40-70 %), chance p = .310" in text
    assert "not active: it cannot be told from chance; about 30 more verdicts are needed" in text
    assert "Next      edge-align compare --profile work" in text
    collecting = REPORT | {"activated": False, "state": "collecting", "version": None, "heldout": None, "scale": None}
    collecting |= {"outside_support": None, "reliability": None}
    show_report(collecting | {"reason": "5 of at least 8 verdicts", "predicted_kl": None, "profile_bytes": 0})
    text = capsys.readouterr().out
    assert "Accuracy  not tested yet" in text and "5 of at least 8 verdicts" in text and "Strength" not in text


def test_a_version_that_was_only_kept_is_offered_for_use():
    kept = REPORT | {"activated": False, "state": "learnt"}
    assert next_command(kept) == "edge-align profiles use default --version 3"


def test_a_p_of_one_keeps_its_one():
    assert accuracy_in_words(REPORT["heldout"] | {"p": 1.0}).endswith("chance p = 1.000")


@pytest.mark.parametrize("arguments", [("--kl-budget", "x"), ("--seed", "1.5"), ("--nothing",)])
def test_personalize_refuses_wrong_usage(run, engine, arguments):
    assert run("personalize", *arguments).exit_code == 2
    assert engine.asked == []


def rows(home, profile="default"):
    with FeedbackLog(home) as log:
        return [*log.rows(profile)]


def shown_answers(output):
    return [line for line in output.splitlines() if line.startswith("[")]


def test_each_pick_is_logged_and_the_profile_learns_at_the_end(run, engine, home):
    result = run("compare", "--rounds", "4", "--profile", "work", input="a\nnonsense\nB\ns\nq\n")
    assert result.exit_code == 0
    answers = shown_answers(result.stdout)
    picked = rows(home, "work")
    assert [(row.origin, row.model) for row in picked] == [("compare", "double")] * 2
    assert [row.prompt[0].content for row in picked] == [*compare_prompts()[:2]]
    assert [f"[A] {picked[0].chosen}", f"[B] {picked[0].rejected}"] == answers[:2]
    assert [f"[A] {picked[1].rejected}", f"[B] {picked[1].chosen}"] == answers[2:4]
    assert all("base answers" in line for line in answers)
    (asked,) = engine.asked
    assert (asked["profile"], asked["sources"]) == ("work", [])
    assert "Profile   work version 3" in result.stdout


def test_the_two_answers_come_in_random_order(run, engine, home):
    run("compare", "--rounds", "20", "--prompt", "Hi", input="a\n" * 20)
    seeds = [(int(row.chosen.split()[-1]), int(row.rejected.split()[-1])) for row in rows(home)]
    assert len(seeds) == 20
    assert 3 <= sum(first < second for first, second in seeds) <= 17  # both orders; missed by chance once in 2,500


def test_own_prompts_take_turns(run, engine, home):
    run("compare", "--rounds", "3", "--prompt", "One?", "--prompt", "Two?", input="a\nb\na\n")
    assert [row.prompt[0].content for row in rows(home)] == ["One?", "Two?", "One?"]


def test_without_a_pick_nothing_is_learnt(run, engine, home):
    result = run("compare", "--json", input="s\n")
    assert json.loads(result.stdout) == {"profile": "default", "picked": 0, "skipped": 1, "report": None}
    assert engine.asked == [] and rows(home) == []


def test_compare_in_json_is_one_document(run, engine):
    result = run("compare", "--rounds", "1", "--json", input="a\n")
    assert json.loads(result.stdout) == {"profile": "default", "picked": 1, "skipped": 0, "report": REPORT}
    assert len(shown_answers(result.stderr)) == 2


def test_equal_answers_are_not_shown(run, engine):
    engine.same_answers = True
    result = run("compare", "--rounds", "2", "--json", input="a\n")
    assert json.loads(result.stdout)["skipped"] == 2
    assert shown_answers(result.stderr) == []


def test_compare_says_before_the_first_round_when_the_base_cannot_learn(run, engine, monkeypatch):
    def missing(_base, _home):
        raise PackMissing("double has no latent pack yet")

    monkeypatch.setattr("edge_align.registry.find_pack", missing)
    result = run("compare", input="a\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "Error: double has no latent pack yet\n"


@pytest.mark.parametrize(
    "arguments", [("--rounds", "0"), ("--temperature", "0"), ("--prompt", " "), ("--profile", "a/b")]
)
def test_compare_refuses_what_cannot_work(run, engine, arguments):
    result = run("compare", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ") and engine.opened == []


def test_eval_says_how_often_the_profile_was_right(run, home, monkeypatch):
    asked = {}

    def double(**arguments):
        inspect.signature(evaluate).bind(**arguments)
        asked.update(arguments)
        rows = {"read": 42, "used": 40, "dropped": REPORT["rows"]["dropped"], "dropped_more": 0}
        heldout = {"accuracy": 0.75, "ci_low": 0.6, "ci_high": 0.86, "n": 40}
        return {"profile": "work", "version": 2, "model": "double", "rows": rows, "heldout": heldout}

    monkeypatch.setattr("edge_align.personalize.evaluate", double)
    result = run("eval", "--feedback", "held.jsonl", "--profile", "work", "--user", "u", "--model", "m")
    assert result.stdout.splitlines() == [
        "Rows      42 read, 40 used, 2 dropped",
        "          a.jsonl:4: chosen is empty",
        "          a.jsonl:4: chosen is empty",
        "Profile   work version 2 on double",
        "Accuracy  predicts 75 % of 40 held-out preferences (95 % interval 60-86 %)",
    ]
    assert (asked["profile"], asked["user"], asked["model"]) == ("work", "u", "m")
    assert json.loads(run("eval", "--feedback", "held.jsonl", "--json").stdout)["version"] == 2
    assert run("eval").exit_code == 2


def test_export_pack_tells_how_long_it_takes_and_what_came_out(run, home, base_path, monkeypatch, tmp_path):
    asked = {}

    def double(**arguments):
        inspect.signature(build_pack).bind(**arguments)
        asked.update(arguments)
        for stage in ("sample", "sample", "metric"):
            arguments["progress"](stage, 0.5)
        return {
            "pack": str(arguments["out"] or "somewhere"),
            "bytes": 2048,
            "k": 64,
            "answers": 1280,
            "seconds": {"sample": 61.0, "metric": 2.5},
            "health": {"r2": 0.71234},
        }

    monkeypatch.setattr("edge_align_export.pack.build_pack", double)
    result = run("export", "pack", "--model", str(base_path), "--threads", "2")
    assert result.stdout.splitlines() == [
        "Pack     somewhere (2.0 KiB)",
        "Latents  64, from 1,280 answers",
        "Time     sample 61.0 s, metric 2.5 s, together 63.5 s",
        "Health   r2 0.712",
        f"Next     edge-align personalize --model {base_path} --feedback FILE",
    ]
    assert "minutes on this machine" in result.stderr
    assert result.stderr.splitlines()[1:] == ["- sample", "- metric"]
    assert (asked["model"], asked["recipe"], asked["out"], asked["fast"]) == (str(base_path), "linear", None, False)
    fast = run("export", "pack", "--model", str(base_path), "--fast", "--out", str(tmp_path / "pack"), "--json")
    assert json.loads(fast.stdout)["pack"] == str(tmp_path / "pack")
    assert asked["fast"] is True
    sized = ("--recipe", "clap", "--steps", "30", "--batch", "4", "--prompts", "64", "--answers", "12")
    smaller = run("export", "pack", "--model", str(base_path), *sized)
    assert smaller.exit_code == 0
    first, second = (int(re.search(r"about ([\d,]+) minutes", one.stderr)[1]) for one in (result, smaller))
    assert 0.4 * first < second < 0.7 * first  # 768 answers for 2,432
    assert (asked["recipe"], asked["config"].prompts, asked["config"].answers) == ("clap", 64, 12)
    assert (asked["clap"].steps, asked["clap"].prompts) == (30, 4)
    assert run("export", "pack", "--model", str(base_path), "--recipe", "score", "--readout", "a").exit_code == 0
    assert (asked["recipe"], asked["readout"]) == ("score", Path("a").absolute())
    for wrong in (("--model", "no-such-id"), ("--recipe", "linear"), ("--model", "x", "--recipe", "other")):
        assert run("export", "pack", *wrong).exit_code == 2
    for wrong in (
        ("--steps", "3"),
        ("--batch", "3"),
        ("--readout", "a"),
        ("--recipe", "clap", "--steps", "0"),
        ("--answers", "1"),
    ):
        assert run("export", "pack", "--model", str(base_path), *wrong).exit_code == 2


def test_a_log_hears_of_a_long_stage_every_minute(monkeypatch, capsys):
    clock = iter([0.0, 59.0, 60.0, 61.0, 119.0, 121.0])
    monkeypatch.setattr("edge_align.cli.output.time.monotonic", lambda: next(clock))
    with stages(lines=True) as progress:
        for stage, done in [("read", 0), ("read", 0.2), ("read", 0.25), ("solve", 0), ("read", 0.4), ("solve", 1)]:
            progress(stage, done)
    assert capsys.readouterr().err.splitlines() == ["- read", "- read: 25%", "- solve", "- solve: 100%"]
