"""LoRA-DPO with a tuned learning rate against edge-align, on the same pairs of the same people.

    python bench/answers.py --set train && python bench/lora.py --save

The learning rate is the one with the highest mean win rate on validation people and validation prompts among those
whose answers stay within NLL_LIMIT times the base's NLL. Every arm answers the same unseen prompts in one PyTorch
engine; the LoRA is merged into the weights. Made for a GPU; on two cores a training takes minutes. What is done is
kept, so a stopped run goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from common import (
    Answer,
    Bench,
    chosen_users,
    console,
    digest,
    learn_profile,
    main,
    parser,
    sample_rows,
    SEED,
    steering_rows,
    timed,
    train_answers,
    users_pairs,
)
from lora_dpo import build_hf, LoRA, merged, tokenized, train
from quality import answer_cap, judged, other_judges
from rich.table import Table

from edge_align.records import PreferencePair
from edge_align.simulation.prompts import prompts
from edge_align.simulation.users import bootstrap_interval, User, user, wins

TUNERS = "casual,formal,hedged,assertive"  # validation people whose answers need no cap of their own
TUNING_PAIRS = 100
NLL_LIMIT = 1.25


def run(bench: Bench) -> dict[str, Any]:
    args = bench.args
    if args.quick:
        args.prompts, args.tune_prompts, args.max_tokens, args.sizes, args.rates = 2, 2, 8, "8", "3e-4"
        args.users, args.epochs = "positive", 1
    trainer = Trainer(bench)
    rates = [float(rate) for rate in args.rates.split(",")]
    tuned = [tune(trainer, rate) for rate in rates]
    fluent = [row for row in tuned if row["nll_ratio"] <= NLL_LIMIT] or tuned
    best = max(fluent, key=lambda row: row["win_rate"])
    settings = replace(trainer.settings, learning_rate=best["learning_rate"])
    console.print(f"learning rate {settings.learning_rate:g}")
    unseen = list(prompts("test")[: args.prompts])
    rows = []
    for size in [int(n) for n in args.sizes.split(",")]:
        for who in chosen_users(args.users):
            rows += compare(trainer, who, settings, unseen, size=size)
    show(rows)
    return {
        "tuning": tuned,
        "tuning_sec": sum(row["seconds"] for row in tuned),
        "lora": asdict(settings),
        "prompts": len(unseen),
        "rows": rows,
        "summary": summary(rows),
    }


class Trainer:
    """What both arms share: the answers people choose from, and the base in PyTorch and in transformers."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.settings = LoRA(rank=bench.args.rank, alpha=2 * bench.args.rank, epochs=bench.args.epochs)
        self.questions, self.answers = train_answers(bench)
        self.second = other_judges()

    @cached_property
    def base(self) -> Any:
        return build_hf(self.bench).to("cuda" if torch.cuda.is_available() else "cpu")

    def pairs(self, who: User, size: int) -> list[PreferencePair]:
        n = 8 if self.bench.args.quick else size
        return users_pairs(who, self.questions, self.answers, n=n, seed=self.bench.args.seed)

    def unsteered(self, unseen: Sequence[str], cap: int) -> list[Answer]:
        """The base's answers."""
        return self._sampled("rows", unseen, cap, None, "base answers")

    def personal(self, unseen: Sequence[str], cap: int, vectors: np.ndarray) -> list[Answer]:
        """Answers steered by vectors (n, n_layer, d_model)."""
        return self._sampled("rows", unseen, cap, vectors, "edge-align", digest(vectors))

    def _sampled(
        self, name: str, unseen: Sequence[str], cap: int, vectors: np.ndarray | None, label: str, *depends: Any
    ) -> list[Answer]:
        bench, seed = self.bench, self.bench.args.seed + SEED
        kept = bench.keep(name, list(unseen), cap, seed, str(bench.reference.dtype), *depends)
        return sample_rows(
            bench, bench.reference, list(unseen), vectors, max_tokens=cap, seed=seed, kept=kept, label=label
        )

    def lora(
        self, who: User, settings: LoRA, unseen: Sequence[str], cap: int, size: int
    ) -> tuple[dict[str, Any], list[Answer]]:
        """What training took, and the answers after it."""
        bench, pairs = self.bench, self.pairs(who, size)
        texts = [[pair.prompt[-1].content, pair.chosen, pair.rejected] for pair in pairs]
        named = digest(list(asdict(settings).values()), texts)
        row, answers = bench.keep("lora-training", named), bench.keep("lora-answers", named, list(unseen), cap)
        if not row.rows or len(answers.rows) < len(unseen):
            found, deltas = train(
                self.base, tokenized(bench, pairs), settings, dtype=bench.args.dtype, seed=bench.args.seed
            )
            if not row.rows:
                row.add(found)
            with merged(bench.reference, deltas) as model:
                seed = bench.args.seed + SEED
                sample_rows(
                    bench, model, list(unseen), None, max_tokens=cap, seed=seed, kept=answers, label=f"{who.name}: LoRA"
                )
        return row.rows[0], [Answer(kept["text"], kept["tokens"]) for kept in answers.rows]


