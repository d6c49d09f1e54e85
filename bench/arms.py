"""Ours beside what people would use instead, on the same base and the same pairs, at no cost of training.

    python bench/answers.py --set train && python bench/arms.py --save

Arms: the preference written in the system prompt; three pairs shown in it; the mean difference of the chosen and the
rejected answers' hidden states as a control vector, at the KL that ours measures; ours; ours with the written
preference. Every arm answers the same unseen questions with the same cap and seeds, and NLL is always that of the
answer after the bare question, under the base. What trains through the base is in lora.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import (
    Answer,
    Bench,
    chosen_users,
    console,
    learn_profile,
    main,
    parser,
    sample,
    SEED,
    steering,
    timed,
    train_answers,
    users_option,
    users_pairs,
)
from quality import answer_cap, judged, other_judges
from rich.table import Table

from edge_align.kl import factor_for_kl, measured_kl, Probe, sampled_probe
from edge_align.records import Message, PreferencePair, Prompt, SteeringVectors, user_prompt
from edge_align.simulation.prompts import prompts
from edge_align.simulation.users import User, wins

SHOWN = 3  # pairs in the prompt
SHOWN_CHARS = 400  # of each answer


@dataclass(frozen=True)
class Arm:
    """How a person's answers are made, and what had to be done first."""

    name: str
    ask: Callable[[str], Prompt]
    vectors: SteeringVectors | None
    seconds: float
    prompt_tokens: int  # more than the bare question has; fewer where the template has a system prompt of its own


def run(bench: Bench) -> dict[str, Any]:
    args = bench.args
    if args.quick:
        args.prompts, args.max_tokens, args.pairs = 2, 8, 8
    questions, answers = train_answers(bench)
    unseen = list(prompts(args.set)[: args.prompts])
    sizes = {"answers": 2, "tokens": 8} if args.quick else {}
    second, probe = other_judges(), sampled_probe(bench.backend, seed=SEED, **sizes)
    rows = []
    for who in chosen_users(args.users):
        cap = answer_cap(bench, who)
        base = sample(bench, unseen, max_tokens=cap, seed=args.seed + SEED, label="base answers")
        pairs = users_pairs(who, questions, answers, n=args.pairs, seed=args.seed)
        made: dict[str, list[Answer]] = {}
        for arm in arms(bench, who, pairs, unseen, probe):
            if args.vectors_only and arm.ask is not user_prompt:
                continue
            made[arm.name] = sample(
                bench,
                unseen,
                max_tokens=cap,
                seed=args.seed + SEED,
                vectors=[arm.vectors] * len(unseen),
                ask=arm.ask,
                label=f"{who.name}: {arm.name}",
            )
            row = judged(bench, who, unseen, made[arm.name], base, second.get(who.name))
            row |= {"user": who.name, "arm": arm.name, "seconds": arm.seconds, "prompt_tokens": arm.prompt_tokens}
            rows.append(row)
            console.print(f"{who.name}, {arm.name}: win {row['win_rate']:.2f}, nll x {row['nll_ratio']:.2f}")
        for row in rows[-len(made) :]:
            row["ours_over_it"] = against(who, made["edge-align"], made[row["arm"]])
    show(rows)
    return {"pairs": args.pairs, "prompts": len(unseen), "rows": rows}


