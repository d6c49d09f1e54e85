"""What trains through the base for every person, its learning rate tuned, against edge-align on the same pairs.

    python bench/answers.py --set train && python bench/lora.py --save
    python bench/lora.py --method ptuning --rates 1e-3,3e-3,1e-2 --save
    python bench/lora.py --method bipo --rates 1e-3,1e-2 --save

The methods: LoRA-DPO, P-tuning-DPO, and steering vectors (BiPO, bipo.py).

The learning rate is the one with the highest mean win rate on validation people and validation prompts among those
whose answers stay within NLL_LIMIT times the base's NLL; a single one is taken as it is. Every arm answers the same
unseen prompts in one PyTorch engine, into whose weights a LoRA is merged. LoRA and vectors come as they were trained
and, in an arm of their own, scaled to the KL from the base that ours measures. On two cores a training takes minutes.
What is done is kept, so a stopped run goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import bipo
import numpy as np
import torch
from beside import at_our_kl, OURS, summary
from common import (
    Answer,
    Bench,
    chosen_users,
    console,
    count_pairs,
    learn_profile,
    main,
    parser,
    ReferenceScorer,
    sample_reference,
    sample_rows,
    SEED,
    steering_rows,
    timed,
    train_answers,
    users_option,
    users_pairs,
)
from lora_dpo import applied, build_hf, kept_training, LoRA, PTuning, tokenized, train, Training
from quality import answer_cap, judged, other_judges
from rich.table import Table
from safetensors.torch import load_file

from edge_align.kl import measured_kl, open_probe, Probe, sampled_probe, search_factor
from edge_align.records import PreferencePair, SteeringVectors
from edge_align.simulation.prompts import prompts
from edge_align.simulation.users import User, user, wins

METHODS = {"lora": "LoRA-DPO", "ptuning": "P-tuning-DPO", "bipo": "BiPO"}
TUNING_PAIRS = 100
NLL_LIMIT = 1.25


def run(bench: Bench) -> dict[str, Any]:
    args = bench.args
    if args.quick:
        args.prompts, args.tune_prompts, args.max_tokens, args.sizes, args.rates = 2, 2, 8, "8", "3e-4"
        args.users, args.epochs = "positive", 1
    trainer = Trainer(bench)
    rates = [float(rate) for rate in args.rates.split(",")]
    tuned = [tune(trainer, rate) for rate in rates] if len(rates) > 1 else []
    fluent = [row for row in tuned if row["nll_ratio"] <= NLL_LIMIT] or tuned
    best = max(fluent, key=lambda row: row["win_rate"])["learning_rate"] if tuned else rates[0]
    settings = replace(trainer.settings, learning_rate=best)
    console.print(f"learning rate {settings.learning_rate:g}")
    unseen = list(prompts("test")[: args.prompts])
    rows = []
    for size in [int(n) for n in args.sizes.split(",")]:
        for who in chosen_users(args.users):
            if not args.quick and count_pairs(who, trainer.answers) < size:
                console.print(f"{who.name} {size}: left out, the answers differ too seldom for this person")
                continue
            rows += compare(trainer, who, settings, unseen, size=size)
    show(rows)
    return {
        "method": trainer.name,
        "tuning": tuned,
        "tuning_sec": sum(row["seconds"] for row in tuned),
        "settings": asdict(settings),
        "prompts": len(unseen),
        "rows": rows,
        "summary": summary(rows, trainer.name),
    }


class Trainer:
    """What both arms share: the answers people choose from, and the base in PyTorch and in transformers."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        args = bench.args
        known = {
            "lora": LoRA(rank=args.rank, alpha=2 * args.rank, epochs=args.epochs),
            "ptuning": PTuning(epochs=args.epochs),
            "bipo": bipo.Bipo(epochs=args.epochs),
        }
        self.settings = known[args.method]
        self.name = METHODS[args.method]
        self.questions, whole = train_answers(bench)
        self.answers = [[self._cut(text) for text in texts] for texts in whole]
        self.second = other_judges()

    @cached_property
    def base(self) -> Any:
        return build_hf(self.bench).to("cuda" if torch.cuda.is_available() else "cpu")

    def _cut(self, text: str) -> str:
        """The first --answer-tokens tokens of an answer."""
        backend, most = self.bench.backend, self.bench.args.answer_tokens
        return backend.detokenize(backend.tokenize(text)[:most]) if most else text

    def pairs(self, who: User, size: int) -> list[PreferencePair]:
        n = 8 if self.bench.args.quick else size
        return users_pairs(who, self.questions, self.answers, n=n, seed=self.bench.args.seed)

    def unsteered(self, unseen: Sequence[str], cap: int) -> list[Answer]:
        """The base's answers."""
        return sample_reference(self.bench, unseen, None, max_tokens=cap, label="base answers")

    def personal(self, unseen: Sequence[str], cap: int, vectors: np.ndarray) -> list[Answer]:
        """Answers steered by vectors (n, n_layer, d_model)."""
        return sample_reference(self.bench, unseen, vectors, max_tokens=cap, label="edge-align")

    def adapter(self, who: User, settings: Training, size: int) -> Adapter:
        """Train once; kept."""
        bench, pairs = self.bench, self.pairs(who, size)
        texts = [[pair.prompt[-1].content, pair.chosen, pair.rejected] for pair in pairs]
        named = [*asdict(settings).values(), bench.args.dtype, bench.args.seed]
        kept = bench.keep("trained", type(settings).__name__, named, texts)

        def work() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
            rows = tokenized(bench, pairs)
            if isinstance(settings, bipo.Bipo):
                return bipo.train(bench.reference, rows, settings, seed=bench.args.seed)
            return train(self.base, rows, settings, dtype=bench.args.dtype, seed=bench.args.seed)

        return Adapter(*kept_training(kept, work))

    def adapted(self, who: User, adapter: Adapter, unseen: Sequence[str], cap: int, strength: float) -> list[Answer]:
        """Answers with the adapter applied at this strength."""
        bench, questions, seed = self.bench, list(unseen), self.bench.args.seed + SEED
        kept = bench.keep("adapted", adapter.path.name, questions, cap, seed, strength)
        named = {"max_tokens": cap, "seed": seed, "kept": kept, "label": f"{who.name}: {self.name} x {strength:.2f}"}
        parts = load_file(adapter.path)
        vectors = steered(parts, strength)
        rows = None if vectors is None else np.repeat(vectors.array[None], len(questions), axis=0)
        with applied(bench.reference, parts, strength=strength) as ids:
            return sample_rows(bench, bench.reference, questions, rows, before=ids, **named)

    @cached_property
    def probe(self) -> Probe:
        """Base answers to prompts of the pack, scored in PyTorch."""
        found = sampled_probe(self.bench.backend, seed=SEED)
        return open_probe(ReferenceScorer(self.bench.reference), found.prompts, found.completions)

    def strength_at(self, adapter: Adapter, kl: float) -> tuple[float, float]:
        """What the adapter is to be multiplied by for this KL, and the KL there, measured in PyTorch."""
        parts = load_file(adapter.path)

        def kl_at(strength: float) -> float:
            with applied(self.bench.reference, parts, strength=strength):
                return measured_kl(ReferenceScorer(self.bench.reference), self.probe, steered(parts, strength))

        return search_factor(kl_at, kl)


