"""What steering costs while decoding: speed, profile switch, time to the first token and per token, memory.

    python bench/latency.py --save

Runs are interleaved in alternating order, so that a machine that slows down slows all arms; ratios are of paired runs,
with a 95 % bootstrap interval of their median. Where the machine counts energy, joules per token are of the whole
package, prompt included. The bare loop is llama_decode and the native sampler, nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import Bench, console, fresh_home, main, parser, progress, random_latent, ROOT, save_latent
from energy import joules, zones
from latency_arms import bare, instead
from rich.table import Table

from edge_align.config import SamplingConfig
from edge_align.errors import EdgeAlignError
from edge_align.records import join_chunks, SteeringVectors, user_prompt
from edge_align.runtime.base import Backend
from edge_align.runtime.llama_native import NativeContext
from edge_align.runtime.onnx import OnnxBackend
from edge_align.speed import at_length, interleaved, interval, paired_ratio, PROMPT, TOKENS

TTFT_LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)
RESIDENT = (16, 128)  # profiles held at once, between two of which is switched each time
DRIVER = """
import atexit, json, re, sys
def report():
    text = open("/proc/self/status").read()
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", text)[1]) * 1024
    anon = int(re.search(r"RssAnon:\\s+(\\d+)", text)[1]) * 1024
    print(json.dumps({"peak_rss_bytes": peak, "anonymous_bytes_at_exit": anon, "torch": "torch" in sys.modules}),
          file=sys.stderr)
atexit.register(report)
from edge_align.cli.main import main
main()
"""


def run(bench: Bench) -> dict[str, Any]:
    args = bench.args
    if args.quick:
        args.runs, args.tokens, args.switches, args.ttft_runs, args.arm_runs = 2, 8, 2, 1, 1
    bench.runtime = replace(bench.runtime, n_ctx=TTFT_LENGTHS[-1] + TOKENS)
    z = random_latent(bench, 1)
    vectors = bench.pack.decode(z)
    found = {"tokens": args.tokens, "runs": args.runs, **decoding(bench, vectors)}
    found["switch"], *more = [switching(bench, vectors, n) for n in (2, *RESIDENT)]
    found["resident"] = more
    found["ttft"] = by_length(bench.backend, vectors, args)
    if args.export:
        with OnnxBackend.open(Path(args.export), config=bench.runtime) as onnx:
            found["ttft_onnx"] = by_length(onnx, vectors, args)
    found["instead"] = instead(bench, vectors)
    found["memory"] = memory(bench, z)
    for name in ("steered_over_base", "ours_over_bare", "switch", "memory"):
        console.print(name, found[name])
    show(found["instead"])
    return found


def by_length(backend: Backend, vectors: SteeringVectors, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time to the first token and per token after it, steered and not, for prompts of each length."""
    lengths, rows = TTFT_LENGTHS[:2] if args.quick else TTFT_LENGTHS, []
    with progress(f"prompts, {backend.info.name}", len(lengths)) as tell:
        for n in lengths:
            rows.append(asdict(at_length(backend, vectors, n, runs=args.ttft_runs)))
            tell(len(rows))
    return rows


def show(found: dict[str, Any]) -> None:
    table = Table("", "first token", "tokens per second", "x profile's first token", "x its speed")
    for name, row in found["arms"].items():
        first, speed = row["first_token_over_profile"]["median"], row["speed_over_profile"]["median"]
        cells = (
            f"{1e3 * row['first_token_sec']:.0f} ms",
            f"{row['tokens_per_sec']:.0f}",
            f"{first:.2f}",
            f"{speed:.3f}",
        )
        table.add_row(name, *cells)
    console.print(table)


