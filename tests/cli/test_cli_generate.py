import json

import pytest


def test_the_answer_streams_to_stdout_and_nothing_else_does(run, engine):
    result = run("generate", "Why is the sky blue?", "--seed", "5")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "default answers 'Why is the sky blue?' with seed 5\n"


def test_json_has_the_text_and_what_it_cost(run, engine):
    result = run("generate", "Hi", "--profile", "work", "--strength", "0.5", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "text": "work answers 'Hi' with seed 0",
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "ttft_sec": 0.25,
        "generation_tps": 2.0,
        "prompt_tps": 28.0,
        "profile": "work",
        "version": 1,
        "strength": 0.5,
        "model": "double",
        "seed": 0,
    }
    assert result.stdout.startswith('{\n  "text"')


def test_without_a_profile_the_base_answers_and_says_so_unless_asked_for(run, engine):
    assert run("generate", "Hi", "--no-profile").stdout == "base answers 'Hi' with seed 0\n"
    document = json.loads(run("generate", "Hi", "--no-profile", "--json").stdout)
    assert (document["profile"], document["version"], document["strength"]) == (None, None, 0.0)
    engine.current = None
    result = run("generate", "Hi")
    assert (result.exit_code, result.stdout) == (0, "base answers 'Hi' with seed 0\n")
    assert result.stderr == "Note: no profile is in use; this is the base's answer.\n"


def test_the_prompt_can_come_from_stdin(run, engine):
    assert run("generate", "-", input="Grüß\ndich\n").stdout == "default answers 'Grüß\ndich' with seed 0\n"
    result = run("generate", "-", input=b"\xff\xfe")
    assert (result.exit_code, result.stderr) == (2, "Error: the prompt on stdin is not UTF-8 text\n")


def test_compare_shows_both_with_the_same_seed(run, engine):
    result = run("generate", "Hi", "--compare", "--seed", "3")
    assert result.stdout == (
        "base\n----\nbase answers 'Hi' with seed 3\n"
        "\ndefault version 3, strength 1\n-----------------------------\ndefault answers 'Hi' with seed 3\n"
    )
    document = json.loads(run("generate", "Hi", "--compare", "--seed", "3", "--json").stdout)
    assert [*document] == ["base", "personal"]
    assert (document["base"]["profile"], document["personal"]["profile"]) == (None, "default")
    assert document["base"]["seed"] == document["personal"]["seed"] == 3
    assert document["base"]["strength"] == 0.0


def test_compare_needs_a_profile(run, engine):
    engine.current = None
    result = run("generate", "Hi", "--compare")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "personalize" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--temperature", "-1"), "temperature is -1.0; it must lie between 0 and 10"),
        (("--temperature", "nan"), "temperature is nan"),
        (("--top-k", "0"), "top-k is 0"),
        (("--top-p", "1.5"), "top-p is 1.5"),
        (("--max-tokens", "0"), "max-tokens is 0"),
        (("--seed", "-1"), "seed is -1"),
        (("--strength", "5"), "strength is 5.0; it must lie between -4 and 4"),
        (("--n-ctx", "1"), "n-ctx is 1"),
        (("--threads", "-2"), "threads is -2"),
        (("--profile", "nobody"), "unknown profile nobody"),
        (("--profile", "work", "--no-profile"), "cannot be combined"),
        (("--system", " "), "system prompt is empty"),
    ],
)
def test_options_out_of_range_are_one_line_and_exit_2(run, engine, arguments, says):
    result = run("generate", "Hi", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("prompt", ["", "  \n", "a\x00b", "a\udc80b"])
def test_a_prompt_that_cannot_be_answered_is_refused_before_the_engine_opens(run, engine, prompt):
    result = run("generate", "--", prompt)
    assert result.exit_code == 2 and result.stderr.startswith("Error: prompt ")
    assert engine.opened == []


def test_model_and_runtime_options_reach_the_engine(run, engine):
    run(
        "generate",
        "Hi",
        "--model",
        "some.gguf",
        "--n-ctx",
        "512",
        "--threads",
        "3",
        "--n-gpu-layers",
        "-1",
        "--engine",
        "onnx",
    )
    (opened,) = engine.opened
    runtime = opened["runtime"]
    assert (opened["model"], runtime.n_ctx, runtime.n_threads, runtime.n_gpu_layers) == ("some.gguf", 512, 3, -1)
    assert opened["engine"] == "onnx"
