"""The bench scripts start, run at tiny sizes, and end with a JSON document; their own arithmetic is right."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from edge_align.bases import BaseModel, find_base
from edge_align.config import SamplingConfig
from edge_align.features import n_feature
from edge_align.latent_dpo import LatentFeedback
from edge_align.pack import save_pack
from edge_align.runtime.torch_ref import LlamaReference
from edge_align.runtime.torch_sample import sample
from edge_align.simulation.prompts import prompts
from edge_align_export.clap_loss import make_batch
from scripts.tiny_models import write_gguf

BENCH = Path(__file__).parent.parent / "bench"
SCRIPTS = sorted(path.name for path in BENCH.glob("*.py") if "main(run, " in path.read_text())
K, INPUTS = 6, 3


def start(script: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(BENCH / script), *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(script: str, *options: str) -> dict[str, Any]:
    """The JSON document that is the last line of stdout."""
    process = start(script, *options)
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    document: dict[str, Any] = json.loads(out.splitlines()[-1])
    return document


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """Modules of the bench, imported as its scripts import each other."""
    import importlib

    names = (
        "bipo",
        "common",
        "energy",
        "latent_dpo_vs_logistic",
        "nulls",
        "packs",
        "report",
        "report_plots",
        "report_quality",
        "scale",
        "serving",
        "serving_learning",
        "serving_soak",
        "slots",
        "lora_dpo",
        "trl_dpo",
        "training_time",
    )
    before = list(sys.path)
    sys.path.insert(0, str(BENCH))
    yield {name: importlib.import_module(name) for name in names}
    sys.path[:] = before
    for name in names:
        sys.modules.pop(name, None)


def write_pack(folder: Path, base: BaseModel, *, size: float = 1e-3) -> None:
    """A pack with random numbers that fits the base; size: of its directions."""
    rng = np.random.default_rng(0)
    decoder = rng.standard_normal((K, base.n_layer, base.d_model)) * size
    decoder[:, 0] = 0
    features, d = n_feature(base.d_model), base.d_model
    tensors = {
        "readout": rng.standard_normal((features, K)) * 0.05,
        "feature_mean": np.zeros(features),
        "baseline": np.zeros((d + 1, K)),
        "prompt_projection": rng.standard_normal((d + 1, INPUTS)) * 0.05,
        "variance": np.full(K, 0.5),
        "decoder": decoder,
        "metric": np.eye(K) * 0.01,
        "kl_curve": np.array([0.0, 1.0, 0.0]),
    }
    manifest = {"base_hash": base.hash, "n_layer": base.n_layer, "d_model": d, "k": K}
    save_pack(folder, tensors=tensors, manifest=manifest)


def write_answers(common: ModuleType, options: tuple[str, ...]) -> None:
    """Answers of different lengths to 12 training prompts, where a script with these options looks for them."""
    answers = ["Yes.", "Bread is fine.", "I would think that bread is fine, on most days.", "Bread. " * 20]
    with common.Bench(common.parser("").parse_args(options)) as opened:
        store = common.train_store(opened)
    for i, prompt in enumerate(prompts("train")[:12]):
        store.add({"prompt": prompt, "answers": [{"text": f"{text} {i}", "tokens": [1, 2]} for text in answers]})


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, bench: dict[str, ModuleType]) -> tuple[str, ...]:
    """Options that point a script at a random pack and at answers of different lengths to 12 training prompts."""
    root = tmp_path_factory.mktemp("bench")
    write_pack(root / "packs" / "random", find_base())
    options = ("--home", str(root), "--threads", "1", "--quick")
    write_answers(bench["common"], options)
    document = run("answers.py", *options, "--set", "train")
    assert document["train"] == {"prompts": 12, "answers": 48, "mean_tokens": 2.0}  # none was missing
    return options


@pytest.fixture(scope="module")
def tiny_workplace(tmp_path_factory: pytest.TempPathFactory, bench: dict[str, ModuleType]) -> tuple[str, ...]:
    """The same for a tiny base with random weights."""
    root = tmp_path_factory.mktemp("tiny-bench")
    model = write_gguf(root / "tiny.gguf", "llama")
    write_pack(root / "packs" / "random", find_base(str(model)), size=0.05)
    options = ("--home", str(root), "--threads", "1", "--quick", "--model", str(model))
    write_answers(bench["common"], options)
    return options


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_explains_itself(
    name: str, bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCH / name), run_name="__main__")
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "--quick" in out and "--save" in out


def test_the_gate_bench_ends_with_its_counts(workplace: tuple[str, ...]) -> None:
    document = run("nulls.py", *workplace, "--part", "gate", "--sizes", "8", "--users", "short")
    assert document["script"] == "nulls" and document["options"]["quick"] is True
    assert {(row["kind"], row["draws"]) for row in document["gate"]["rows"]} == {("shuffled", 1), ("true", 1)}
    assert document["gate"]["level"] == 0.02
    assert document["pack_hash"].startswith("sha256:")
    assert not [text for text in walk(document) if isinstance(text, str) and workplace[1] in text]


def walk(value: Any) -> Iterator[Any]:
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield item
        yield from walk(item)


def test_learning_is_timed_stage_by_stage_and_as_a_whole(workplace: tuple[str, ...]) -> None:
    document = run("personalize_time.py", *workplace, "--user", "long_words")
    assert document["pairs"] == 12 and document["cold_sec"] > 0
    for found in document["warm_sec"].values():
        assert found["sum"] == pytest.approx(found["encode"] + found["fit"] + found["calibrate"])  # of one run
        assert found["check"] > 0 and found["floor"] > 0


def test_a_new_person_is_timed_stage_by_stage_beside_what_trains_through_the_base(
    tiny_workplace: tuple[str, ...],
) -> None:
    found = run("training_time.py", *tiny_workplace, "--user", "short", "--no-answers")
    assert found["pairs"] == 8 and len(found["edge_align_runs_sec"]) == 4
    assert found["stages_sec"].keys() == {"encode", "fit", "calibrate", "check"}
    assert max(found["stages_sec"].values()) < found["edge_align_sec"]
    weights = found["encoder"]["weight_bytes"] / (2 if found["machine"]["bf16"] else 4)
    assert found["encoder"]["gflop"] == pytest.approx(2e-9 * weights * found["encoder"]["tokens"])
    assert found["ours_over_it"].keys() == {"LoRA-DPO", "P-tuning-DPO", "LoRA-DPO by TRL"}


def test_more_pairs_than_there_are_keep_their_lengths_and_repeat_no_text(bench: dict[str, ModuleType]) -> None:
    from edge_align.records import PreferencePair, user_prompt

    pairs = [PreferencePair(user_prompt("?"), "a b c", "d e f g"), PreferencePair(user_prompt("!"), "h i j", "k l m")]
    made = bench["training_time"].reordered(pairs, 5)
    assert made[:2] == pairs and [pair.chosen for pair in made] == ["a b c", "h i j", "b c a", "i j h", "c a b"]
    assert len({pair.rejected for pair in made}) == 5


def test_what_people_would_use_instead_is_judged_beside_ours(workplace: tuple[str, ...]) -> None:
    rows = run("arms.py", *workplace, "--users", "short")["rows"]
    assert [row["arm"] for row in rows] == [
        "written preference",
        "three pairs in the prompt",
        "mean-difference vector",
        "edge-align",
        "edge-align + written preference",
    ]
    ours = rows[3]
    assert ours["ours_over_it"] == 0.5 and ours["prompt_tokens"] == 0  # against itself every question is a tie
    assert rows[1]["prompt_tokens"] > 20 and rows[1]["prompt_tokens"] > rows[0]["prompt_tokens"]
    assert all(0 <= row["win_rate"] <= 1 and row["nll"] > 0 for row in rows)


def test_the_comparison_with_logistic_regression_ends_with_both_accuracies(workplace: tuple[str, ...]) -> None:
    (row,) = run("latent_dpo_vs_logistic.py", *workplace)["rows"]
    assert row["pairs"] == 10 and 0 <= row["latent_dpo"] <= 1 and 0 <= row["logistic"] <= 1
    assert row["gain"] == pytest.approx(row["latent_dpo"] - row["logistic"])


def test_the_load_bench_finds_every_answer_equal_to_its_single_run(workplace: tuple[str, ...]) -> None:
    found = run("server_load.py", *workplace, "--part", "equality")["equality"]
    assert (found["requests"], found["errors"], found["different"]) == (4, 0, 0)
    assert found["tokens_per_sec"].keys() == found["ttft_sec"].keys() == {"profiles", "base"}
    assert found["profiles_over_base"]["median"] > 0


def test_requests_come_in_at_their_moments_and_wait_for_no_answer(bench: dict[str, ModuleType]) -> None:
    serving, all_came = bench["serving"], threading.Barrier(3, timeout=60)

    class Patient:
        """Answers nobody before everybody has asked."""

        def stream(self, body: dict[str, Any]) -> Any:
            start = time.perf_counter()
            all_came.wait()
            return serving.Reply(200, start, time.perf_counter(), text=body["text"], whole=True)

    begin, offsets = time.perf_counter(), (0.0, 0.05, 0.1)
    replies = serving.arriving(Patient(), [{"text": str(i)} for i in range(3)], offsets)
    assert [reply.text for reply in replies] == ["0", "1", "2"] and all(reply.ok for reply in replies)
    assert all(reply.start - begin >= offset for reply, offset in zip(replies, offsets, strict=True))


def test_arrivals_are_timed_for_both_servers(workplace: tuple[str, ...]) -> None:
    pytest.importorskip("sse_starlette", reason="extra bench: llama-cpp-python's server")
    found = run("server_load.py", *workplace, "--part", "arrivals")["arrivals"]
    (row,) = found["rows"]
    assert (row["per_sec"], row["requests"], row["errors"]) == (2.0, 4, 0)
    for spread in row["servers"].values():
        assert 0 < spread["ttft_sec"]["p50"] <= spread["ttft_sec"]["p99"] <= spread["answer_sec"]["p99"]


def test_the_soak_counts_every_request_and_every_verdict(workplace: tuple[str, ...]) -> None:
    found = run("server_load.py", *workplace, "--part", "soak")["soak"]
    assert found["requests"] == sum(found["kinds"].values()) == sum(found["statuses"].values()) == 20
    assert found["unwanted"] == {} and found["survived"] and found["unfinished_at_the_end"] == 0
    assert found["verdicts"]["taken"] > 0
    assert found["verdicts"]["missing"] == found["verdicts"]["never_given"] == 0


def replies(bench: dict[str, ModuleType], *times: tuple[float, ...]) -> list[Any]:
    return [({}, bench["serving"].Reply(200, 0.0, 9.0, times=one, whole=True)) for one in times]


def test_gaps_are_those_between_neighbours_that_end_in_the_window(bench: dict[str, ModuleType]) -> None:
    found = replies(bench, (1.0, 2.0, 4.0, 7.0), (3.5,), (3.0, 6.0))
    gaps = bench["serving_learning"].gaps
    assert gaps(found, end=4.0) == [1.0, 2.0]
    assert gaps(found, start=4.0, end=6.5) == [3.0]
    assert gaps(found, start=6.5, end=9.0) == [3.0]


def test_the_answers_nearest_to_a_swap_are_those_that_ran_then(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, reply = bench["serving_learning"], bench["serving"].Reply
    monkeypatch.setattr(module, "NEAR", 3)
    spans = [(0.0, 3.0), (4.0, 6.0), (5.5, 8.0), (8.0, 9.0), (4.5, 5.5)]
    found = [({}, reply(200, start, end, whole=end != 5.5)) for start, end in spans]
    assert [(one.start, one.end) for _, one in module.nearest(found, 5.0)] == [(4.0, 6.0), (5.5, 8.0), (0.0, 3.0)]


def test_a_tail_that_is_twice_as_long_has_the_ratio_two(bench: dict[str, ModuleType]) -> None:
    gaps = np.random.default_rng(0).exponential(size=4000)
    found = bench["serving_learning"].tail_ratio(2 * gaps, gaps, draws=50)
    assert found["ratio"] == pytest.approx(2.0) and found["ci_low"] < 2.0 < found["ci_high"]


@pytest.mark.parametrize(("leave_after", "text", "whole"), [(None, "Hi you", True), (1, "Hi", False)])
def test_a_stream_is_read_to_its_end_or_until_enough_was_heard(
    bench: dict[str, ModuleType], leave_after: int | None, text: str, whole: bool
) -> None:
    events = [
        {"id": "x", "choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"id": "x", "choices": [{"delta": {"content": "Hi"}}]},
        {"id": "x", "choices": [{"delta": {"content": " you"}}]},
        {"id": "x", "choices": [{"delta": {}}], "edge_align": {"version": 3}},
        {"id": "x", "choices": [], "usage": {"completion_tokens": 2}},
    ]
    lines = [f"data: {line}\r\n".encode() for line in [*map(json.dumps, events), "[DONE]"]]
    reply = bench["serving"]._events([b": ping\n", *lines], 0.0, leave_after)
    assert (reply.text, reply.whole, reply.id, len(reply.times)) == (text, whole, "x", len(text.split()))
    assert (reply.tokens, reply.about) == ((2, {"version": 3}) if whole else (0, {}))


def test_the_same_request_number_is_the_same_request(bench: dict[str, ModuleType]) -> None:
    asked: list[Any] = []

    class Deaf:
        def stream(self, body: Any, **more: Any) -> Any:
            asked.append((body, more))
            return bench["serving"].Reply(0, 0.0, 0.0)

        def ask(self, *request: Any) -> Any:
            asked.append(request)
            return 500, {}

    outcomes = [bench["serving_soak"].one_request(Deaf(), ["a", "b"], n % 40, 0) for n in range(80)]
    assert asked[:40] == asked[40:] and not any(one.wanted for one in outcomes)
    assert {one.kind for one in outcomes} == {"answer", "verdict", "leaves", "bad", "long"}


def test_engines_agree_on_a_tiny_base_and_the_document_says_how_far(tiny_workplace: tuple[str, ...]) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
    document = run("parity.py", *tiny_workplace, "--users", "short,first_person")
    rows = {(row["engine"], row["vectors"]): row for row in document["logits"]}
    vectors = ("none", "random", "learnt (short)")
    assert rows.keys() == {(engine, name) for engine in ("onnx fp32", "llamacpp F16") for name in vectors}
    for name in vectors:
        onnx, native = rows["onnx fp32", name], rows["llamacpp F16", name]
        assert onnx["max_difference"] <= 1e-3 and onnx["same_greedy_text"] == 1.0 and onnx["agreement"] == 1.0
        assert onnx["positions"] == native["positions"] and native["max_difference"] < 0.05
    together = {row["engine"]: row for row in document["preferences"] if row["user"] == "all"}
    assert together.keys() == {"onnx int4", "llamacpp"}
    for row in together.values():
        assert row["pairs"] == 4 and len(row["changes"]) == 4
    assert together["llamacpp"]["error"] < min(0.2, together["onnx int4"]["error"])  # its file is not rounded
    for row in document["batch"]:
        assert row["rows"] == 2 and row["same_text"] == 1.0 and row["max_difference"] <= 1e-3


def test_a_script_without_training_answers_says_which_one_makes_them(
    tmp_path: Path, workplace: tuple[str, ...]
) -> None:
    process = start("nulls.py", *workplace, "--cache", str(tmp_path), "--part", "gate")
    out, err = process.communicate(timeout=280)
    assert process.returncode == 1 and not out
    assert err.strip() == "there are no training answers yet; run: python bench/answers.py --set train"


def test_kept_rows_survive_a_kill_in_the_middle_of_a_line(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    first = bench["common"].Kept(path)
    first.add({"a": 1})
    first.add({"a": 2})
    path.write_text(path.read_text() + '{"a": 3')
    second = bench["common"].Kept(path)
    assert second.rows == [{"a": 1}, {"a": 2}]
    second.add({"a": 4})
    assert bench["common"].Kept(path).rows == [{"a": 1}, {"a": 2}, {"a": 4}]


def test_logistic_regression_finds_the_penalised_optimum(bench: dict[str, ModuleType]) -> None:
    # one latent, differences of 2, 2 and -1: the optimum solves 4 s(-2w) - s(w) = l2 w, found here by bisection
    low, high, l2 = 0.0, 10.0, 0.5
    for _ in range(100):
        w = (low + high) / 2
        slope = 4 / (1 + math.exp(2 * w)) - 1 / (1 + math.exp(-w)) - l2 * w
        low, high = (w, high) if slope > 0 else (low, w)
    differences = np.array([[2.0], [2.0], [-1.0]], np.float32)
    feedback = pairs_only(differences, np.zeros_like(differences))
    assert bench["latent_dpo_vs_logistic"].logistic(feedback, l2) == pytest.approx([low], abs=1e-6)


def test_accuracy_counts_a_tie_as_half(bench: dict[str, ModuleType]) -> None:
    differences = np.array([[1.0], [1.0], [-1.0], [0.0]], np.float32)
    test = pairs_only(differences, np.zeros_like(differences))
    assert bench["latent_dpo_vs_logistic"].accuracy(np.array([3.0]), test) == 2.5 / 4


def pairs_only(chosen: np.ndarray, rejected: np.ndarray) -> LatentFeedback:
    n, none = len(chosen), np.zeros(0, np.float32)
    groups = np.arange(n)
    empty = np.zeros((0, chosen.shape[1]), np.float32)
    inputs = np.zeros((n, 1), np.float32)
    weight = np.ones(n, np.float32)
    return LatentFeedback(
        chosen, rejected, inputs, weight, groups, empty, none.astype(bool), inputs[:0], none, none.astype(int)
    )


def test_shuffled_verdicts_are_turned_round_about_half_the_time(bench: dict[str, ModuleType]) -> None:
    from edge_align.records import PreferencePair, user_prompt

    pairs = [PreferencePair(user_prompt("?"), "a", "b")] * 400
    turned = sum(pair.chosen == "b" for pair in bench["nulls"].shuffled(pairs, np.random.default_rng(0)))
    assert 160 <= turned <= 240  # four standard deviations


def test_rotary_layouts_are_each_others_reverse(bench: dict[str, ModuleType]) -> None:
    # head 0 of size 4 is rows 0-3: halves (0, 1 | 2, 3) interleave to 0, 2, 1, 3
    rows = torch.arange(8.0)[:, None].expand(8, 3)
    interleaved = bench["lora_dpo"].interleave(rows, 2)
    assert interleaved[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(bench["lora_dpo"].split_halves(interleaved, 2), rows)


def random_rows(seed: int) -> list[list[tuple[list[int], list[int]]]]:
    """Six pairs of random texts, as `lora_dpo.train` takes them."""
    rng = np.random.default_rng(seed)
    return [[(list(rng.integers(3, 60, 5)), list(rng.integers(3, 60, 7))) for _ in range(2)] for _ in range(6)]


def log_odds(model: Any, rows: Any, array: np.ndarray | None = None, before: Any = ()) -> float:
    """Of the chosen answers over the rejected ones, mean, by plain passes over whole texts."""
    total = 0.0
    for pair in rows:
        for sign, (prompt, answer) in zip((1, -1), pair, strict=True):
            logits = torch.from_numpy(model.score([*before, *prompt], answer, array))
            total += sign * float(logits.log_softmax(-1)[range(len(answer)), answer].sum())
    return total / len(rows)


def test_a_lora_and_virtual_tokens_do_in_the_reference_what_they_do_in_transformers(
    bench: dict[str, ModuleType], tiny_workplace: tuple[str, ...]
) -> None:
    from edge_align.runtime.torch_ref import LlamaReference

    lora, rows = bench["lora_dpo"], random_rows(0)
    with bench["common"].Bench(bench["common"].parser("").parse_args(tiny_workplace)) as opened:
        theirs, ours = lora.build_hf(opened), LlamaReference(opened.base.path)
    base = log_odds(ours, rows)
    prompt, answer = rows[0][0]
    text = torch.tensor([*prompt, *answer[:-1]])

    cost, adapter = lora.train(theirs, rows, lora.LoRA(0.05, rank=2, alpha=4, epochs=6), dtype="fp32", seed=0)
    assert cost["last_loss"] < cost["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    untouched = {name: weight.clone() for name, weight in theirs.state_dict().items()}
    for strength in (0.5, 1.0):
        theirs.load_state_dict(untouched)
        with torch.no_grad():
            for il, layer in enumerate(theirs.model.layers):
                for name in lora.NAMES:
                    change = adapter[f"{il}.{name}.B"] @ adapter[f"{il}.{name}.A"]
                    layer.get_submodule(name).weight += strength * change
            expected = theirs(text[None]).logits[0, len(prompt) - 1 :].numpy()
        with lora.merged(ours, adapter, strength=strength) as model:
            np.testing.assert_allclose(model.score(prompt, answer), expected, atol=1e-3)
            assert log_odds(model, rows) > base + 0.5
    assert log_odds(ours, rows) == base  # it is left as it was

    theirs.load_state_dict(untouched)
    cost, adapter = lora.train(theirs, rows, lora.PTuning(0.05, epochs=6, tokens=3), dtype="fp32", seed=0)
    assert cost["stored_bytes"] == 3 * ours.shape.d_model * 2
    embeds = torch.cat([adapter["before"], theirs.model.embed_tokens(text)])
    with torch.no_grad():
        expected = theirs(inputs_embeds=embeds[None]).logits[0, 3 + len(prompt) - 1 :].numpy()
    with lora.preceded(ours, adapter["before"]) as ids:
        np.testing.assert_allclose(ours.score([*ids, *prompt], answer), expected, atol=1e-3)
        assert log_odds(ours, rows, before=ids) > base + 0.5
    assert log_odds(ours, rows) == base


@pytest.mark.filterwarnings("ignore")  # of the trainer
def test_a_lora_is_trained_as_trl_trains_it(bench: dict[str, ModuleType], tiny_workplace: tuple[str, ...]) -> None:
    """The same first guess and the same order of pairs: the same losses, the same adapter."""
    lora = bench["lora_dpo"]
    rows = [[(prompt, chosen), (prompt, rejected)] for (prompt, chosen), (_, rejected) in random_rows(0)]
    with bench["common"].Bench(bench["common"].parser("").parse_args(tiny_workplace)) as opened:
        base = lora.build_hf(opened)
    settings = lora.LoRA(0.01, rank=2, alpha=4, epochs=4, batch=2)
    plan = lora.shuffled(len(rows), epochs=settings.epochs, batch=settings.batch, rng=np.random.default_rng(3))
    cost, ours = lora.train(base, rows, settings, dtype="fp32", seed=3)
    other, theirs = bench["trl_dpo"].train(base, rows, settings, dtype="fp32", seed=3, order=np.concatenate(plan))
    assert other["steps"] == cost["steps"] == 12
    assert other["first_loss"] == pytest.approx(cost["first_loss"], abs=1e-4)  # TRL rounds what it logs
    assert other["last_loss"] == pytest.approx(cost["last_loss"], abs=1e-4) and cost["last_loss"] < 0.5
    assert ours.keys() == theirs.keys()
    for name, part in ours.items():
        assert torch.abs(part - theirs[name]).max() <= 1e-3 * torch.abs(part).max(), name


def test_trained_vectors_raise_what_was_chosen_and_lower_it_when_they_are_turned_round(
    bench: dict[str, ModuleType], tmp_path: Path
) -> None:
    from edge_align.runtime.torch_ref import LlamaReference

    bipo, model = bench["bipo"], LlamaReference(write_gguf(tmp_path / "tiny.gguf", "llama"))
    rows = random_rows(0)
    settings = bipo.Bipo(learning_rate=0.05, epochs=10, blocks=(1, 99))
    cost, adapter = bipo.train(model, rows, settings, seed=0)
    vectors = adapter["vectors"].numpy()

    assert log_odds(model, rows, vectors) > log_odds(model, rows) + 0.5
    assert log_odds(model, rows, -vectors) < log_odds(model, rows) - 0.5
    assert not vectors[0].any() and torch.equal(
        bipo.train(model, rows, settings, seed=0)[1]["vectors"], adapter["vectors"]
    )
    assert cost["last_loss"] < cost["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert cost["stored_bytes"] == 2 * (model.n_layer - 1) * model.shape.d_model and cost["steps"] == 20


def test_vectors_trained_for_a_person_are_judged_as_they_are_and_at_the_kl_of_ours(workplace: tuple[str, ...]) -> None:
    document = run("lora.py", *workplace, "--method", "bipo", "--dtype", "fp32")
    theirs, ours, scaled = document["rows"]
    assert [theirs["arm"], ours["arm"], scaled["arm"]] == ["BiPO", "edge-align", "BiPO at our KL"]
    assert theirs["strength"] == 1.0 and scaled["kl"] == pytest.approx(ours["kl"], rel=0.1)
    assert theirs["stored_bytes"] == 14 * 576 * 2 > ours["stored_bytes"]
    assert document["settings"]["blocks"] == [8, 21]


def test_a_saved_document_never_replaces_another(
    bench: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench["common"], "RESULTS", tmp_path)
    document = {"script": "x", "date": "2026-01-02T03:04:05Z", "commit": "abc", "value": np.float32(0.5)}
    for value in (document, document | {"value": 2}):
        bench["common"].emit(value, save=True)
    found = {path.name: json.loads(path.read_text())["value"] for path in tmp_path.iterdir()}
    assert found == {"x-2026-01-02-abc.json": 0.5, "x-2026-01-02-abc-2.json": 2}
    assert [json.loads(line)["value"] for line in capsys.readouterr().out.splitlines()] == [0.5, 2]


def test_energy_is_summed_over_packages_and_a_counter_may_begin_again(
    bench: dict[str, ModuleType], tmp_path: Path
) -> None:
    counters = {"intel-rapl:0": 900, "intel-rapl:1": 100, "intel-rapl:0:0": 7, "intel-rapl:2": "none"}
    for name, value in counters.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("999\n")

    def work() -> None:
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text("50\n")  # 150 further, past 999
        (tmp_path / "intel-rapl:1" / "energy_uj").write_text("350\n")

    found = bench["energy"].zones(tmp_path)
    assert [zone.path.name for zone in found] == ["intel-rapl:0", "intel-rapl:1"]
    assert bench["energy"].joules(work, found) == pytest.approx(400e-6)
    assert bench["energy"].zones(tmp_path / "nothing") == []


def test_a_result_that_json_cannot_hold_is_an_error(bench: dict[str, ModuleType]) -> None:
    document = {"script": "x", "date": "2026-01-02", "commit": "abc", "value": float("nan")}
    with pytest.raises(ValueError, match="not JSON compliant"):
        bench["common"].emit(document, save=False)


def test_cost_is_fitted_over_the_larger_half_of_the_sizes(bench: dict[str, ModuleType]) -> None:
    rows = [{"n": n, "flat": 5.0, "square": 2.0 * n**2} for n in (10, 100, 1000, 10_000)]
    rows[0]["square"] = 1e9  # a fixed cost at small sizes
    found = bench["scale"].exponents(rows, "n", ["flat", "square"])
    assert found == pytest.approx({"flat": 0.0, "square": 2.0}, abs=1e-9)


def test_random_bases_and_made_up_people_are_timed_at_every_size(tiny_workplace: tuple[str, ...]) -> None:
    found = run("scale.py", *tiny_workplace)
    assert [row["pairs"] for row in found["pairs"]["rows"]] == [12, 24]
    assert [row["profiles"] for row in found["profiles"]["rows"]] == [4, 8]
    assert all(row["append_one_sec"] > 0 for row in found["rows"]["rows"])


def test_an_engine_is_timed_beside_others_and_alone(tiny_workplace: tuple[str, ...]) -> None:
    rows = run("contention.py", *tiny_workplace)["rows"]
    assert len({row["beside"] for row in rows}) == len(rows) == 3
    assert all(row["tokens_per_sec"] > 0 for row in rows)


def test_page_and_readme_say_what_the_results_say() -> None:
    done = subprocess.run([sys.executable, str(BENCH / "report.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}run: python bench/report.py"


def test_the_report_follows_the_newest_result_that_holds_a_figure(tmp_path: Path, bench: dict[str, ModuleType]) -> None:
    report = bench["report"]
    for path in (report.ROOT / "bench" / "results").glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    newest = report.Results(tmp_path).by_processor("latency")[0]  # the README's kind of machine
    changed = newest | {"date": "2999-01-01T00:00:00Z", "switch": newest["switch"] | {"total_ms": 4.56}}
    (tmp_path / "latency-new.json").write_text(json.dumps(changed))
    (tmp_path / "latency-quick.json").write_text(
        json.dumps(changed | {"date": "2999-01-02T00:00:00Z", "options": {"quick": True}, "switch": {"total_ms": 9.99}})
    )
    results = report.Results(tmp_path)
    for text in (report.readme_table(results), report.page(results)):
        assert "4.6 ms" in text and "10.0 ms" not in text
    with pytest.raises(LookupError, match="no place for the table"):
        report.with_table("a README without markers", "")
    with pytest.raises(LookupError, match="no result of dreams"):
        results.newest("dreams")


def test_a_learning_curve_and_people_of_three_tastes_get_their_sections(
    tmp_path: Path, bench: dict[str, ModuleType]
) -> None:
    """From a result of five sizes; the table of the eight attributes does not take the other people's result."""
    report, quality = bench["report"], bench["report_quality"]
    before = report.Results()
    result, rows = quality.quality_of(before, 100)
    sizes = {10: 0.5, 20: 0.6, 50: 0.7, 100: 0.8, 200: 0.9}
    grown = [row | {"pairs": size, "win_rate": rate} for size, rate in sizes.items() for row in rows]
    five = result | {"date": "2999-01-01T00:00:00Z", "users": grown}
    odd = [row | {"user": f"odd_{i}", "win_rate": 0.125} for i, row in enumerate(rows)]
    combined = result | {"date": "2999-01-02T00:00:00Z", "users": odd}
    combined |= {"options": result["options"] | {"users": "combined"}}
    with pytest.raises(LookupError):
        quality.quality_of(report.Results(tmp_path), 100)
    for path in (report.ROOT / "bench" / "results").glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    for name, document in (("five", five), ("combined", combined)):
        (tmp_path / f"quality-{name}.json").write_text(json.dumps(document))
    results = report.Results(tmp_path)
    assert quality.quality_of(results, 100)[0]["file"] == "quality-five.json"
    page = report.page(results)
    assert "| **mean** | 50.0 % | 60.0 % | 70.0 % | 80.0 % | 90.0 % |" in page
    assert "odd 0 | 12 %" in page and "odd 0" not in page[: page.index("Tastes of three parts")]
    bench["report_plots"].draw_curves(results, tmp_path)
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_the_best_within_a_cost_lies_on_the_lines_between_the_points(bench: dict[str, ModuleType]) -> None:
    win, cost = np.array([0.5, 0.6, 0.7, 0.65]), np.array([1.0, 1.0, 1.2, 1.1])
    best = bench["packs"].best_within
    assert best(win, cost, 2.0) == 0.7 and best(win, cost, 1.2) == 0.7 and best(win, cost, 1.0) == 0.6
    assert best(win, cost, 1.15) == pytest.approx(0.675)  # on the way up to the third, and down to the fourth
    assert best(win, cost, 1.05) == pytest.approx(0.625)  # a quarter of the way to the third


