"""LoRA-DPO and P-tuning-DPO against edge-align on the same pairs of one user: seconds, memory, bytes, win rate.

    python bench/training_time.py --save              # theirs take minutes on two cores; kept when done
    python bench/training_time.py --pairs 2000 --steps 10 --save    # their time extrapolated, and marked so
    python bench/training_time.py --trl --save        # and a LoRA trained by TRL's own DPOTrainer

Theirs (`lora_dpo.py`, `trl_dpo.py`) train in the faster of bfloat16 and float32 here, and their loading time is left
out while ours is counted; ours is timed before, between and after them, stage by stage, beside the matrix products of
its encoding alone. More pairs than there are answers for are what is there in another order of words: they cost the
same, and nobody's answers are judged by them. All answers come from one PyTorch engine; the
LoRA is merged into its weights. Peak memory is that of the process so far, so theirs are not below ours.
"""

from __future__ import annotations

import common  # noqa: F401  # isort: skip  (it sets how threads wait, which is read when torch is loaded)

import resource
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
import trl_dpo
from beside import OURS
from common import (
    Answer,
    Bench,
    console,
    digest,
    learn_profile,
    main,
    parser,
    sample_rows,
    SEED,
    short_pairs,
    steering_rows,
    timed,
)
from lora_dpo import applied, build_hf, fastest_dtype, kept_training, LoRA, PTuning, tokenized, train
from personalize_time import encoded_lengths, matmul_floor
from quality import judged, other_judges
from rich.table import Table
from safetensors.torch import load_file

from edge_align.config import PersonalizeConfig
from edge_align.records import PreferencePair
from edge_align.runtime.torch_ref import fastest
from edge_align.simulation.prompts import prompts
from edge_align.simulation.users import user

METHODS = {"LoRA-DPO": LoRA(), "P-tuning-DPO": PTuning()}
BY_TRL = "LoRA-DPO by TRL"


def run(bench: Bench) -> dict[str, Any]:
    args = bench.args
    if args.quick:
        args.pairs, args.tokens, args.prompts, args.max_tokens, args.steps = 8, 12, 2, 8, args.steps or 1
        args.trl = True
    who = user(args.user)
    pairs = short_pairs(bench, who, n=args.pairs, tokens=args.tokens)
    real, pairs = len(pairs), reordered(pairs, args.pairs)
    profiles = [learn_profile(bench, pairs, kl_budget=args.kl_budget)]
    memory = peak_mb()
    trained, adapters = {}, {}
    for name, settings in (METHODS | ({BY_TRL: LoRA()} if args.trl else {})).items():
        trained[name], adapters[name] = train_other(bench, pairs, settings, by_trl=name == BY_TRL)
        profiles.append(learn_profile(bench, pairs, kl_budget=args.kl_budget))
    profile, ours = profiles[0], [sum(each.stages_sec.values()) for each in profiles]
    found = {
        "user": who.name,
        "pairs": len(pairs),
        "edge_align_sec": float(np.median(ours)),
        "edge_align_runs_sec": ours,
        "stages_sec": {
            stage: float(np.median([each.stages_sec[stage] for each in profiles])) for stage in profile.stages_sec
        },
        "encoder": encoder_floor(bench, pairs),
        "edge_align_bytes": sum(array.nbytes for array in profile.encoder.to_tensors().values()),
        "edge_align_peak_rss_mb": memory,
        "trained": trained,
        "ours_over_it": {name: float(np.median(ours)) / cost["seconds"] for name, cost in trained.items()},
    }
    if not args.no_answers and real == len(pairs):
        found |= compare(bench, profile.encoder, adapters)
    stages = ", ".join(f"{stage} {value:.2f} s" for stage, value in found["stages_sec"].items())
    console.print(f"{OURS}: {stages}; the encoder's matrix products alone {found['encoder']['products_sec']:.2f} s")
    table = Table("", "seconds", "bytes", "win rate", "nll x", "dist-2")
    costs = {OURS: (found["edge_align_sec"], found["edge_align_bytes"], False)}
    costs |= {name: (cost["seconds"], cost["stored_bytes"], cost["extrapolated"]) for name, cost in trained.items()}
    for name, (sec, stored, extrapolated) in costs.items():
        said = found.get("answers", {}).get(name)
        told = () if said is None else (said[key] for key in ("win_rate", "nll_ratio", "distinct2_ratio"))
        note = " (extrapolated)" if extrapolated else ""
        table.add_row(name, f"{sec:.2f}{note}", f"{stored:,}", *(f"{value:.3f}" for value in told))
    console.print(table)
    return found


