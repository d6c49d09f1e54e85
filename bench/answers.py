"""Sample the base's answers to the training prompts, and to the test prompts; kept, and resumed chunk by chunk.

python bench/answers.py                         # 384 training prompts x 4, 100 test prompts x 1
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from common import Bench, main, parser, PER_PROMPT, progress, sample, SEED, train_store, TRAIN_TOKENS

from edge_align.config import SamplingConfig
from edge_align.records import user_prompt
from edge_align.simulation.prompts import prompts
from edge_align_export.passes import BATCH


def run(bench: Bench) -> dict[str, Any]:
    args: argparse.Namespace = bench.args
    found: dict[str, Any] = {}
    if args.set in ("train", "both"):
        sample_train(bench, prompts("train")[: 2 if args.quick else args.train_prompts])
        rows = train_store(bench).rows
        lengths = [len(answer["tokens"]) for row in rows for answer in row["answers"]]
        found["train"] = {"prompts": len(rows), "answers": len(lengths), "mean_tokens": np.mean(lengths)}
    if args.set in ("test", "both"):
        questions = prompts("test")[: 2 if args.quick else args.test_prompts]
        made = sample(bench, questions, max_tokens=args.max_tokens, seed=args.seed + SEED, label="test answers")
        found["test"] = {"answers": len(made), "mean_tokens": np.mean([len(answer.tokens) for answer in made])}
    return found


def sample_train(bench: Bench, questions: tuple[str, ...]) -> None:
    """`PER_PROMPT` answers to every question that has none yet."""
    store = train_store(bench)
    known = {row["prompt"] for row in store.rows}
    missing = [(i, question) for i, question in enumerate(questions) if question not in known]
    size = BATCH // PER_PROMPT
    with progress("training answers", len(missing)) as tell:
        for start in range(0, len(missing), size):
            tell(start)
            part = missing[start : start + size]
            made = bench.passes.sample(
                [bench.backend.render(user_prompt(question)) for _, question in part for _ in range(PER_PROMPT)],
                sampling=SamplingConfig(max_tokens=TRAIN_TOKENS, seed=SEED + 1000 * part[0][0]),
            )
            for j, (_, question) in enumerate(part):
                answers = made[j * PER_PROMPT : (j + 1) * PER_PROMPT]
                kept = [{"text": bench.backend.detokenize(tokens), "tokens": tokens} for tokens in answers]
                store.add({"prompt": question, "answers": kept})


if __name__ == "__main__":
    p = parser("Sample the base's answers that the other scripts use.")
    p.add_argument("--set", choices=("train", "test", "both"), default="both")
    p.add_argument("--train-prompts", type=int, default=384)
    p.add_argument("--test-prompts", type=int, default=100)
    p.add_argument("--max-tokens", type=int, default=96, help="cap of a test answer")
    main(run, p.parse_args(), __file__)
