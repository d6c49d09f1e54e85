"""Decoding on ONNX Runtime, steered and not, beside llama.cpp on the file that the export was made from.

    edge-align export onnx --from smollm2-135m-instruct --precision int4 --out DIR
    python bench/onnx_latency.py --export DIR --threads 2 --save

Runs are interleaved in alternating order, greedy, and ratios are of paired runs, as in bench/latency.py. The batch is
eight rows with eight vectors against the same rows without any.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import Bench, console, main, parser, random_latent
from latency import rounds

from edge_align.config import SamplingConfig
from edge_align.records import join_chunks, SteeringVectors, user_prompt
from edge_align.runtime.base import Backend
from edge_align.runtime.onnx import OnnxBackend
from edge_align.speed import paired_ratio, PROMPT

ROWS = 8


def run(bench: Bench) -> dict[str, Any]:
    args = bench.args
    if args.quick:
        args.runs, args.tokens = 2, 8
    vectors = bench.pack.decode(random_latent(bench, 1))
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
        speeds = rounds(arms, args.runs)
        precision = onnx._model.precision
    found = {
        "precision": precision,
        "tokens": args.tokens,
        "runs": args.runs,
        "batch_rows": ROWS,
        "tokens_per_sec": {name: median(values) for name, values in speeds.items()},
        "onnx_over_llamacpp": asdict(paired_ratio(speeds["onnx"], speeds["llamacpp"])),
        "steered_over_base": asdict(paired_ratio(speeds["onnx_steered"], speeds["onnx"])),
        "batch_steered_over_base": asdict(paired_ratio(speeds["onnx_batch_steered"], speeds["onnx_batch"])),
    }
    for name, value in found.items():
        console.print(name, value)
    return found


def single(backend: Backend, prompt: list[int], vectors: SteeringVectors | None, tokens: int) -> float:
    """Tokens per second after the first."""
    sampling = SamplingConfig(max_tokens=tokens, temperature=0.0)
    stats = join_chunks(list(backend.generate(prompt, vectors=vectors, sampling=sampling))).stats
    assert stats is not None
    return stats.generation_tps


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
    p.add_argument("--runs", type=int, default=8, help="interleaved runs of each arm")
    p.add_argument("--tokens", type=int, default=64, help="decoded per run")
    main(run, p.parse_args(), __file__)