def reordered(pairs: list[PreferencePair], n: int) -> list[PreferencePair]:
    """`n` pairs of the same lengths, no text twice: those there are, then the same with their words turned round."""

    def turned(text: str, by: int) -> str:
        words = text.split(" ")
        return " ".join(words[by % len(words) :] + words[: by % len(words)])

    return [
        replace(pair, chosen=turned(pair.chosen, turn), rejected=turned(pair.rejected, turn))
        for turn in range(-(-n // len(pairs)))
        for pair in pairs
    ][:n]


def encoder_floor(bench: Bench, pairs: Sequence[PreferencePair]) -> dict[str, float]:
    """What encoding the answers of `pairs` cannot do without: products, their seconds here, weights it reads once."""
    lengths, dtype = encoded_lengths(bench, pairs), fastest()[1]
    work, weights = matmul_floor(bench, lengths, dtype)
    work()  # the first is a warm-up
    seconds, _ = timed(work)
    return {
        "answers": len(lengths),
        "tokens": sum(lengths),
        "gflop": 2e-9 * weights * sum(lengths),
        "products_sec": seconds,
        "weight_bytes": weights * dtype.itemsize,
    }


def peak_mb() -> float:
    """The most memory this process has held, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# -- answers -------------------------------------------------------------------------------------------------------
def compare(bench: Bench, encoder: Any, adapters: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """All against the base's answers to the same prompts, same cap and seed: win rates, NLL, distinct-2, length."""
    args, who = bench.args, user(bench.args.user)
    unseen = list(prompts("test")[: args.prompts])
    model, seed = bench.reference, args.seed + SEED

    def answers(name: str, vectors: np.ndarray | None = None, **more: Any) -> list[Answer]:
        """depends: names what was trained; before: tokens ahead of every prompt."""
        kept = bench.keep(f"training-{name}", unseen, args.max_tokens, seed, str(model.dtype), more.pop("depends", ""))
        options = {"max_tokens": args.max_tokens, "seed": seed, "kept": kept, "label": name, **more}
        return list(sample_rows(bench, model, unseen, vectors, **options))

    base = answers("base")
    arrays = steering_rows(bench, encoder, unseen)
    made = {OURS: answers(OURS, arrays, depends=digest(arrays))}
    for name, adapter in adapters.items():
        depends = digest(*[part.numpy() for part in adapter.values()])
        with applied(model, adapter) as ids:
            made[name] = answers(name, depends=depends, before=ids)
    second = other_judges().get(who.name)
    return {
        "prompts": len(unseen),
        "answers": {name: judged(bench, who, unseen, of_arm, base, second) for name, of_arm in made.items()},
    }


# -- theirs --------------------------------------------------------------------------------------------------------
def train_other(
    bench: Bench, pairs: Sequence[PreferencePair], settings: LoRA | PTuning, *, by_trl: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(seconds and settings, the adapter); kept when done, for it takes long."""
    args = bench.args
    options = [type(settings).__name__, *asdict(settings).values(), args.steps, args.dtype, args.seed, args.threads]
    options += [BY_TRL] if by_trl else []
    texts = [[pair.prompt[-1].content, pair.chosen, pair.rejected] for pair in pairs]

    def trained() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        rows, base = tokenized(bench, pairs), build_hf(bench)
        dtype, tried = fastest_dtype(base, rows, settings, args.dtype)
        work = trl_dpo.train if by_trl else train
        row, adapter = work(base, rows, settings, dtype=dtype, seed=args.seed, steps=args.steps)
        return row | {"probe_sec": tried, "peak_rss_mb": peak_mb()} | asdict(settings), adapter

    cost, path = kept_training(bench.keep("trained-time", options, texts), trained)
    return cost, load_file(path)


if __name__ == "__main__":
    p = parser("LoRA-DPO and P-tuning-DPO against edge-align on the same pairs: seconds, memory, bytes, win rate.")
    p.add_argument("--user", default="positive")
    p.add_argument("--pairs", type=int, default=200)
    p.add_argument("--tokens", type=int, default=75, help="answers are cut to this many tokens")
    p.add_argument("--prompts", type=int, default=100, help="unseen test prompts")
    p.add_argument("--max-tokens", type=int, default=96)
    p.add_argument("--steps", type=int, default=0, help="stop theirs after so many steps and extrapolate their time")
    p.add_argument("--trl", action="store_true", help="also a LoRA by TRL's DPOTrainer, as it comes")
    p.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: the faster one here")
    p.add_argument("--kl-budget", type=float, default=PersonalizeConfig().kl_budget)
    p.add_argument("--no-answers", action="store_true", help="seconds only")
    main(run, p.parse_args(), __file__)
