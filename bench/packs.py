"""Latent packs beside each other: the same people, pairs, prompts and seeds, win rate over NLL.

    python bench/answers.py --set train && python bench/packs.py --packs clap=DIR,score=DIR,linear=DIR --save

A profile is learnt with every pack as `personalize` learns it. The first answers at strength 1, the others at several;
the first is set against the best that each other one does at no higher an NLL: on its curve of mean win rate over
mean NLL, from the base (one half at 1 x) through its strengths, straight between them. There a person whose answers
are likelier than the base's counts as 1 x, so that one's gain does not pay for another's loss. The interval is of both,
over prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    answer_nlls,
    Bench,
    chosen_users,
    console,
    learn_profile,
    main,
    named_folders,
    parser,
    sample_reference,
    steering_rows,
    train_answers,
    users_option,
    users_pairs,
)
from quality import answer_cap, judged, other_judges
from rich.table import Table

from edge_align.pack import LatentPack, load_pack
from edge_align.simulation.judges import Judge
from edge_align.simulation.prompts import prompts
from edge_align.simulation.users import User, wins

DRAWS = 2000
BY_PROMPT = ("won", "said", "said_base")  # what the summary needs of a row, too long for a result


def run(bench: Bench) -> dict[str, Any]:
    args = bench.args
    if args.quick:
        args.prompts, args.max_tokens, args.users, args.sizes = 4, 24, "short,simple_words", "8"
    packs = opened(bench, args.packs)
    strengths = {name: [float(one) for one in args.strengths.split(",")] for name in packs}
    strengths[next(iter(packs))] = [1.0]
    questions, answers = train_answers(bench)
    unseen = list(prompts(args.set)[: args.prompts])
    second, rows = other_judges(), []
    for size in [int(n) for n in args.sizes.split(",")]:
        for who in chosen_users(args.users):
            pairs = users_pairs(who, questions, answers, n=size, seed=args.seed)
            for name, pack in packs.items():
                bench.pack = pack
                profile = learn_profile(bench, pairs)
                for strength in strengths[name]:
                    vectors = steering_rows(bench, profile.encoder, unseen) * strength
                    found = answered(bench, who, unseen, vectors, second.get(who.name))
                    known = {"user": who.name, "pairs": size, "pack": name, "strength": strength}
                    rows.append(known | {"passes": profile.learnt.heldout.passes} | found)
                    said = f"win {found['win_rate']:.2f}, nll x {found['nll_ratio']:.2f}"
                    console.print(f"{who.name} {size}, {name} x {strength:g}: {said}")
    sizes = sorted({row["pairs"] for row in rows})
    found = {f"pairs_{size}": summary([row for row in rows if row["pairs"] == size], list(packs)) for size in sizes}
    show(found)
    bench.__dict__.pop("pack", None)  # the result is of several
    about = {name: described(pack) for name, pack in packs.items()}
    told = [{key: value for key, value in row.items() if key not in BY_PROMPT} for row in rows]
    return {"packs": about, "prompts": len(unseen), "users": told, "summary": found}


def opened(bench: Bench, folders: dict[str, Path]) -> dict[str, LatentPack]:
    """By name; the shipped pack alone without any."""
    if not folders:
        return {"shipped": bench.pack}
    return {name: load_pack(folder, base_hash=bench.base.hash) for name, folder in folders.items()}


def described(pack: LatentPack) -> dict[str, Any]:
    named = ("recipe", "answers", "command", "seconds", "health")
    return {"hash": pack.hash} | {key: pack.manifest.get(key) for key in named}


def answered(bench: Bench, who: User, unseen: list[str], vectors: np.ndarray, second: Judge | None) -> dict[str, Any]:
    """Answers under vectors (n, n_layer, d_model) against the base's; by prompt, who won and [nats, tokens] of each."""
    cap = answer_cap(bench, who)
    base = sample_reference(bench, unseen, None, max_tokens=cap, label="base answers")
    ours = sample_reference(bench, unseen, vectors, max_tokens=cap, label=who.name)
    won = wins(who.judge, [answer.text for answer in ours], [answer.text for answer in base])
    found = judged(bench, who, unseen, ours, base, second)
    nlls = {"said": answer_nlls(bench, unseen, ours), "said_base": answer_nlls(bench, unseen, base)}
    return found | {"won": won.tolist()} | nlls


