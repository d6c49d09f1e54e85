"""Decoding on ONNX Runtime, steered and not, beside llama.cpp on the file that the export was made from.

    edge-align export onnx --from smollm2-135m-instruct --precision int4 --out DIR
    python bench/onnx_latency.py --export DIR --threads 2 --save

onnxruntime-genai is a third engine where it is installed: --genai NAME=DIR,..., builds of the same weights by its own
model builder, each with its speed and its distance from float32. The committed ones were made of the base as a folder
(transformers reads its GGUF) by `python -m onnxruntime_genai.models.builder -i FOLDER -o DIR -c CACHE -e cpu` with -p
int4; with --extra_options algo_config=k_quant is_symmetric=false matmul_mixed_precision=last_matmul:int8 as well; with
block_size=16 besides; and with -p int8. A fourth is optimum: --optimum NAME=DIR,..., made of that folder by
`optimum-cli export onnx --model FOLDER --task text-generation-with-past DIR`, and of this by `optimum-cli onnxruntime
quantize --onnx_model DIR --avx2 -o DIR8`. Runs are interleaved in alternating order, greedy, and ratios are of paired
runs, as in bench/latency.py. The batch is eight rows with eight vectors against the same rows without any.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import Bench, console, main, named_folders, parser, random_latent, sample, SEED
from latency import rounds

from edge_align.config import SamplingConfig
from edge_align.kl import log_softmax
from edge_align.records import join_chunks, SteeringVectors, user_prompt
from edge_align.runtime.base import Backend
from edge_align.runtime.onnx import OnnxBackend
from edge_align.runtime.onnx_session import library
from edge_align.simulation.prompts import prompts
from edge_align.speed import paired_ratio, PROMPT

ROWS = 8


def run(bench: Bench) -> dict[str, Any]:
    args = bench.args
    if args.quick:
        args.runs, args.tokens = 2, 8
    vectors = bench.pack.decode(random_latent(bench, 1))
    builds = {f"genai {name}": folder for name, folder in args.genai.items()}
    traced = {f"optimum {name}": optimum(folder, args.threads) for name, folder in args.optimum.items()}
    with OnnxBackend.open(Path(args.export), config=bench.runtime) as onnx:
        assert onnx.info.n_layer == bench.base.n_layer
        prompt = onnx.render(user_prompt(PROMPT))
        arms: dict[str, Callable[[], float]] = {
            "llamacpp": lambda: single(bench.backend, prompt, None, args.tokens),
            "onnx": lambda: single(onnx, prompt, None, args.tokens),
            "onnx_steered": lambda: single(onnx, prompt, vectors, args.tokens),
            "onnx_batch": lambda: batch(onnx, prompt, None, args.tokens),
            "onnx_batch_steered": lambda: batch(onnx, prompt, vectors, args.tokens),
        }
        for name, folder in builds.items():
            arms[name] = partial(genai(folder, args.threads), prompt, args.tokens)
        for name, model in traced.items():
            arms[name] = partial(optimum_speed, model, prompt, args.tokens)
        speeds = rounds(arms, args.runs)
        scores = {name: genai_logits(folder) for name, folder in builds.items()}
        scores |= {name: partial(optimum_logits, model) for name, model in traced.items()}
        loss = fidelity(bench, onnx, scores)
        precision = onnx._model.precision
    found = {
        "precision": precision,
        "tokens": args.tokens,
        "runs": args.runs,
        "batch_rows": ROWS,
        "tokens_per_sec": {name: median(values) for name, values in speeds.items()},
        "against_fp32": loss,
        "onnx_over_llamacpp": asdict(paired_ratio(speeds["onnx"], speeds["llamacpp"])),
        "steered_over_base": asdict(paired_ratio(speeds["onnx_steered"], speeds["onnx"])),
        "batch_steered_over_base": asdict(paired_ratio(speeds["onnx_batch_steered"], speeds["onnx_batch"])),
    }
    if builds:
        found["onnx_over_genai"] = {name: asdict(paired_ratio(speeds["onnx"], speeds[name])) for name in builds}
        found["genai_version"] = importlib.metadata.version("onnxruntime-genai")
    if traced:
        found["onnx_over_optimum"] = {name: asdict(paired_ratio(speeds["onnx"], speeds[name])) for name in traced}
        found["optimum_version"] = importlib.metadata.version("optimum-onnx")
    for name, value in found.items():
        console.print(name, value)
    return found


def single(backend: Backend, prompt: list[int], vectors: SteeringVectors | None, tokens: int) -> float:
    """Tokens per second after the first."""
    sampling = SamplingConfig(max_tokens=tokens, temperature=0.0)
    stats = join_chunks(list(backend.generate(prompt, vectors=vectors, sampling=sampling))).stats
    assert stats is not None
    return stats.generation_tps


def genai(folder: Path, threads: int) -> Callable[[list[int], int], float]:
    """Greedy decoding by onnxruntime-genai: tokens per second after the first."""
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    if threads:
        options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        config.overlay(json.dumps(options))
    model = og.Model(config)

    def decode(prompt: list[int], tokens: int) -> float:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + tokens, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        times = []
        while not generator.is_done():
            generator.generate_next_token()
            times.append(time.perf_counter())
        return (len(times) - 1) / (times[-1] - times[0])

    return decode


def optimum(folder: Path, threads: int) -> Any:
    """A traced decoder as optimum runs it."""
    from optimum.onnxruntime import ORTModelForCausalLM

    options = library().SessionOptions()
    options.intra_op_num_threads = threads
    (graph,) = folder.glob("*.onnx")  # its name tells whether it is quantised
    return ORTModelForCausalLM.from_pretrained(folder, file_name=graph.name, session_options=options)


def optimum_speed(model: Any, prompt: list[int], tokens: int) -> float:
    """Greedy decoding by transformers' loop over optimum's session: tokens per second after the first."""
    times: list[float] = []
    streamer = SimpleNamespace(put=lambda _tokens: times.append(time.perf_counter()), end=lambda: None)
    limits = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    given = torch.tensor([prompt])
    model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, streamer=streamer, **limits)
    made = times[1:]  # the first is the prompt
    return (len(made) - 1) / (made[-1] - made[0])


def optimum_logits(model: Any, prompt: list[int], answer: list[int]) -> np.ndarray:
    tokens = torch.tensor([[*prompt, *answer]])
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return np.asarray(logits[0, len(prompt) - 1 : -1].numpy())


def fidelity(
    bench: Bench, onnx: OnnxBackend, others: Mapping[str, Callable[[list[int], list[int]], np.ndarray]]
) -> dict[str, dict[str, float]]:
    """What each engine's quantisation does to answers of the base: KL from PyTorch float32 on the file's own weights,
    nats a token, and the share of tokens whose likeliest successor is the same. Teacher-forced, unsteered."""
    from edge_align.runtime.torch_ref import LlamaReference

    args, asked = bench.args, list(prompts("validation")[: 2 if bench.args.quick else 8])
    answers = sample(bench, asked, max_tokens=8 if args.quick else 48, seed=SEED, label="base answers")
    texts = [(bench.backend.render(user_prompt(q)), a.tokens) for q, a in zip(asked, answers, strict=True) if a.tokens]
    reference = LlamaReference(bench.base.path)
    engines: dict[str, Callable[[list[int], list[int]], np.ndarray]] = {
        "llamacpp": lambda prompt, answer: bench.backend.score(prompt, [answer], vectors=None)[0],
        "onnx": lambda prompt, answer: onnx.score(prompt, [answer], vectors=None)[0],
    }
    engines |= others
    right = [log_softmax(reference.score(prompt, answer, None)) for prompt, answer in texts]
    found = {}
    for name, score in engines.items():
        rows = [log_softmax(score(prompt, answer)) for prompt, answer in texts]
        kl = np.concatenate([(np.exp(p) * (p - q)).sum(-1) for p, q in zip(right, rows, strict=True)])
        same = np.concatenate([p.argmax(-1) == q.argmax(-1) for p, q in zip(right, rows, strict=True)])
        found[name] = {"kl": float(kl.mean()), "same_likeliest": float(same.mean()), "tokens": len(kl)}
    return found


def genai_logits(folder: Path) -> Callable[[list[int], list[int]], np.ndarray]:
    """Logits of the graph that onnxruntime-genai runs, by ONNX Runtime itself, for the tokens of an answer."""
    session = library().InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    pasts = [value for value in session.get_inputs() if value.name.startswith("past_key_values")]
    size = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
    empty = {value.name: np.zeros((1, value.shape[1], 0, size), np.float32) for value in pasts}

    def score(prompt: list[int], answer: list[int]) -> np.ndarray:
        tokens = np.array([[*prompt, *answer]])
        given = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
        (logits,) = session.run(["logits"], given | empty)
        return np.asarray(logits[0, len(prompt) - 1 : -1], np.float32)

    return score


def batch(backend: OnnxBackend, prompt: list[int], vectors: SteeringVectors | None, tokens: int) -> float:
    """Tokens per second of all rows together, prefill included; each row has its own multiple of the vectors."""
    sampling = SamplingConfig(max_tokens=tokens, temperature=0.0)
    each = None if vectors is None else [vectors.scaled(float(f)) for f in np.linspace(0.3, 1.0, ROWS)]
    started = time.perf_counter()
    rows = backend.generate_batch([prompt] * ROWS, vectors=each, sampling=sampling)
    return sum(len(row.tokens) for row in rows) / (time.perf_counter() - started)


if __name__ == "__main__":
    p = parser("Decoding on ONNX Runtime, steered and not, beside llama.cpp.")
    p.add_argument("--export", required=True, help="folder that `edge-align export onnx` made")
    said = "folders that onnxruntime-genai's builder made"
    p.add_argument("--genai", type=named_folders, default="", metavar="NAME=DIR,...", help=said)
    said = "folders that optimum made"
    p.add_argument("--optimum", type=named_folders, default="", metavar="NAME=DIR,...", help=said)
    p.add_argument("--runs", type=int, default=8, help="interleaved runs of each arm")
    p.add_argument("--tokens", type=int, default=64, help="decoded per run")
    main(run, p.parse_args(), __file__)