def test_the_difference_at_equal_nll_is_that_of_the_mean_curves(bench: dict[str, ModuleType]) -> None:
    """Two packs of one person, whose strength 1 costs more NLL with the second."""

    def row(pack: str, strength: float, won: list[float], nats: float) -> dict[str, Any]:
        said, base = [[nats, 2]] * 4, [[2.0, 2]] * 4
        one = {"user": "a", "pack": pack, "strength": strength, "won": won, "said": said, "said_base": base}
        return one | {"nll_ratio": nats / 2.0, "distinct2_ratio": 1.0, "passes": True}

    rows = [
        row("ours", 1.0, [1, 1, 1, 0], 2.2),
        row("theirs", 0.5, [0, 0, 1, 1], 2.0),
        row("theirs", 1.0, [0, 1, 1, 1], 2.4),
    ]
    found = bench["packs"].summary(rows, ["ours", "theirs"])
    assert found["ours"]["win_rates"] == [0.5, 0.75] and found["ours"]["costs"] == pytest.approx([1, 1.1])
    assert found["theirs"]["ours_less_it"] == pytest.approx(0.75 - 0.625)  # at 1.1 x, halfway to 1.2 x
    low, high = found["theirs"]["ci"]
    assert low < found["theirs"]["ours_less_it"] < high


