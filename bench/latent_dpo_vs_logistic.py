"""Does Latent DPO predict verdicts on prompts it never saw at least as well as logistic regression?

    python bench/latent_dpo_vs_logistic.py --save

Both see the same latents and the same pairs. The regression's L2 is chosen per number of pairs on the validation
users, which favours it; Latent DPO runs with its defaults. Held-out pairs come from a third of the prompts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from common import (
    Bench,
    console,
    count_pairs,
    encode_answers,
    Encoded,
    main,
    parser,
    progress,
    train_answers,
    users_pairs,
)
from rich.table import Table

from edge_align.latent_dpo import draw_contrasts, fit, LatentDPOConfig, LatentFeedback
from edge_align.simulation.users import MORE_USERS, User, USERS
from edge_align.speed import interval

L2 = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)


def run(bench: Bench) -> dict[str, Any]:
    args = bench.args
    users, others = list(USERS), list(MORE_USERS)
    if args.quick:
        args.draws, args.sizes, users, others = 1, "10", users[:2], others[:2]
    questions, answers = train_answers(bench)
    encoded = encode_answers(bench, questions, answers)
    rows = []
    for size in [int(n) for n in args.sizes.split(",")]:
        cases = [case for who in others for case in splits(bench, encoded, questions, answers, who, size)]
        mean = {l2: np.mean([accuracy(logistic(train, l2), test) for train, test in cases]) for l2 in L2}
        best = max(L2, key=lambda l2: mean[l2])
        ours, theirs = [], []
        with progress(f"{size} pairs", len(users)) as tell:
            for i, who in enumerate(users):
                for train, test in splits(bench, encoded, questions, answers, who, size):
                    ours.append(accuracy(latent_dpo(bench, train), test))
                    theirs.append(accuracy(logistic(train, best), test))
                tell(i + 1)
        gain = np.array(ours) - np.array(theirs)
        low, high = interval(gain, statistic=np.mean)
        row = {"pairs": size, "latent_dpo": np.mean(ours), "logistic": np.mean(theirs), "l2": best}
        rows.append(row | {"gain": gain.mean(), "gain_ci": [low, high], "cases": len(gain)})
    table = Table("pairs", "Latent DPO", "logistic", "gain", "95 %", title="held-out preference accuracy")
    for row in rows:
        span = "{:+.4f} to {:+.4f}".format(*row["gain_ci"])
        table.add_row(str(row["pairs"]), *(f"{row[key]:.4f}" for key in ("latent_dpo", "logistic", "gain")), span)
    console.print(table)
    return {"rows": rows}


Split = tuple[LatentFeedback, LatentFeedback]


def splits(
    bench: Bench, encoded: Encoded, questions: list[str], answers: list[list[str]], who: User, size: int
) -> list[Split]:
    """(training, held-out) feedback of draws that this user can fill."""
    found = []
    for draw in range(bench.args.draws):
        order = np.random.default_rng([bench.args.seed, draw]).permutation(len(questions))
        held, rest = order[: len(order) // 3], order[len(order) // 3 :]
        parts = []
        for indices, n in ((rest, size), (held, len(held))):
            asked, texts = [questions[i] for i in indices], [answers[i] for i in indices]
            n = min(n, count_pairs(who, texts))
            parts.append(encoded.feedback(users_pairs(who, asked, texts, n=n, seed=draw)))
        if len(parts[0].chosen) == size:
            found.append((parts[0], parts[1]))
    return found


def latent_dpo(bench: Bench, train: LatentFeedback) -> np.ndarray:
    config = LatentDPOConfig()
    contrasts = draw_contrasts(train, bench.pack.variance, config=config, seed=bench.args.seed)
    return fit(contrasts, train, config=config)


def logistic(train: LatentFeedback, l2: float) -> np.ndarray:
    """Weights (k,) of p(chosen) = sigmoid(w . (chosen - rejected)) with the penalty l2 |w|^2 / 2, by Newton steps."""
    x = (train.chosen - train.rejected).astype(np.float64)
    w = np.zeros(x.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -50, 50)))
        gradient = x.T @ (p - 1) + l2 * w
        step = np.linalg.solve((x.T * (p * (1 - p))) @ x + l2 * np.eye(len(w)), gradient)
        w -= step
        if np.abs(step).max() < 1e-9:
            break
    return w


def accuracy(weights: np.ndarray, test: LatentFeedback) -> float:
    """Share of held-out pairs that the direction puts in the right order; a tie counts half."""
    margin = (test.chosen - test.rejected) @ weights
    return float(((np.sign(margin) + 1) / 2).mean())


if __name__ == "__main__":
    p = parser("Held-out preference accuracy of Latent DPO against L2 logistic regression on the same latents.")
    p.add_argument("--sizes", default="10,20,50,100")
    p.add_argument("--draws", type=int, default=20, help="splits per user")
    main(run, p.parse_args(), __file__)
