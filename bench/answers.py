"""Sample the base's answers to the training prompts, and to the test prompts; kept, and resumed chunk by chunk.

python bench/answers.py                         # 384 training prompts x 4, 100 test prompts x 1
python bench/answers.py --set train --import answers.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from common import Bench, CHUNK, main, parser, PER_PROMPT, progress, sample, SEED, train_store, TRAIN_TOKENS

from edge_align.config import SamplingConfig
from edge_align.records import user_prompt
from edge_align.simulation.prompts import prompts


def run(bench: Bench) -> dict[str, Any]:
    args: argparse.Namespace = bench.args
    found: dict[str, Any] = {}
    if args.set in ("train", "both"):
        found["imported"] = bring(bench, args.import_) if args.import_ else 0
        sample_train(bench, prompts("train")[: 2 if args.quick else args.train_prompts])
        rows = train_store(bench).rows
        lengths = [len(answer["tokens"]) for row in rows for answer in row["answers"]]
        found["train"] = {"prompts": len(rows), "answers": len(lengths), "mean_tokens": np.mean(lengths)}
    if args.set in ("test", "both"):
        questions = prompts("test")[: 2 if args.quick else args.test_prompts]
        made = sample(bench, questions, max_tokens=args.max_tokens, seed=args.seed + SEED, label="test answers")
        found["test"] = {"answers": len(made), "mean_tokens": np.mean([len(answer.tokens) for answer in made])}
    return found


def bring(bench: Bench, path: str) -> int:
    """Take over answers from a file of rows {"prompt", "answers": [{"tok", "text"}]}; returns how many rows are new."""
    store, new = train_store(bench), 0
    known, ours = {row["prompt"] for row in store.rows}, set(prompts("train"))
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        if row["prompt"] in known or row["prompt"] not in ours:
            continue
        answers = [
            {"text": answer["text"], "tokens": [token for token in answer["tok"] if token != bench.eos]}
            for answer in row["answers"][:PER_PROMPT]
        ]
        store.add({"prompt": row["prompt"], "answers": answers, "imported": True})
        new += 1
    return new


def sample_train(bench: Bench, questions: tuple[str, ...]) -> None:
    """`PER_PROMPT` answers to every question that has none yet."""
    store = train_store(bench)
    known = {row["prompt"] for row in store.rows}
    missing = [(i, question) for i, question in enumerate(questions) if question not in known]
    size = CHUNK // PER_PROMPT
    with progress("training answers", len(missing)) as tell:
        for start in range(0, len(missing), size):
            tell(start)
            part = missing[start : start + size]
            made = bench.backend.generate_batch(
                [bench.backend.render(user_prompt(question)) for _, question in part for _ in range(PER_PROMPT)],
                vectors=None,
                sampling=SamplingConfig(max_tokens=TRAIN_TOKENS, seed=SEED + 1000 * part[0][0]),
            )
            for j, (_, question) in enumerate(part):
                answers = made[j * PER_PROMPT : (j + 1) * PER_PROMPT]
                kept = [{"text": answer.text, "tokens": list(answer.tokens)} for answer in answers]
                store.add({"prompt": question, "answers": kept})


if __name__ == "__main__":
    p = parser("Sample the base's answers that the other scripts use.")
    p.add_argument("--set", choices=("train", "test", "both"), default="both")
    p.add_argument("--train-prompts", type=int, default=384)
    p.add_argument("--test-prompts", type=int, default=100)
    p.add_argument("--max-tokens", type=int, default=96, help="cap of a test answer")
    p.add_argument("--import", dest="import_", metavar="FILE", help="JSONL of training answers sampled elsewhere")
    main(run, p.parse_args(), __file__)