# -- decoding ------------------------------------------------------------------------------------------------------
def decoding(bench: Bench, vectors: SteeringVectors) -> dict[str, Any]:
    """Tokens per second after the first, of the bare loop, our loop, and our loop steered; paired ratios."""
    args, backend = bench.args, bench.backend
    prompt = backend.render(user_prompt(PROMPT))
    sampling = SamplingConfig(max_tokens=args.tokens, seed=1, temperature=args.temperature)
    context = NativeContext(backend._model, n_ctx=backend.info.n_ctx, n_batch=64, n_threads=bench.runtime.n_threads)

    def ours(steered: SteeringVectors | None) -> float:
        return join_chunks(list(backend.generate(prompt, vectors=steered, sampling=sampling))).stats.generation_tps

    arms = {
        "bare": lambda: bare(context, prompt, sampling)[1],
        "base": lambda: ours(None),
        "steered": lambda: ours(vectors),
    }
    speeds = rounds(arms, args.runs)
    packages = zones()
    energy = {name: joules(arm, packages) / args.tokens for name, arm in arms.items()} if packages else None
    context.close()
    return {
        "joules_per_token": energy,
        "tokens_per_sec": {name: median(values) for name, values in speeds.items()},
        "steered_over_base": asdict(paired_ratio(speeds["steered"], speeds["base"])),
        "ours_over_bare": asdict(paired_ratio(speeds["base"], speeds["bare"])),
    }


def rounds(arms: dict[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """`speed.interleaved` with a bar."""
    with progress("decoding", 100) as tell:
        return interleaved(arms, runs, tell=lambda done: tell(round(100 * done)))


# -- switching profiles --------------------------------------------------------------------------------------------
def switching(bench: Bench, vectors: SteeringVectors, n: int) -> dict[str, float]:
    """Milliseconds to set another of `n` profiles' vectors, and what the next token then costs more than the one after.

    `bytes`: what the vectors of all of them take.
    """
    backend = bench.backend
    context = NativeContext(backend._model, n_ctx=2048, n_batch=64, n_threads=bench.runtime.n_threads)
    held = [vectors.scaled(1.0 + 0.1 * i / n) for i in range(n)]
    position = 0

    def step() -> float:
        nonlocal position
        start = time.perf_counter()
        context.token[0], context.pos[0], context.seq[0], context.wanted[0] = 500, position, 0, 1
        context.decode(1)
        context.C.llama_synchronize(context.pointer)
        position += 1
        return (time.perf_counter() - start) * 1e3

    sets, extras = [], []
    for i in range(bench.args.switches + 1):
        start = time.perf_counter()
        context.set_vectors(held[i % n])
        set_ms = (time.perf_counter() - start) * 1e3
        first, then = step(), median([step(), step(), step()])
        if i:
            sets.append(set_ms)
            extras.append(first - then)
    context.close()
    total = np.array(sets) + np.array(extras)
    low, high = interval(total)
    return {
        "profiles": n,
        "bytes": sum(each.array.nbytes for each in held),
        "set_ms": median(sets),
        "next_token_extra_ms": median(extras),
        "total_ms": float(np.median(total)),
        "total_ms_ci": [low, high],
    }


# -- memory --------------------------------------------------------------------------------------------------------
def memory(bench: Bench, z: np.ndarray) -> dict[str, Any]:
    """Peak resident memory of `edge-align generate` with a profile, in a process of its own; is torch loaded there."""
    with fresh_home(bench) as home:
        save_latent(bench, home, "bench", z)
        command = [sys.executable, "-c", DRIVER, "generate", PROMPT, "--max-tokens", str(bench.args.tokens), "--json"]
        command += ["--model", bench.args.model] if bench.args.model else []
        command += ["--threads", str(bench.args.threads)]
        env = os.environ | {"EDGE_ALIGN_HOME": str(home.root), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise EdgeAlignError(f"generate failed: {done.stderr.strip()}")
        answer = json.loads(done.stdout)
        found = json.loads(done.stderr.strip().splitlines()[-1])
        return found | {"peak_rss_mb": found["peak_rss_bytes"] / 1e6, "profile": answer.get("profile")}


if __name__ == "__main__":
    p = parser("Steered against unsteered decoding, our loop against a bare one, switching, first token, memory.")
    p.add_argument("--runs", type=int, default=40, help="interleaved runs of each arm")
    p.add_argument("--tokens", type=int, default=96, help="decoded per run")
    p.add_argument("--temperature", type=float, default=0.0, help="0: greedy in all arms")
    p.add_argument("--switches", type=int, default=60)
    p.add_argument("--arm-runs", type=int, default=15, help="of what people would use instead")
    p.add_argument("--ttft-runs", type=int, default=11, help="of prompts of each length")
    p.add_argument("--export", help="folder that `edge-align export onnx` made: prompts of each length there too")
    main(run, p.parse_args(), __file__)