@dataclass(frozen=True)
class Adapter:
    """cost: what training took. path: the file of its weights."""

    cost: dict[str, Any]
    path: Path


def steered(parts: dict[str, torch.Tensor], strength: float) -> SteeringVectors | None:
    """What an adapter adds to hidden states, where it is vectors."""
    return SteeringVectors(strength * parts["vectors"].numpy()) if "vectors" in parts else None


def tune(trainer: Trainer, rate: float) -> dict[str, Any]:
    """Mean over the validation people at this learning rate."""
    args = trainer.bench.args
    unseen = list(prompts("validation")[: args.tune_prompts])
    settings = replace(trainer.settings, learning_rate=rate)
    rows = []
    for who in [user(name) for name in args.tuners.split(",")[: 1 if args.quick else None]]:
        cap = answer_cap(trainer.bench, who)
        adapter = trainer.adapter(who, settings, TUNING_PAIRS)
        made = trainer.adapted(who, adapter, unseen, cap, 1.0)
        rows.append(judged(trainer.bench, who, unseen, made, trainer.unsteered(unseen, cap), None) | adapter.cost)
    found = {name: float(np.mean([row[name] for row in rows])) for name in ("win_rate", "nll_ratio", "distinct2_ratio")}
    console.print(f"learning rate {rate:g}: win {found['win_rate']:.3f}, nll x {found['nll_ratio']:.2f}")
    return {"learning_rate": rate, **found, "seconds": sum(row["seconds"] for row in rows)}


