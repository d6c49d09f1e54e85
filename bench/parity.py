"""Do the engines compute the same model, steered and not? PyTorch in float32 is what they are held to.

    python bench/answers.py --set train
    python bench/parity.py --threads 2 --save

One set of weights, the base's dequantised to F16, runs in PyTorch, in ONNX Runtime (fp32) and in llama.cpp (F16), under
random vectors and a learnt profile, on greedy answers to test prompts. The quantised engines, ONNX Runtime int4 and
llama.cpp on the base's own file, are held to how much each user's profile moves log p(chosen) - log p(rejected) on
pairs of prompts that it was not learnt from. A batch of eight rows, each with another user's profile, is held to eight
single runs. The exports are made once, in the cache folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    Bench,
    chosen_users,
    console,
    digest,
    learn_profile,
    main,
    parser,
    Profile,
    progress,
    SEED,
    source_digest,
    steering,
    train_answers,
    users_pairs,
)

from edge_align.config import SamplingConfig
from edge_align.files import load_json_object
from edge_align.kl import factor_for_kl, sampled_probe
from edge_align.onnx_files import is_export
from edge_align.records import Completion, join_chunks, PreferencePair, SteeringVectors, user_prompt
from edge_align.runtime.llamacpp import LlamaCppBackend
from edge_align.runtime.onnx import OnnxBackend
from edge_align.runtime.onnx_rows import OnnxRows
from edge_align.runtime.onnx_session import OnnxDecoder
from edge_align.runtime.torch_ref import LlamaReference
from edge_align.simulation.prompts import prompts
from edge_align.simulation.users import User
from edge_align_export.gguf_file import export_gguf, MANIFEST
from edge_align_export.onnx_export import export_onnx
from edge_align_export.parity import agreement, log_prob, relative_error

KL = 0.3  # of random vectors, nats per token
LEARNT_FROM = 0.75  # of the training prompts; pairs of the others are held out
PARTS = ("logits", "preferences", "batch")

Score = Callable[[Sequence[int], Sequence[int], SteeringVectors | None], np.ndarray]
"""(prompt, completion, vectors) -> teacher-forced logits (T, n_vocab)."""


@dataclass(frozen=True)
class Exports:
    """f16: a GGUF; fp32: made of it; int4: made of the base's own file."""

    f16: Path
    fp32: Path
    int4: Path


@dataclass(frozen=True)
class Taste:
    """A user, the profile learnt from some prompts, and pairs of others."""

    user: User
    profile: Profile
    heldout: list[PreferencePair]


def run(bench: Bench) -> dict[str, Any]:
    args = bench.args
    if args.quick:
        args.prompts, args.tokens, args.learn, args.pairs, args.answer_tokens = 2, 6, 8, 2, 12
    parts = args.part.split(",")
    exports = build(bench)
    found: dict[str, Any] = {"tokens": args.tokens}
    tastes = [taste(bench, who) for who in chosen_users(args.users)]
    with ExitStack() as stack:
        torch = torch_score(LlamaReference(exports.f16))
        fp32, int4 = (
            stack.enter_context(OnnxBackend.open(path, config=bench.runtime)) for path in (exports.fp32, exports.int4)
        )
        if "logits" in parts:
            f16 = stack.enter_context(LlamaCppBackend.open(exports.f16, config=bench.runtime))
            found["logits"] = logits(bench, tastes[0], torch, fp32, f16)
        if "preferences" in parts:
            found["preferences"] = preferences(bench, tastes, torch, {"onnx int4": int4, "llamacpp": bench.backend})
        if "batch" in parts:
            found["batch"] = [batch(bench, tastes, name, own) for name, own in (("fp32", fp32), ("int4", int4))]
    for name in parts:
        for row in found[name]:
            console.print(row)
    return found


def build(bench: Bench) -> Exports:
    """What the engines run, from the cache where it was made before."""
    made_by = ("onnx_graph", "onnx_weights", "checkpoint", "quantise", "gguf_file")
    sources = [f"export.edge_align_export.{name}" for name in made_by]
    folder = bench.cache / f"parity-{digest(bench.base.hash, source_digest(*sources))}"
    folder.mkdir(parents=True, exist_ok=True)
    with progress("exports", 3) as tell:
        if not (folder / "f16" / MANIFEST).is_file():
            export_gguf(bench.base.path, folder / "f16", quants=["F16"], threads=bench.runtime.n_threads)
        f16 = folder / "f16" / str(load_json_object(folder / "f16" / MANIFEST)["files"][0]["file"])
        tell(1)
        for done, (precision, source) in enumerate((("fp32", f16), ("int4", bench.base.path)), 2):
            if not is_export(folder / precision):
                export_onnx(source, folder / precision, precision=precision)
            tell(done)
    return Exports(f16, folder / "fp32", folder / "int4")


