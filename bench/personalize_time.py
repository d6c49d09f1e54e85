"""How long `personalize` takes on 200 pairs of 75-token answers: per stage, beside the bare matrix products, and cold.

    python bench/personalize_time.py --save

The floor is the time of the encoder's own matrix products (two blocks, the real tokens, the same dtype) and nothing
else: no attention, no rotation, no reading of weights. The cold figure is a fresh process in a fresh home; the files
are in the page cache.
"""

from __future__ import annotations

import common  # noqa: F401  # isort: skip  (it sets how threads wait, which is read when torch is loaded)

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import Bench, check_fluent, console, dataset_of, main, parser, ROOT, short_pairs, timed
from rich.table import Table

from edge_align import learning
from edge_align.config import PersonalizeConfig
from edge_align.encoder import PreferenceEncoder
from edge_align.errors import EdgeAlignError
from edge_align.features import AnswerEncoder, MAX_TOKENS, N_BLOCKS, TOKENS_PER_BATCH
from edge_align.home import Home
from edge_align.latent_dpo import LatentDPOConfig
from edge_align.pairs import Dataset
from edge_align.profiles import ProfileStore
from edge_align.records import PreferencePair
from edge_align.runtime.torch_ref import LlamaReference
from edge_align.runtime.torch_rows import batches
from edge_align.simulation.users import pair_lines, user


def run(bench: Bench) -> dict[str, Any]:
    args = bench.args
    if args.quick:
        args.pairs, args.runs, args.tokens = 12, 1, 16
    pairs = short_pairs(bench, user(args.user), n=args.pairs, tokens=args.tokens)
    dataset = dataset_of(pairs)
    lengths = encoded_lengths(bench, dataset.pairs)
    native = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    dtypes = ("bf16", "fp32") if native else ("fp32",)  # elsewhere nobody is given bfloat16
    warm = {name: stages(bench, dataset, lengths, bf16=name == "bf16") for name in dtypes}
    table = Table("dtype", "encode", "fit", "calibrate", "sum", "floor", "encode / floor", "sum / floor", "check")
    for name, row in warm.items():
        keys = ("encode", "fit", "calibrate", "sum", "floor", "encode_over_floor", "sum_over_floor", "check")
        table.add_row(name, *(f"{row[key]:.3f}" for key in keys))
    console.print(table)
    found = {"pairs": len(pairs), "answers": len(lengths), "tokens": sum(lengths), "mean_tokens": np.mean(lengths)}
    found |= {"bf16_native": native, "warm_sec": warm}
    return found | cold(bench, pairs)


def stages(bench: Bench, dataset: Dataset, lengths: list[int], *, bf16: bool) -> dict[str, float]:
    """Median seconds per stage over --runs, and of the floor."""
    opened = learning.open_base_encoder
    learning.open_base_encoder = lambda base, **_: AnswerEncoder(base.path, bf16=bf16)
    floor, _ = matmul_floor(bench, lengths, torch.bfloat16 if bf16 else torch.float32)
    budget = PersonalizeConfig().kl_budget
    seconds: dict[str, list[float]] = {"encode": [], "fit": [], "calibrate": [], "floor": [], "check": []}
    try:
        for i in range(bench.args.runs + 1):  # the first is a warm-up
            parts = {}
            parts["encode"], feedback = timed(
                lambda: learning.encode_dataset(bench.base, bench.pack, dataset, runtime=bench.runtime)
            )
            parts["fit"], learnt = timed(lambda f=feedback: learning.learn(bench.pack, f, seed=0))
            parts["calibrate"], _ = timed(lambda x=learnt: learning.calibrate(bench.pack, x, kl_budget=budget))
            parts["floor"], _ = timed(floor)
            encoder, _ = learning.calibrate(bench.pack, learnt, kl_budget=budget)
            if i:  # seconds long, and it opens an engine of its own: nothing to warm up
                parts["check"], _ = timed(lambda x=learnt, e=encoder: check_fluent(bench, x, e))
            for name, value in parts.items():
                if i:
                    seconds[name].append(value)
    finally:
        learning.open_base_encoder = opened
    row = {name: median(values) for name, values in seconds.items()}
    row["sum"] = median(sum(parts) for parts in zip(*(seconds[k] for k in ("encode", "fit", "calibrate")), strict=True))
    return row | {"encode_over_floor": row["encode"] / row["floor"], "sum_over_floor": row["sum"] / row["floor"]}