def compare(
    trainer: Trainer, who: User, settings: Training, unseen: Sequence[str], *, size: int
) -> list[dict[str, Any]]:
    """A row for theirs and, unless it was not asked for, one for ours and one for theirs at the KL of ours."""
    bench, cap = trainer.bench, answer_cap(trainer.bench, who)
    base, second = trainer.unsteered(unseen, cap), trainer.second.get(who.name)
    adapter = trainer.adapter(who, settings, size)
    trained = {"trained_on": adapter.cost["device"]}
    trained |= {name: adapter.cost[name] for name in ("seconds", "stored_bytes")}
    arms = [(trainer.name, trainer.adapted(who, adapter, unseen, cap, 1.0), trained | {"strength": 1.0})]
    if not bench.args.lora_only:
        seconds, profile = timed(lambda: learn_profile(bench, trainer.pairs(who, size)))
        vectors = steering_rows(bench, profile.encoder, unseen)
        kl = measured_kl(ReferenceScorer(bench.reference), trainer.probe, SteeringVectors(vectors.mean(0)))
        stored = sum(array.nbytes for array in profile.encoder.to_tensors().values())
        cost = {"seconds": seconds, "stored_bytes": stored, "trained_on": "cpu", "kl": kl}
        arms.append((OURS, trainer.personal(unseen, cap, vectors), cost))
        if kl > 0.0 and not isinstance(settings, PTuning):
            strength, found = trainer.strength_at(adapter, kl)
            made = trainer.adapted(who, adapter, unseen, cap, strength)
            arms.append((at_our_kl(trainer.name), made, trained | {"strength": strength, "kl": found}))
    rows = []
    for name, made, more in arms:
        row = judged(bench, who, list(unseen), made, base, second)
        row |= {"user": who.name, "pairs": size, "arm": name, **more}
        won = wins(who.judge, [answer.text for answer in made], [answer.text for answer in base])
        rows.append(row | {"won": won.tolist()})
        console.print(f"{who.name} {size}, {name}: win {row['win_rate']:.2f}, nll x {row['nll_ratio']:.2f}")
    return rows


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
    p = parser("What trains through the base, tuned on validation people, against edge-align on the same pairs.")
    p.add_argument("--method", choices=tuple(METHODS), default="lora")
    users_option(p)
    p.add_argument("--sizes", default="20,100,200", help="pairs learnt from")
    p.add_argument("--prompts", type=int, default=100, help="unseen test prompts")
    p.add_argument("--tune-prompts", type=int, default=64, help="validation prompts")
    p.add_argument("--max-tokens", type=int, default=64)
    p.add_argument("--rates", default="1e-4,3e-4,1e-3", help="learning rates to choose from")
    p.add_argument(
        "--tuners", default="casual,formal,hedged,assertive", metavar="A,B", help="validation people that choose one"
    )
    p.add_argument("--answer-tokens", type=int, default=0, help="that people see, and all learn from; 0: whole answers")
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the base; adapters are float32")
    p.add_argument("--lora-only", action="store_true", help="leave ours out")
    main(run, p.parse_args(), __file__)