def taste(bench: Bench, who: User) -> Taste:
    questions, answers = train_answers(bench)
    cut = max(1, round(LEARNT_FROM * len(questions)))
    learnt = users_pairs(who, questions[:cut], answers[:cut], n=bench.args.learn, seed=SEED)
    heldout = users_pairs(who, questions[cut:], answers[cut:], n=bench.args.pairs, seed=SEED)
    return Taste(who, learn_profile(bench, learnt), heldout)


def torch_score(model: LlamaReference) -> Score:
    return lambda prompt, completion, vectors: model.score(
        prompt, completion, None if vectors is None else vectors.array
    )


def engine_score(backend: OnnxBackend | LlamaCppBackend) -> Score:
    return lambda prompt, completion, vectors: backend.score(prompt, [completion], vectors=vectors)[0]


# -- one set of weights --------------------------------------------------------------------------------------------
def logits(bench: Bench, learnt: Taste, torch: Score, fp32: OnnxBackend, f16: LlamaCppBackend) -> list[dict[str, Any]]:
    """Teacher-forced on the greedy answers of ONNX Runtime, which are PyTorch's where it takes the same tokens."""
    args = bench.args
    questions = prompts("test")[: args.prompts]
    rendered = [fp32.render(user_prompt(question)) for question in questions]
    every: dict[str, list[SteeringVectors | None]] = {
        "none": [None] * len(questions),
        "random": [random_vectors(bench, f16)] * len(questions),
        f"learnt ({learnt.user.name})": steering(bench, learnt.profile.encoder, questions),
    }
    rows = []
    for name, vectors in every.items():
        texts, wanted, same = [], [], 0
        with progress(f"greedy, {name}", len(questions)) as tell:
            for done, (prompt, added) in enumerate(zip(rendered, vectors, strict=True), 1):
                answer = greedy(fp32, prompt, added, args.tokens)
                texts.append([*answer.tokens, *([bench.eos] if answer.finish_reason == "stop" else [])])
                wanted.append(torch(prompt, texts[-1], added))
                # PyTorch, decoding on its own, writes this text if each token is its likeliest after those before it
                same += bool((wanted[-1].argmax(1) == texts[-1]).all())
                tell(done)
        for engine, score in (("onnx fp32", engine_score(fp32)), ("llamacpp F16", engine_score(f16))):
            jobs = zip(rendered, texts, vectors, strict=True)
            row = {"engine": engine, "vectors": name, **asdict(agreement(wanted, (score(*job) for job in jobs)))}
            if engine == "onnx fp32":
                row |= {"prompts": len(questions), "same_greedy_text": same / len(questions)}
            rows.append(row)
    return rows


def random_vectors(bench: Bench, f16: LlamaCppBackend) -> SteeringVectors:
    """Of the same size in every block, at the KL of a well-taught profile."""
    array = np.random.default_rng(bench.args.seed).normal(size=(f16.info.n_layer, f16.info.d_model)) * 0.1
    array[0] = 0
    vectors = SteeringVectors(array)
    probe = sampled_probe(f16, answers=2 if bench.args.quick else 8, seed=bench.args.seed)
    return vectors.scaled(factor_for_kl(f16, probe, vectors, KL)[0])


def greedy(backend: OnnxBackend, prompt: list[int], vectors: SteeringVectors | None, tokens: int) -> Completion:
    sampling = SamplingConfig(max_tokens=tokens, temperature=0.0)
    return join_chunks(list(backend.generate(prompt, vectors=vectors, sampling=sampling)))


# -- rounded weights -----------------------------------------------------------------------------------------------
def preferences(
    bench: Bench, tastes: list[Taste], torch: Score, engines: dict[str, OnnxBackend | LlamaCppBackend]
) -> list[dict[str, Any]]:
    """How much each profile moves log p(chosen) - log p(rejected) on held-out pairs: a row per engine and user, and one
    per engine over all users. ratio: mean change over PyTorch's; error: sum of differences over sum of changes."""
    rows = []
    with progress("preferences", len(tastes) * (1 + len(engines))) as tell:
        done = 0
        wanted: dict[str, list[float]] = {}
        for engine, score in {"torch": torch, **{name: engine_score(own) for name, own in engines.items()}}.items():
            for one in tastes:
                moved = changes(bench, one, score)
                done += 1
                tell(done)
                if engine == "torch":
                    wanted[one.user.name] = moved
                else:
                    rows.append({"engine": engine, "user": one.user.name, **held_to(wanted[one.user.name], moved)})
        for engine in engines:
            own = [row for row in rows if row["engine"] == engine]
            every = [sum((row[name] for row in own), []) for name in ("fp32_changes", "changes")]
            rows.append({"engine": engine, "user": "all", **held_to(*every)})
    return rows