def test_packs_are_set_beside_each_other(tiny_workplace: tuple[str, ...]) -> None:
    pack = Path(tiny_workplace[1]) / "packs" / "random"
    document = run("packs.py", *tiny_workplace, "--packs", f"one={pack},two={pack}")
    assert "packs" not in document["options"] and document["packs"]["one"]["hash"] == document["packs"]["two"]["hash"]
    one, two = document["summary"]["pairs_8"].values()
    assert one["win_rates"] == [two["win_rates"][0], two["win_rates"][3]] and two["ours_less_it"] <= 0
    assert len(document["users"]) == 2 * (1 + 4) and all("won" not in row for row in document["users"])


def test_slots_that_hold_what_tokens_gave_are_those_tokens(tmp_path: Path, bench: dict[str, ModuleType]) -> None:
    """Untrained, the adapter puts a chat's first four tokens ahead, whatever z is: scored and sampled as with them."""
    slots, base = bench["slots"], LlamaReference(write_gguf(tmp_path / "llama.gguf", "llama"))
    opening, prompt, answer = [5, 6, 7, 8], [9, 10, 11], [12, 13, 14]
    ahead, array = slots.Slots(base, torch.ones(3), opening).model(torch.tensor([1.0, -2.0, 0.5]))
    assert array is None
    found = ahead.score([0] * 4 + prompt, answer)
    np.testing.assert_allclose(found, base.score(opening + prompt, answer), atol=1e-4)
    assert np.abs(found - base.score([0] * 4 + prompt, answer)).max() > 0.1
    greedy = SamplingConfig(max_tokens=8, temperature=0.0)
    sampled = [
        sample(model, [first + prompt, first + [20]], sampling=greedy, eos=[], vectors=None)
        for model, first in ((ahead, [0] * 4), (base, opening))
    ]
    assert sampled[0] == sampled[1]


