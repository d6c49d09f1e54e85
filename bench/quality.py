"""Do judges prefer the personal answers? Eight users, 100 and 20 pairs, unseen prompts; fluency and KL beside it.

    python bench/answers.py && python bench/quality.py --save

Every figure is on test prompts that nothing was learnt or chosen on, unless --set validation asks for those that
choices are made by (docs/decisions/0012). A user with a cap of his own (short) gets it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from common import (
    Answer,
    Bench,
    chosen_users,
    console,
    learn_profile,
    main,
    nll_under_base,
    parser,
    Profile,
    sample,
    SEED,
    steering,
    train_answers,
    users_option,
    users_pairs,
)
from rich.table import Table

from edge_align.config import PersonalizeConfig
from edge_align.errors import BackendUnavailable
from edge_align.kl import measured_kl, open_probe, Probe
from edge_align.records import user_prompt
from edge_align.simulation.judges import distinct2_ratio, Judge, second_judges
from edge_align.simulation.prompts import prompts
from edge_align.simulation.users import bootstrap_interval, User, wins

STRENGTHS = (0.5, 1.0, 1.5)


def run(bench: Bench) -> dict[str, Any]:
    args = bench.args
    if args.quick:
        args.prompts, args.max_tokens, args.kl_prompts, args.kl_tokens = 2, 12, 1, 6
    questions, answers = train_answers(bench)
    unseen = list(prompts(args.set)[args.skip :][: args.prompts])
    second = other_judges()
    measure = kl_meter(bench, unseen)
    rows = []
    for size in [int(n) for n in args.sizes.split(",")]:
        for who in chosen_users(args.users):
            pairs = users_pairs(who, questions, answers, n=size, seed=args.seed, flip=args.flip)
            profile = learn_profile(bench, pairs, kl_budget=args.kl_budget)
            row = judge_profile(bench, who, profile, unseen, second.get(who.name))
            row |= {"pairs": size, "kl": measure(profile)}
            rows.append(row)
            console.print(f"{who.name} {size}: win {row['win_rate']:.2f}, nll x {row['nll_ratio']:.2f}")
    show(rows)
    return {"prompts": len(unseen), "users": rows, "summary": summary(rows)}


def other_judges() -> dict[str, Judge]:
    """Second judges by user; none where their packages are not installed."""
    try:
        return second_judges()
    except BackendUnavailable:
        return {}


def answer_cap(bench: Bench, who: User) -> int:
    """Tokens an answer may have: a user of length has a cap of his own."""
    args = bench.args
    return int(args.max_tokens if args.quick else max(args.max_tokens, who.max_tokens or 0))


def judge_profile(bench: Bench, who: User, profile: Profile, unseen: list[str], second: Judge | None) -> dict[str, Any]:
    """Personal answers against the base's, same cap, same seeds."""
    args = bench.args
    cap = answer_cap(bench, who)
    seed = args.seed + SEED
    base = sample(bench, unseen, max_tokens=cap, seed=seed, label="base answers")
    ours = sample(bench, unseen, max_tokens=cap, seed=seed, encoder=profile.encoder, label=who.name)
    heldout = profile.learnt.heldout
    return {
        "user": who.name,
        "max_tokens": cap,
        **judged(bench, who, unseen, ours, base, second),
        "checked_nll_ratio": profile.nll_ratio,
        "checked_collision_ratio": profile.collision_ratio,
        "cv_accuracy": heldout.accuracy,
        "p": heldout.p,
        "passes": heldout.passes,
        "reliability": profile.learnt.reliability,
        "outside_support": profile.learnt.outside_support,
        "depends_on_prompt": profile.encoder.depends_on_prompt,
        "scale": profile.encoder.scale,
    }


def judged(
    bench: Bench, who: User, unseen: list[str], ours: list[Answer], base: list[Answer], second: Judge | None
) -> dict[str, Any]:
    """What is said of any answers beside the base's: who wins, how likely they are under the base, how they vary.

    score_median: of the judge's scores (their mean is what an empty answer makes of it, far below all others);
    score_spread_base: half of what lies between the 16th and the 84th percentile of the base's, like a deviation.
    """
    texts, base_texts = [answer.text for answer in ours], [answer.text for answer in base]
    won, scores = wins(who.judge, texts, base_texts), [who.judge(text) for text in texts]
    base_scores = [who.judge(text) for text in base_texts]
    low, high = bootstrap_interval(won, rng=np.random.default_rng(0))
    nll, nll_base = nll_under_base(bench, unseen, ours), nll_under_base(bench, unseen, base)
    return {
        "win_rate": won.mean(),
        "win_ci": [low, high],
        "score_median": np.median(scores),
        "score_median_base": np.median(base_scores),
        "score_spread_base": np.subtract(*np.quantile(base_scores, (0.84, 0.16))) / 2,
        "second_win_rate": None if second is None else wins(second, texts, base_texts).mean(),
        "nll": nll,
        "nll_ratio": nll / nll_base,
        "distinct2_ratio": distinct2_ratio(texts, base_texts),
        "mean_tokens": mean_length(ours),
        "mean_tokens_base": mean_length(base),
    }