def tune(trainer: Trainer, rate: float) -> dict[str, Any]:
    """Mean over the validation people at this learning rate."""
    args = trainer.bench.args
    unseen = list(prompts("validation")[: args.tune_prompts])
    settings = replace(trainer.settings, learning_rate=rate)
    rows = []
    for who in [user(name) for name in TUNERS.split(",")[: 1 if args.quick else None]]:
        cap = answer_cap(trainer.bench, who)
        cost, made = trainer.lora(who, settings, unseen, cap, TUNING_PAIRS)
        rows.append(judged(trainer.bench, who, unseen, made, trainer.unsteered(unseen, cap), None) | cost)
    found = {name: float(np.mean([row[name] for row in rows])) for name in ("win_rate", "nll_ratio", "distinct2_ratio")}
    console.print(f"learning rate {rate:g}: win {found['win_rate']:.3f}, nll x {found['nll_ratio']:.2f}")
    return {"learning_rate": rate, **found, "seconds": sum(row["seconds"] for row in rows)}


def compare(trainer: Trainer, who: User, settings: LoRA, unseen: Sequence[str], *, size: int) -> list[dict[str, Any]]:
    """A row for the LoRA and, unless it was not asked for, one for ours."""
    bench, cap = trainer.bench, answer_cap(trainer.bench, who)
    base, second = trainer.unsteered(unseen, cap), trainer.second.get(who.name)
    cost, theirs = trainer.lora(who, settings, unseen, cap, size)
    arms = [("LoRA-DPO", theirs, cost["seconds"], cost["stored_bytes"], cost["device"])]
    if not bench.args.lora_only:
        seconds, profile = timed(lambda: learn_profile(bench, trainer.pairs(who, size)))
        vectors = steering_rows(bench, profile.encoder, unseen)
        stored = sum(array.nbytes for array in profile.encoder.to_tensors().values())
        arms.append(("edge-align", trainer.personal(unseen, cap, vectors), seconds, stored, "cpu"))
    rows = []
    for name, made, seconds, stored, device in arms:
        row = judged(bench, who, list(unseen), made, base, second)
        row |= {"user": who.name, "pairs": size, "arm": name, "seconds": seconds, "stored_bytes": stored}
        row["trained_on"] = device
        won = wins(who.judge, [answer.text for answer in made], [answer.text for answer in base])
        rows.append(row | {"won": won.tolist()})
        console.print(f"{who.name} {size}, {name}: win {row['win_rate']:.2f}, nll x {row['nll_ratio']:.2f}")
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per number of pairs: means of both arms, and ours less theirs by prompt, with its bootstrap interval."""
    found: dict[str, Any] = {}
    sizes = sorted({row["pairs"] for row in rows})
    won = {(row["arm"], row["pairs"], row["user"]): np.array(row["won"]) for row in rows}
    for size in sizes:
        own = [row for row in rows if row["pairs"] == size]
        arms = {row["arm"] for row in own}
        found[f"pairs_{size}"] = {
            arm: {
                name: float(np.mean([row[name] for row in own if row["arm"] == arm]))
                for name in ("win_rate", "nll_ratio", "distinct2_ratio", "seconds", "stored_bytes")
            }
            for arm in sorted(arms)
        }
    names = sorted({row["user"] for row in rows})
    for ours, theirs in [(size, size) for size in sizes] + [(min(sizes), 100)] * (min(sizes) < 100 and 100 in sizes):
        if all(("edge-align", ours, name) in won and ("LoRA-DPO", theirs, name) in won for name in names):
            gain = np.mean([won["edge-align", ours, name] - won["LoRA-DPO", theirs, name] for name in names], axis=0)
            low, high = bootstrap_interval(gain, rng=np.random.default_rng(0))
            found[f"edge-align {ours} less LoRA-DPO {theirs}"] = {"mean": float(gain.mean()), "ci": [low, high]}
    return found


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table("user", "pairs", "arm", "win", "2nd", "nll x", "dist-2", "tokens", "seconds", "bytes")
    for row in rows:
        table.add_row(
            row["user"],
            str(row["pairs"]),
            row["arm"],
            f"{row['win_rate']:.3f}",
            "" if row["second_win_rate"] is None else f"{row['second_win_rate']:.2f}",
            f"{row['nll_ratio']:.2f}",
            f"{row['distinct2_ratio']:.2f}",
            f"{row['mean_tokens']:.0f}/{row['mean_tokens_base']:.0f}",
            f"{row['seconds']:.1f}",
            f"{row['stored_bytes']:,}",
        )
    console.print(table)


if __name__ == "__main__":
    p = parser("LoRA-DPO, tuned on validation people, against edge-align on the same pairs.")
    p.add_argument("--users", metavar="A,B", help="default: all eight")
    p.add_argument("--sizes", default="20,100,200", help="pairs learnt from")
    p.add_argument("--prompts", type=int, default=100, help="unseen test prompts")
    p.add_argument("--tune-prompts", type=int, default=64, help="validation prompts")
    p.add_argument("--max-tokens", type=int, default=64)
    p.add_argument("--rates", default="1e-4,3e-4,1e-3", help="learning rates to choose from")
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the base; adapters are float32")
    p.add_argument("--lora-only", action="store_true", help="leave ours out")
    main(run, p.parse_args(), __file__)
