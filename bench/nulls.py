"""What chance does: random directions at a profile's own KL, and verdicts that mean nothing at the gate.

python bench/nulls.py --part directions --save     # an hour or more; --share: an eighth of it
python bench/nulls.py --part gate --save
"""

from __future__ import annotations

from typing import Any

import numpy as np
from common import (
    Bench,
    chosen_users,
    console,
    digest,
    encode_answers,
    learn_profile,
    main,
    parser,
    Profile,
    progress,
    reference_model,
    sample,
    sample_rows,
    SEED,
    source_digest,
    steering_rows,
    train_answers,
    users_option,
    users_pairs,
)
from rich.table import Table

from edge_align.encoder import PreferenceEncoder
from edge_align.gate import cross_validate, GATE_P, wilson
from edge_align.latent_dpo import draw_contrasts, LatentDPOConfig
from edge_align.records import PreferencePair
from edge_align.simulation.prompts import prompts
from edge_align.simulation.users import User, win_rate


def run(bench: Bench) -> dict[str, Any]:
    args = bench.args
    if args.quick:
        args.directions, args.prompts, args.max_tokens, args.draws, args.true_draws = 2, 2, 8, 1, 1
    found: dict[str, Any] = {}
    if args.part in ("directions", "both"):
        found["directions"] = random_directions(bench)
    if args.part in ("gate", "both"):
        found["gate"] = gate(bench)
    return found


# -- random directions ---------------------------------------------------------------------------------------------
def random_directions(bench: Bench) -> dict[str, Any]:
    """Per user: win rates of random latents of the profile's predicted KL, and the profile's own, on equal prompts."""
    args = bench.args
    questions, answers = train_answers(bench)
    unseen = list(prompts("test")[: args.prompts])
    model = reference_model(bench) if args.engine == "torch" else None
    users, size = chosen_users(args.users), 20 if args.quick else 100
    profiles = [learn_profile(bench, users_pairs(who, questions, answers, n=size, seed=args.seed)) for who in users]
    kls = [profile.predicted_kl or 0.1 for profile in profiles]  # one that got no scale is compared all the same
    rows = []
    for i, (who, profile) in enumerate(zip(users, profiles, strict=True)):
        kl = max(kls) if args.share else kls[i]
        rng = np.random.default_rng([args.seed, 17] if args.share else [args.seed, 17, *who.name.encode()])
        latents = rng.standard_normal((args.directions, bench.pack.k)).astype(np.float32)
        latents *= np.array([[bench.pack.scale_for(z[None], kl)] for z in latents], np.float32)
        own, null = compare(bench, model, who, profile, latents, unseen)
        limit = float(np.quantile(null, 0.95))
        row = {
            "user": who.name,
            "null_kl": kl,
            "profile_kl": profile.predicted_kl,
            "profile": own,
            "null_mean": null.mean(),
            "null_p95": limit,
        }
        rows.append(row | {"beats_p95": own > limit, "null": null})
        console.print(f"{who.name}: profile {own:.2f}, random {null.mean():.2f}, their 95th percentile {limit:.2f}")
    pooled = np.mean([row["null_mean"] for row in rows])
    return {"engine": args.engine, "users": rows, "pooled_mean": pooled, "all_beat": all(r["beats_p95"] for r in rows)}


def compare(
    bench: Bench, model: Any, who: User, profile: Profile, latents: np.ndarray, unseen: list[str]
) -> tuple[float, np.ndarray]:
    """(the profile's win rate, a win rate per random latent), all from one engine, against the same base answers."""
    args = bench.args
    cap = args.max_tokens if args.quick else max(args.max_tokens, who.max_tokens or 0)
    seed, n = args.seed + SEED, len(unseen)
    if model is None:

        def texts(encoder: PreferenceEncoder | None, label: str) -> list[str]:
            made = sample(bench, unseen, max_tokens=cap, seed=seed, encoder=encoder, label=label)
            return [answer.text for answer in made]

        base = texts(None, "base")
        own = texts(profile.encoder, who.name)
        random = [texts(constant(z), f"{who.name}: direction {i}") for i, z in enumerate(latents)]
    else:

        def rows(vectors: np.ndarray | None, label: str, times: int = 1) -> list[str]:
            named = digest(b"" if vectors is None else vectors)
            kept = bench.keep("rows", unseen, cap, seed, named, str(model.dtype))
            made = sample_rows(
                bench,
                model,
                unseen * times,
                vectors,
                max_tokens=cap,
                seed=seed,
                kept=kept,
                label=f"{who.name}: {label}",
            )
            return [answer.text for answer in made]

        base = rows(None, "base")
        own = rows(steering_rows(bench, profile.encoder, unseen), "profile")
        drawn = np.stack([bench.pack.decode(z).array for z in latents]).repeat(n, axis=0)
        every = rows(drawn, "directions", len(latents))
        random = [every[i : i + n] for i in range(0, len(every), n)]
    return win_rate(who.judge, own, base), np.array([win_rate(who.judge, part, base) for part in random])