def held_to(wanted: list[float], moved: list[float]) -> dict[str, Any]:
    return {
        "pairs": len(moved),
        "fp32_mean": np.mean(wanted),
        "ratio": np.sum(moved) / np.sum(wanted),
        "error": relative_error(wanted, moved),
        "fp32_changes": wanted,
        "changes": moved,
    }


def changes(bench: Bench, one: Taste, score: Score) -> list[float]:
    """Nats that the profile adds to log p(chosen) - log p(rejected), one per held-out pair."""
    found = []
    for pair in one.heldout:
        (vectors,) = steering(bench, one.profile.encoder, [pair.prompt[-1].content])
        prompt = bench.backend.render(pair.prompt)
        margin = {}
        for name, added in (("steered", vectors), ("base", None)):
            chosen, rejected = (
                log_prob(score(prompt, tokens, added), tokens)
                for text in (pair.chosen, pair.rejected)
                for tokens in [bench.backend.tokenize(text)[: bench.args.answer_tokens]]
            )
            margin[name] = chosen - rejected
        found.append(margin["steered"] - margin["base"])
    return found


# -- rows with profiles of their own -------------------------------------------------------------------------------
def batch(bench: Bench, tastes: list[Taste], precision: str, backend: OnnxBackend) -> dict[str, Any]:
    """A batch in which each row has another profile, against single runs: greedy texts, and logits on those of the
    single runs, decoded together and alone."""
    questions = prompts("test")[: len(tastes)]
    rendered = [backend.render(user_prompt(question)) for question in questions]
    vectors = [steering(bench, one.profile.encoder, [q])[0] for one, q in zip(tastes, questions, strict=True)]
    sampling = SamplingConfig(max_tokens=bench.args.tokens, temperature=0.0)
    together = [list(row.tokens) for row in backend.generate_batch(rendered, vectors=vectors, sampling=sampling)]
    singly = [list(greedy(backend, *job, bench.args.tokens).tokens) for job in zip(rendered, vectors, strict=True)]
    jobs = list(zip(rendered, singly, vectors, strict=True))
    alone = [row for job in jobs for row in decoded(backend, [job])]
    return {
        "precision": precision,
        "rows": len(tastes),
        "same_text": np.mean([a == b for a, b in zip(together, singly, strict=True)]),
        "max_difference": max(np.abs(a - b).max() for a, b in zip(decoded(backend, jobs), alone, strict=True)),
    }


def decoded(
    backend: OnnxBackend, jobs: Sequence[tuple[list[int], list[int], SteeringVectors | None]]
) -> list[np.ndarray]:
    """Logits (T, n_vocab) of rows (prompt, text, vectors) that are decoded in one batch and fed their texts."""
    room = max(len(prompt) + len(text) for prompt, text, _ in jobs)
    shared = OnnxRows(
        OnnxDecoder(backend._session, backend._model, device=backend.info.device, rows=len(jobs), room=room)
    )
    rows = [shared.take() for _ in jobs]
    for row, (prompt, _, _) in zip(rows, jobs, strict=True):
        row.fill(np.asarray(prompt[:-1]), 0)
    found: list[list[np.ndarray]] = [[] for _ in jobs]
    for step in range(max(len(text) for _, text, _ in jobs)):
        going = [i for i, (_, text, _) in enumerate(jobs) if step < len(text)]
        for i in going:
            prompt, text, vectors = jobs[i]
            token = text[step - 1] if step else prompt[-1]
            rows[i].ask(token, len(prompt) - 1 + step, None if vectors is None else vectors.array[None])
        for i in going:
            found[i].append(rows[i].logits())
    return [np.stack(steps) for steps in found]


if __name__ == "__main__":
    p = parser("Do the engines compute the same model, steered and not?")
    p.add_argument("--part", default=",".join(PARTS), help="comma-separated parts")
    p.add_argument("--users", help="comma-separated users (default: all eight)")
    p.add_argument("--prompts", type=int, default=40, help="test prompts answered greedily")
    p.add_argument("--tokens", type=int, default=64, help="most tokens of a greedy answer")
    p.add_argument("--learn", type=int, default=100, help="pairs a profile is learnt from")
    p.add_argument("--pairs", type=int, default=12, help="held-out pairs of each user")
    p.add_argument("--answer-tokens", type=int, default=96, help="tokens of a held-out answer that are scored")
    main(run, p.parse_args(), __file__)