def test_both_decoders_cost_each_answer_what_it_costs_alone_and_pass_gradients(
    tmp_path: Path, bench: dict[str, ModuleType]
) -> None:
    slots, base = bench["slots"], LlamaReference(write_gguf(tmp_path / "llama.gguf", "llama"))
    torch.manual_seed(0)
    z = torch.randn(2, 3)
    prompts_, answers = [[9, 10, 11], [15, 16]], [[12, 13, 14], [17, 18]]
    for decoder in (
        slots.Additive(base, torch.ones(3), range(1, 3), torch.ones(2)),
        slots.Slots(base, torch.ones(3), [5, 6, 7, 8]),
    ):
        with torch.no_grad():
            for part in decoder.parameters():
                part.add_(0.3 * torch.randn(part.shape))
        front = [0] * decoder.front
        batch = make_batch([front + prompt for prompt in prompts_], answers, torch.zeros(2, 1), n=2)
        nll = decoder.bind(batch)(z)
        nll.sum().backward()
        assert all(part.grad.abs().max() > 0 for part in decoder.parameters())
        for i in range(2):
            model, array = decoder.model(z[i])
            logits = torch.from_numpy(model.score(front + prompts_[i], answers[i], array)).log_softmax(-1)
            alone = -sum(float(row[token]) for row, token in zip(logits, answers[i], strict=True))
            assert nll[i].item() == pytest.approx(alone, abs=1e-3)