def encoded_lengths(bench: Bench, pairs: Sequence[PreferencePair]) -> list[int]:
    """Tokens that are read of each text of `pairs`, every text once, shortest first."""
    texts = {text for pair in pairs for text in (pair.chosen, pair.rejected)}
    return sorted(min(MAX_TOKENS, len(bench.backend.tokenize(text))) for text in texts)


def matmul_floor(bench: Bench, lengths: list[int], dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """Work that does the encoder's matrix products alone, batch by batch, on real tokens; the weights they have."""
    model = LlamaReference(bench.base.path, n_layer=N_BLOCKS, dtype=dtype)
    weights = [(b.qkv, b.out, b.gate_up, b.down) for b in model.blocks]
    sizes = [sum(lengths[i] for i in rows) for rows in batches(range(len(lengths)), lengths, TOKENS_PER_BATCH)]
    widest = max(w.shape[1] for block in weights for w in block)
    inputs = torch.randn(max(sizes), widest).to(dtype)

    @torch.inference_mode()
    def work() -> None:
        for size in sizes:
            for block in weights:
                for w in block:
                    torch.nn.functional.linear(parts[size, w.shape[1]], w)

    parts = {(s, w.shape[1]): inputs[:s, : w.shape[1]].contiguous() for s in sizes for b in weights for w in b}
    return work, sum(w.numel() for block in weights for w in block)


def cold(bench: Bench, pairs: list[PreferencePair]) -> dict[str, Any]:
    """Wall seconds of the whole command in a fresh process and home, and what a profile weighs."""
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder) / "home")
        if bench.home.packs_dir.is_dir():
            shutil.copytree(bench.home.packs_dir, home.packs_dir)
        feedback = Path(folder) / "feedback.jsonl"
        feedback.write_text("".join(line + "\n" for line in pair_lines(pairs)))
        command = [sys.executable, "-m", "edge_align.cli.main", "personalize", "--feedback", str(feedback), "--json"]
        command += ["--model", bench.args.model] if bench.args.model else []
        command += ["--threads", str(bench.args.threads)]
        env = os.environ | {"EDGE_ALIGN_HOME": str(home.root), "PYTHONPATH": str(ROOT)}
        if bench.args.threads:
            env["OMP_NUM_THREADS"] = str(bench.args.threads)
        seconds, done = timed(lambda: subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True))
        if done.returncode:
            raise EdgeAlignError(f"personalize failed: {done.stderr.strip()}")
        report = json.loads(done.stdout)
        console.print(f"cold: {seconds:.2f} s; {report['stages_sec']}")
        store = ProfileStore(home)
        _, manifest = store.load(report["profile"], report["version"])
        return {
            "cold_sec": seconds,
            "cold_stages_sec": report["stages_sec"],
            "activated": report["activated"],
            "profile_bytes": {
                "constant": weigh(bench, store, manifest, 0),
                "head": weigh(bench, store, manifest, None),
            },
        }


def weigh(bench: Bench, store: ProfileStore, manifest: dict[str, Any], rank: int | None) -> int:
    """Bytes of a saved version with a head of this rank (None: the rank that is learnt)."""
    rank = LatentDPOConfig().head_rank if rank is None else rank
    k, inputs = bench.pack.k, bench.pack.prompt_projection.shape[1]
    rng = np.random.default_rng(0)
    encoder = PreferenceEncoder(
        mean=rng.standard_normal(k).astype(np.float32),
        head_in=rng.standard_normal((rank, inputs)).astype(np.float32),
        head_out=rng.standard_normal((k, rank)).astype(np.float32),
        scale=1.0,
    )
    version = store.save("weighed", encoder.to_tensors(), manifest)
    return store.size_bytes("weighed", version.number)


if __name__ == "__main__":
    p = parser("Seconds of personalize, warm per stage and cold, beside the matmul floor; bytes of a profile.")
    p.add_argument("--pairs", type=int, default=200)
    p.add_argument("--tokens", type=int, default=75, help="answers are cut to this many tokens")
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--user", default="positive")
    main(run, p.parse_args(), __file__)