def constant(z: np.ndarray) -> PreferenceEncoder:
    """A profile that is this latent."""
    return PreferenceEncoder(
        mean=z, head_in=np.zeros((0, 0), np.float32), head_out=np.zeros((len(z), 0), np.float32), scale=1.0
    )


# -- the gate ------------------------------------------------------------------------------------------------------
def gate(bench: Bench) -> dict[str, Any]:
    """How often the gate lets verdicts through: shuffled ones (it should not) and true ones (it should).

    Of the true ones a share `--flip` is given the wrong way round.
    """
    args = bench.args
    questions, answers = train_answers(bench)
    encoded = encode_answers(bench, questions, answers)
    config = LatentDPOConfig()
    code = source_digest("edge_align.gate", "edge_align.latent_dpo", "edge_align.simulation.users")

    def passes(pairs: list[PreferencePair], seed: int) -> tuple[float, bool]:
        feedback = encoded.feedback(pairs)
        contrasts = draw_contrasts(feedback, bench.pack.variance, config=config, seed=seed)
        heldout = cross_validate(feedback, contrasts, config=config, seed=seed)
        return heldout.p, bool(heldout.passes)

    rows = []
    for kind, draws in (("shuffled", args.draws), ("true", args.true_draws)):
        for size in [int(n) for n in args.sizes.split(",")]:
            for who in chosen_users(args.users):
                flip = args.flip if kind == "true" else 0.0
                named = [bench.pack.hash, code, kind, size, who.name, args.seed, len(questions), flip]
                kept = bench.keep("gate", *named)
                with progress(f"{kind}, {size} pairs, {who.name}", draws) as tell:
                    for draw in range(len(kept.rows), draws):
                        pairs = users_pairs(who, questions, answers, n=size, seed=1000 * args.seed + draw, flip=flip)
                        if kind == "shuffled":
                            pairs = shuffled(pairs, np.random.default_rng([args.seed, draw, size]))
                        kept.add(passes(pairs, draw))
                        tell(draw + 1)
                passed = sum(ok for _, ok in kept.rows[:draws])
                rows.append({"kind": kind, "pairs": size, "user": who.name, "draws": draws, "passed": passed})
    return {"level": GATE_P, "rows": rows, "shuffled": pooled(rows, "shuffled"), "true": show(rows)}


def shuffled(pairs: list[PreferencePair], rng: np.random.Generator) -> list[PreferencePair]:
    """Every verdict given by a coin."""
    flips = rng.random(len(pairs)) < 0.5
    return [
        PreferencePair(pair.prompt, pair.rejected, pair.chosen) if flip else pair
        for pair, flip in zip(pairs, flips, strict=True)
    ]


def pooled(rows: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Share that passes over users, with its binomial interval, per number of pairs and over all."""
    found = {}
    sizes = sorted({row["pairs"] for row in rows})
    for name, wanted in [*((f"pairs_{n}", [n]) for n in sizes), ("all", sizes)]:
        own = [row for row in rows if row["kind"] == kind and row["pairs"] in wanted]
        passed, draws = sum(row["passed"] for row in own), sum(row["draws"] for row in own)
        low, high = wilson(passed, draws)
        found[name] = {"passed": passed, "draws": draws, "share": passed / draws, "ci": [low, high]}
        found[name]["level_in_or_above_ci"] = low <= GATE_P
    return found


def show(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """A table of all; returns the shares of true users that pass."""
    table = Table("verdicts", "pairs", "user", "passed", "of", title=f"the gate at p <= {GATE_P}")
    true: dict[str, dict[str, float]] = {}
    for row in rows:
        table.add_row(row["kind"], *(str(row[key]) for key in ("pairs", "user", "passed", "draws")))
        if row["kind"] == "true":
            true.setdefault(f"pairs_{row['pairs']}", {})[row["user"]] = row["passed"] / row["draws"]
    console.print(table)
    return true


if __name__ == "__main__":
    p = parser("Random directions at equal KL, and the gate under shuffled and true verdicts.")
    p.add_argument("--part", choices=("directions", "gate", "both"), default="both")
    users_option(p)
    p.add_argument("--directions", type=int, default=30, help="random latents per user")
    p.add_argument("--prompts", type=int, default=20, help="unseen prompts per direction")
    p.add_argument("--max-tokens", type=int, default=96)
    p.add_argument(
        "--share",
        action="store_true",
        help="one set of directions, at the highest KL of any user's profile, judged by all: an eighth of the work",
    )
    p.add_argument(
        "--engine", choices=("torch", "llamacpp"), default="llamacpp", help="torch: many directions in one batch"
    )
    p.add_argument("--sizes", default="100,20", help="pairs per draw at the gate")
    p.add_argument("--draws", type=int, default=200, help="shuffled draws per user and size")
    p.add_argument("--flip", type=float, default=0.0, help="share of true verdicts given the wrong way round")
    p.add_argument("--true-draws", type=int, default=100, help="true draws per user and size")
    main(run, p.parse_args(), __file__)