def mean_length(answers: list[Answer]) -> float:
    return float(np.mean([len(answer.tokens) for answer in answers]))


def kl_meter(bench: Bench, unseen: list[str]) -> Callable[[Profile], list[dict[str, float]]]:
    """Predicted and measured KL of a profile at each strength, decode-only, on the base's answers to test prompts."""
    args = bench.args
    base = sample(bench, unseen, max_tokens=args.max_tokens, seed=args.seed + SEED, label="base answers")
    used = [i for i, answer in enumerate(base) if len(answer.tokens) >= 2][: args.kl_prompts]
    asked = [unseen[i] for i in used]
    probe = open_probe(
        bench.backend,
        [bench.backend.render(user_prompt(question)) for question in asked],
        [base[i].tokens[: args.kl_tokens] for i in used],
    )

    def measure(profile: Profile) -> list[dict[str, float]]:
        found = []
        for strength in STRENGTHS:
            vectors = steering(bench, profile.encoder, asked, strength)
            if profile.encoder.depends_on_prompt:
                parts = [
                    Probe([p], [c], [b]) for p, c, b in zip(probe.prompts, probe.completions, probe.base, strict=True)
                ]
                kls = [measured_kl(bench.backend, part, v) for part, v in zip(parts, vectors, strict=True)]
                measured = float(np.average(kls, weights=[len(b) for b in probe.base]))
            else:
                measured = measured_kl(bench.backend, probe, vectors[0])
            latents = profile.learnt.latents * profile.encoder.scale * strength
            predicted = bench.pack.mean_kl(latents)
            factor = predicted / measured if measured > 0 else None
            found.append({"strength": strength, "predicted": predicted, "measured": measured, "factor": factor})
        return found

    return measure


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the targets speak of, per size; the KL factor over all users, sizes and strengths."""
    found: dict[str, Any] = {}
    for size in sorted({row["pairs"] for row in rows}, reverse=True):
        own = [row for row in rows if row["pairs"] == size]
        found[f"pairs_{size}"] = {
            "win_rate_mean": np.mean([row["win_rate"] for row in own]),
            "win_rate_min": min(row["win_rate"] for row in own),
            "nll_ratio_mean": np.mean([row["nll_ratio"] for row in own]),
            "nll_ratio_max": max(row["nll_ratio"] for row in own),
            "distinct2_ratio_mean": np.mean([row["distinct2_ratio"] for row in own]),
            "distinct2_ratio_min": min(row["distinct2_ratio"] for row in own),
            "passed": sum(row["passes"] for row in own),
        }
    logs = np.array([abs(np.log(kl["factor"])) for row in rows for kl in row["kl"] if kl["factor"]])
    if len(logs):
        found["kl_factor_median"], found["kl_factor_worst"] = np.exp(np.median(logs)), np.exp(logs.max())
        found["kl_within_1.5"] = (logs <= np.log(1.5)).mean()
    return found


def show(rows: list[dict[str, Any]]) -> None:
    heads = ("user", "pairs", "win", "95 %", "2nd", "nll x", "dist-2", "tokens", "cv", "p", "rel", "scale", "KL p/m")
    table = Table(*heads, title="personal answers against the base's")
    for row in rows:
        at_one = next(kl for kl in row["kl"] if kl["strength"] == 1.0)
        table.add_row(
            row["user"],
            str(row["pairs"]),
            f"{row['win_rate']:.3f}",
            "{:.2f}-{:.2f}".format(*row["win_ci"]),
            "" if row["second_win_rate"] is None else f"{row['second_win_rate']:.2f}",
            f"{row['nll_ratio']:.2f}",
            f"{row['distinct2_ratio']:.2f}",
            f"{row['mean_tokens']:.0f}/{row['mean_tokens_base']:.0f}",
            f"{row['cv_accuracy']:.2f}",
            f"{row['p']:.3f}",
            f"{row['reliability']:.2f}",
            f"{row['scale']:.2f}",
            f"{at_one['predicted']:.2f}/{at_one['measured']:.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    p = parser("Win rate of personal answers, fluency, and predicted against measured KL.")
    users_option(p)
    p.add_argument("--sizes", default="100,20", help="pairs learnt from")
    p.add_argument("--flip", type=float, default=0.0, help="share of the verdicts that are the wrong way round")
    p.add_argument("--set", choices=("test", "validation"), default="test", help="which unseen prompts")
    p.add_argument("--prompts", type=int, default=100, help="how many of them")
    p.add_argument("--skip", type=int, default=0, help="leave out so many prompts, which earlier runs have seen")
    p.add_argument("--max-tokens", type=int, default=96)
    p.add_argument("--kl-budget", type=float, default=PersonalizeConfig().kl_budget)
    p.add_argument("--kl-prompts", type=int, default=16, help="base answers on which KL is measured")
    p.add_argument("--kl-tokens", type=int, default=48, help="tokens of each")
    main(run, p.parse_args(), __file__)