# -- at equal NLL --------------------------------------------------------------------------------------------------
class Curve:
    """Mean win rate and cost in NLL of one pack's people at every strength, for any choice of prompts."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        """Of every user and strength one row."""
        self.strengths = sorted({row["strength"] for row in rows})
        by = [[row for row in rows if row["strength"] == strength] for strength in self.strengths]
        self.won = np.array([[row["won"] for row in own] for own in by])  # (strengths, users, prompts)
        self._said = np.array([[row["said"] for row in own] for own in by])  # (..., prompts, 2)
        self._base = np.array([row["said_base"] for row in by[0]])  # (users, prompts, 2)

    def at(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(win rates, costs) from strength 0 on, of these prompts: means over users, 1 for a ratio below it."""
        said, base = self._said[:, :, chosen].sum(2), self._base[:, chosen].sum(1)
        ratio = (said[..., 0] / said[..., 1]) / (base[:, 0] / base[:, 1])
        cost = np.maximum(ratio, 1.0).mean(1)
        return np.array([0.5, *self.won[:, :, chosen].mean((1, 2))]), np.array([1.0, *cost])


def best_within(win: np.ndarray, cost: np.ndarray, limit: float) -> float:
    """Highest win rate at a cost of at most `limit` along the straight lines between the points; the first costs 1, the
    least there is.
    """
    best = win[0]
    for i in range(1, len(win)):
        if cost[i] <= limit:
            best = max(best, win[i])
        if (cost[i] - limit) * (cost[i - 1] - limit) < 0:
            best = max(best, np.interp(limit, *_rising(cost[i - 1 : i + 1], win[i - 1 : i + 1])))
    return float(best)


def _rising(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(x)
    return x[order], y[order]


def summary(rows: Sequence[dict[str, Any]], packs: Sequence[str]) -> dict[str, Any]:
    """Means of every pack at strength 1, and what the first does at its NLL more than each other at no higher a one."""
    found: dict[str, Any] = {}
    curves = {name: Curve([row for row in rows if row["pack"] == name]) for name in packs}
    n = curves[packs[0]].won.shape[2]
    draws = np.random.default_rng(0).integers(n, size=(DRAWS, n))
    for name, curve in curves.items():
        own = [row for row in rows if row["pack"] == name and row["strength"] == 1.0]
        win, cost = curve.at(np.arange(n))
        found[name] = {
            "strengths": [0.0, *curve.strengths],
            "win_rates": win.tolist(),
            "costs": cost.tolist(),
            "nll_ratio": float(np.mean([row["nll_ratio"] for row in own])),
            "distinct2_ratio": float(np.mean([row["distinct2_ratio"] for row in own])),
            "passes": sum(bool(row["passes"]) for row in own),
        }
        if name != packs[0]:
            gains = [_gain(curves[packs[0]], curve, chosen) for chosen in (np.arange(n), *draws)]
            low, high = np.quantile(gains[1:], [0.025, 0.975])
            found[name] |= {"ours_less_it": gains[0], "ci": [float(low), float(high)]}
    return found


def _gain(ours: Curve, other: Curve, chosen: np.ndarray) -> float:
    win, cost = ours.at(chosen)
    full = 1 + ours.strengths.index(1.0)
    return float(win[full]) - best_within(*other.at(chosen), float(cost[full]))


def show(found: dict[str, Any]) -> None:
    table = Table("pairs", "pack", "win", "nll x", "dist-2", "first less it, at its NLL")
    for size, packs in found.items():
        for name, row in packs.items():
            won = row["win_rates"][row["strengths"].index(1.0)]
            gain = "" if "ci" not in row else f"{row['ours_less_it']:+.3f} ({row['ci'][0]:+.3f} to {row['ci'][1]:+.3f})"
            values = (won, row["nll_ratio"], row["distinct2_ratio"])
            table.add_row(size.removeprefix("pairs_"), name, *(f"{value:.3f}" for value in values), gain)
    console.print(table)


if __name__ == "__main__":
    p = parser("Latent packs on the same people, pairs, prompts and seeds: win rate over NLL.")
    users_option(p)
    said = "the first is what the others are set against"
    p.add_argument("--packs", type=named_folders, default="", metavar="NAME=DIR,...", help=said)
    p.add_argument("--strengths", default="0.25,0.5,1,1.5", help="of every pack but the first; 1 among them")
    p.add_argument("--sizes", default="100,20", help="pairs learnt from")
    p.add_argument("--set", choices=("test", "validation"), default="test", help="which unseen prompts")
    p.add_argument("--prompts", type=int, default=100, help="how many of them")
    p.add_argument("--max-tokens", type=int, default=64)
    main(run, p.parse_args(), __file__)
