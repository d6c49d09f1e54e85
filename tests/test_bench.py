"""The bench scripts start, run at tiny sizes, and end with a JSON document; their own arithmetic is right."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from edge_align.bases import BaseModel, find_base
from edge_align.features import n_feature
from edge_align.latent_dpo import LatentFeedback
from edge_align.pack import save_pack
from edge_align.simulation.prompts import prompts
from scripts.tiny_models import write_gguf

BENCH = Path(__file__).parent.parent / "bench"
SCRIPTS = sorted(path.name for path in BENCH.glob("*.py") if path.name != "common.py")
K, INPUTS = 6, 3


def start(script: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(BENCH / script), *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(script: str, *options: str) -> dict[str, Any]:
    """The JSON document that is the last line of stdout."""
    process = start(script, *options)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    document: dict[str, Any] = json.loads(out.splitlines()[-1])
    return document


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """Modules of the bench, imported as its scripts import each other."""
    import importlib

    names = ("common", "latent_dpo_vs_logistic", "nulls", "training_time")
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


def test_the_comparison_with_logistic_regression_ends_with_both_accuracies(workplace: tuple[str, ...]) -> None:
    (row,) = run("latent_dpo_vs_logistic.py", *workplace)["rows"]
    assert row["pairs"] == 10 and 0 <= row["latent_dpo"] <= 1 and 0 <= row["logistic"] <= 1
    assert row["gain"] == pytest.approx(row["latent_dpo"] - row["logistic"])


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
    out, err = process.communicate(timeout=120)
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


def test_the_interval_of_a_median_covers_it_at_about_the_stated_rate(bench: dict[str, ModuleType]) -> None:
    rng, hits = np.random.default_rng(0), 0
    for i in range(200):
        low, high = bench["common"].interval(rng.standard_normal(40), seed=i, draws=400)
        hits += low <= 0.0 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_shuffled_verdicts_are_turned_round_about_half_the_time(bench: dict[str, ModuleType]) -> None:
    from edge_align.records import PreferencePair, user_prompt

    pairs = [PreferencePair(user_prompt("?"), "a", "b")] * 400
    turned = sum(pair.chosen == "b" for pair in bench["nulls"].shuffled(pairs, np.random.default_rng(0)))
    assert 160 <= turned <= 240  # four standard deviations


def test_rotary_layouts_are_each_others_reverse(bench: dict[str, ModuleType]) -> None:
    # head 0 of size 4 is rows 0-3: halves (0, 1 | 2, 3) interleave to 0, 2, 1, 3
    rows = torch.arange(8.0)[:, None].expand(8, 3)
    interleaved = bench["training_time"].interleave(rows, 2)
    assert interleaved[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(bench["training_time"].split_halves(interleaved, 2), rows)


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


def test_a_result_that_json_cannot_hold_is_an_error(bench: dict[str, ModuleType]) -> None:
    document = {"script": "x", "date": "2026-01-02", "commit": "abc", "value": float("nan")}
    with pytest.raises(ValueError, match="not JSON compliant"):
        bench["common"].emit(document, save=False)
