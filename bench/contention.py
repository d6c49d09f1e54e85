"""Decoding on a machine that has something else to do, by how long llama.cpp's threads wait for each other awake.

    python bench/contention.py --save

Every measurement is a process of its own that decodes greedily for some seconds, with one setting of GOMP_SPINCOUNT
(libgomp reads it when it is loaded; 300,000 is its own default): alone, beside a second such process, and beside a
process that does nothing but count.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from statistics import median
from typing import Any

from common import Bench, console, main, parser, progress
from rich.table import Table

from edge_align import SPINS
from edge_align.config import RuntimeConfig, SamplingConfig
from edge_align.records import user_prompt
from edge_align.runtime.llamacpp import LlamaCppBackend

LIBGOMP = 300_000
BESIDE = ("nothing", "another engine", "a counting process")
COUNTING = "n = 0\nwhile True: n += 1"


def run(bench: Bench) -> dict[str, Any]:
    args = bench.args
    spins = sorted({LIBGOMP, 1000, 500, 200, SPINS}, reverse=True)
    if args.quick:
        args.rounds, args.seconds, spins = 1, 0.2, [SPINS]
    speeds: dict[tuple[str, int], list[float]] = {(beside, n): [] for beside in BESIDE for n in spins}
    with progress("measurements", args.rounds * len(speeds)) as tell:
        for i in range(args.rounds):
            for j, (beside, n) in enumerate(list(speeds)[:: 1 if i % 2 else -1]):
                speeds[beside, n].append(measured(bench, beside, n))
                tell(i * len(speeds) + j + 1)
    rows = [
        {"beside": beside, "spins": n, "tokens_per_sec": median(values), "all": values}
        for (beside, n), values in speeds.items()
    ]
    table = Table("beside", *(f"{n:,} spins" for n in spins))
    for beside in BESIDE:
        table.add_row(beside, *(f"{median(speeds[beside, n]):.1f}" for n in spins))
    console.print(table)
    return {"rows": rows, "default_spins": SPINS}


def measured(bench: Bench, beside: str, spins: int) -> float:
    """Tokens per second of one engine; of two, the mean of what each has in the same time."""
    environment = os.environ | {"GOMP_SPINCOUNT": str(spins), "OMP_WAIT_POLICY": "active"}
    command = [sys.executable, __file__, "--engine", "--seconds", str(bench.args.seconds)]
    command += ["--threads", str(bench.args.threads)] + (["--model", bench.args.model] if bench.args.model else [])
    counting = subprocess.Popen([sys.executable, "-c", COUNTING]) if beside == BESIDE[2] else None
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    n_engines = 2 if beside == BESIDE[1] else 1
    engines = [subprocess.Popen(command, env=environment, text=True, **pipes) for _ in range(n_engines)]
    try:
        for engine in engines:
            engine.stdout.readline()  # it is loaded
        for engine in engines:
            engine.stdin.write("go\n")
            engine.stdin.flush()
        told = [engine.communicate()[0] for engine in engines]
    finally:
        for process in [*engines, *([counting] if counting else [])]:
            process.kill()
            process.wait()
    return sum(float(text) for text in told) / len(told)


def decode(bench: Bench, seconds: float) -> float:
    """Greedy tokens per second, prompts included, of answers of up to 96 tokens; begun when a line comes in."""
    sampling = SamplingConfig(max_tokens=96, temperature=0.0)
    config = RuntimeConfig(n_ctx=512, n_threads=bench.args.threads)
    with LlamaCppBackend.open(bench.base.path, config=config) as backend:
        prompt = backend.render(user_prompt("How do boats float?"))
        print("ready", flush=True)
        sys.stdin.readline()
        count, start = 0, time.perf_counter()
        while True:
            for chunk in backend.generate(prompt, vectors=None, sampling=sampling):
                count += len(chunk.tokens)
                if (now := time.perf_counter()) - start > seconds:
                    return count / (now - start)


if __name__ == "__main__":
    p = parser("Tokens per second beside other processes, by how long waiting threads stay awake.")
    p.add_argument("--rounds", type=int, default=3, help="interleaved")
    p.add_argument("--seconds", type=float, default=6.0, help="of decoding in each measurement")
    p.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    arguments = p.parse_args()
    if arguments.engine:
        with Bench.open(arguments) as opened:
            print(decode(opened, arguments.seconds))
    else:
        main(run, arguments, __file__)