def arms(bench: Bench, who: User, pairs: Sequence[PreferencePair], unseen: Sequence[str], probe: Probe) -> list[Arm]:
    """All arms of a person, ours among them. A prompt-dependent profile takes part as its mean."""
    bare = len(bench.backend.render(user_prompt(unseen[0])))

    def told(name: str, system: str) -> Arm:
        def ask(question: str) -> Prompt:
            return (Message("system", system), *user_prompt(question))

        return Arm(name, ask, None, 0.0, len(bench.backend.render(ask(unseen[0]))) - bare)

    profile_sec, profile = timed(lambda: learn_profile(bench, pairs))
    ours = steering(bench, profile.encoder, unseen[:1])[0]
    assert ours is not None
    kl = measured_kl(bench.backend, probe, ours)

    def at_our_kl(array: np.ndarray) -> SteeringVectors:
        if kl <= 0.0:
            return ours
        vectors = SteeringVectors(array)
        return vectors.scaled(factor_for_kl(bench.backend, probe, vectors, kl)[0])

    written = told("written preference", f"You are a helpful assistant. The user {who.description}.")
    difference_sec, difference = timed(lambda: mean_difference(bench, pairs))
    return [
        written,
        told("three pairs in the prompt", shown(pairs[:SHOWN])),
        Arm("mean-difference vector", user_prompt, at_our_kl(difference), difference_sec, 0),
        Arm("edge-align", user_prompt, ours, profile_sec, 0),
        Arm("edge-align + written preference", written.ask, ours, profile_sec, written.prompt_tokens),
    ]


def shown(pairs: Sequence[PreferencePair]) -> str:
    """Pairs as examples in a system prompt."""
    parts = ["You are a helpful assistant. Here is what the user likes and does not like."]
    for pair in pairs:
        parts.append(f"Question: {pair.prompt[-1].content}")
        parts += [f"Liked: {pair.chosen[:SHOWN_CHARS]}", f"Not liked: {pair.rejected[:SHOWN_CHARS]}"]
    return "\n\n".join(parts)


def other_blocks(bench: Bench) -> range:
    """Blocks that the other vectors are added to: those of --blocks that the base has."""
    first, last = map(int, bench.args.blocks.split(","))
    return range(first, min(last + 1, bench.base.n_layer))


def mean_difference(bench: Bench, pairs: Sequence[PreferencePair]) -> np.ndarray:
    """Chosen minus rejected hidden states, mean over answers' tokens and over pairs: (n_layer, d_model) float32.

    The direction is that of contrastive activation addition (arXiv 2312.06681, section 2).
    """
    blocks = list(other_blocks(bench))
    rows, spans = [], []
    for pair in pairs:
        prompt = bench.backend.render(pair.prompt)
        for text in (pair.chosen, pair.rejected):
            rows.append([*prompt, *(bench.backend.tokenize(text) or [0])])
            spans.append((len(prompt), len(rows[-1])))
    means = bench.passes.mean_hidden(rows, spans, blocks)
    array = np.zeros((bench.base.n_layer, bench.base.d_model), np.float32)
    array[blocks] = (means[0::2] - means[1::2]).mean(0)
    return array


def against(who: User, ours: Sequence[Answer], theirs: Sequence[Answer]) -> float:
    """Share of questions on which the judge prefers our answer to theirs; a tie counts half."""
    return float(wins(who.judge, [answer.text for answer in ours], [answer.text for answer in theirs]).mean())


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("user", "arm", "win", "95 %", "ours against it", "nll x", "dist-2", "tokens", "seconds", "prompt +")
    for row in rows:
        table.add_row(
            row["user"],
            row["arm"],
            f"{row['win_rate']:.3f}",
            "{:.2f}-{:.2f}".format(*row["win_ci"]),
            f"{row['ours_over_it']:.3f}",
            f"{row['nll_ratio']:.2f}",
            f"{row['distinct2_ratio']:.2f}",
            f"{row['mean_tokens']:.0f}/{row['mean_tokens_base']:.0f}",
            f"{row['seconds']:.1f}",
            str(row["prompt_tokens"]),
        )
    console.print(table)


if __name__ == "__main__":
    p = parser("Win rates of prompts, a mean-difference vector and edge-align on the same pairs.")
    users_option(p)
    p.add_argument("--pairs", type=int, default=100, help="pairs each arm may use")
    p.add_argument("--vectors-only", action="store_true", help="leave out the arms that write into the prompt")
    p.add_argument("--blocks", default="8,21", metavar="FIRST,LAST", help="that the other vectors are added to")
    p.add_argument("--set", default="test", choices=("test", "validation"), help="of the unseen prompts")
    p.add_argument("--prompts", type=int, default=100, help="unseen prompts")
    p.add_argument("--max-tokens", type=int, default=64)
    main(run, p.parse_args(), __file__)
