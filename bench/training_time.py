"""LoRA-DPO against edge-align on the same 200 pairs of one user: seconds, and win rate on the same unseen prompts.

    python bench/training_time.py --save              # the LoRA takes half an hour on two cores; kept when done
    python bench/training_time.py --steps 4 --save    # its time extrapolated, and marked so

The LoRA (`lora_dpo.py`) trains in the faster of bfloat16 and float32 here, and its loading time is left out while ours
is counted.
All answers come from one PyTorch engine; the LoRA is merged into its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from common import (
    Answer,
    Bench,
    console,
    digest,
    learn_profile,
    main,
    parser,
    reference_model,
    sample_rows,
    SEED,
    short_pairs,
    steering_rows,
    timed,
)
from lora_dpo import build_hf, fastest_dtype, LoRA, merge, tokenized, train
from rich.table import Table
from safetensors.torch import load_file, save_file

from edge_align.config import PersonalizeConfig
from edge_align.records import PreferencePair
from edge_align.simulation.prompts import prompts
from edge_align.simulation.users import bootstrap_interval, user, wins

SETTINGS = LoRA()


def run(bench: Bench) -> dict[str, Any]:
    args = bench.args
    if args.quick:
        args.pairs, args.tokens, args.prompts, args.max_tokens, args.steps = 8, 12, 2, 8, args.steps or 1
    who = user(args.user)
    pairs = short_pairs(bench, who, n=args.pairs, tokens=args.tokens)
    seconds, profile = timed(lambda: learn_profile(bench, pairs, kl_budget=args.kl_budget))
    console.print(f"edge-align: {seconds:.2f} s")
    lora, deltas = train_lora(bench, pairs)
    found = {"user": who.name, "pairs": len(pairs), "edge_align_sec": seconds, "lora": lora}
    found["lora_over_edge_align"] = lora["seconds"] / seconds
    if not args.no_answers:
        found |= compare(bench, profile.encoder, deltas)
    table = Table("", "seconds", "win rate")
    for name, cost in (("edge-align", seconds), ("LoRA-DPO", lora["seconds"])):
        note = " (extrapolated)" if name == "LoRA-DPO" and lora["extrapolated"] else ""
        rate = found.get("win_rate", {}).get(name)
        table.add_row(name, f"{cost:.2f}{note}", "" if rate is None else f"{rate:.3f}")
    console.print(table)
    return found


# -- answers -------------------------------------------------------------------------------------------------------
def compare(bench: Bench, encoder: Any, deltas: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Win rates of both against the base's answers to the same prompts, same cap and seed."""
    args, who = bench.args, user(bench.args.user)
    unseen = list(prompts("test")[: args.prompts])
    model, seed = reference_model(bench), args.seed + SEED

    def texts(name: str, vectors: np.ndarray | None, *depends: Any) -> list[str]:
        kept = bench.keep(f"training-{name}", unseen, args.max_tokens, seed, str(model.dtype), *depends)
        made: list[Answer] = sample_rows(
            bench, model, unseen, vectors, max_tokens=args.max_tokens, seed=seed, kept=kept, label=name
        )
        return [answer.text for answer in made]

    base = texts("base", None)
    arrays = steering_rows(bench, encoder, unseen)
    ours = texts("ours", arrays, digest(arrays))
    merge(model, deltas)
    theirs = texts("lora", None, digest(*[d.numpy() for d in deltas.values()]))
    found: dict[str, Any] = {"prompts": len(unseen), "win_rate": {}, "win_ci": {}}
    for name, made in (("edge-align", ours), ("LoRA-DPO", theirs)):
        won = wins(who.judge, made, base)
        found["win_rate"][name] = float(won.mean())
        found["win_ci"][name] = list(bootstrap_interval(won, rng=np.random.default_rng(0)))
    return found


# -- LoRA-DPO ------------------------------------------------------------------------------------------------------
def train_lora(bench: Bench, pairs: Sequence[PreferencePair]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(seconds and settings, weight changes by "layer.module"); kept when done, for it takes long."""
    args = bench.args
    options = [*asdict(SETTINGS).values(), args.steps, args.dtype, args.seed, args.threads]
    texts = [[pair.prompt[-1].content, pair.chosen, pair.rejected] for pair in pairs]
    report = bench.keep("lora", options, texts)
    path = report.path.with_suffix(".safetensors")
    if not (report.rows and path.is_file()):
        rows, base = tokenized(bench, pairs), build_hf(bench)
        dtype, tried = fastest_dtype(base, rows, SETTINGS, args.dtype)
        row, deltas = train(base, rows, SETTINGS, dtype=dtype, seed=args.seed, steps=args.steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: delta.contiguous() for name, delta in deltas.items()}, path)
        report.add(row | {"probe_sec": tried} | asdict(SETTINGS))
    return report.rows[-1], load_file(path)


if __name__ == "__main__":
    p = parser("LoRA-DPO against edge-align on the same pairs: seconds and win rate.")
    p.add_argument("--user", default="positive")
    p.add_argument("--pairs", type=int, default=200)
    p.add_argument("--tokens", type=int, default=75, help="answers are cut to this many tokens")
    p.add_argument("--prompts", type=int, default=100, help="unseen test prompts")
    p.add_argument("--max-tokens", type=int, default=96)
    p.add_argument("--steps", type=int, default=0, help="stop the LoRA after so many steps and extrapolate its time")
    p.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: the faster one here")
    p.add_argument("--kl-budget", type=float, default=PersonalizeConfig().kl_budget)
    p.add_argument("--no-answers", action="store_true", help="seconds only")
    main(run, p.parse_args(), __file__)
