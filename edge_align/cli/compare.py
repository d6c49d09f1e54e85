"""`edge-align compare`: two answers to a question, the person picks one; the way in for someone with no file."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from datetime import datetime, UTC
from itertools import cycle, islice
from typing import Any, Literal, TYPE_CHECKING

import click

from edge_align.cli.chat import read_line
from edge_align.cli.options import (
    App,
    json_option,
    model_option,
    open_assistant,
    profile_option,
    runtime_options,
    sampling_options,
)
from edge_align.cli.output import emit_json, say, stages, write
from edge_align.cli.report import show_report
from edge_align.config import bounded, RuntimeConfig, SamplingConfig
from edge_align.errors import InputError
from edge_align.files import check_name
from edge_align.records import check_text, FeedbackRow, Prompt, user_prompt
from edge_align.simulation.prompts import compare_prompts
from edge_align.store import FeedbackLog

if TYPE_CHECKING:
    from edge_align.assistant import Assistant

ROUNDS = 12  # as many as there are prompts of ours, and some more than learning needs
SEEDS = 2**32
TRIES = 4  # seeds tried until two answers differ

Pick = Literal["a", "b", "skip", "quit"]
PICKS: dict[str, Pick] = {
    "a": "a", "b": "b", "s": "skip", "skip": "skip", "": "skip", "q": "quit", "quit": "quit"
}  # fmt: skip


@click.command("compare")
@click.option("--rounds", type=int, metavar="N", default=ROUNDS, help="Most comparisons.")
@click.option(
    "--prompt", "texts", metavar="TEXT", multiple=True, help="A question of yours; may be repeated.  [default: ours]"
)
@profile_option("Profile that learns from the picks.")
@sampling_options
@model_option
@runtime_options
@json_option
@click.pass_obj
def command(
    app: App,
    rounds: int,
    texts: tuple[str, ...],
    profile: str,
    sampling: SamplingConfig,
    model: str | None,
    runtime: RuntimeConfig,
) -> None:
    """Pick the better of two answers, and learn from it.

    Shows two sampled answers of the base to a question; type a or b for the better one, s to skip, q to stop. Each
    pick is in the feedback log at once, and the profile learns at the end.
    """
    bounded(rounds, 1, 10_000, "rounds")
    if sampling.temperature == 0.0:
        raise InputError("temperature 0 always gives the same answer; two different ones are needed")
    for text in texts:
        check_text("prompt", text)
    check_name("profile", profile)
    from edge_align.registry import find_pack

    questions = [*islice(cycle(texts or compare_prompts()), rounds)]
    picks: Counter[str] = Counter()
    with (
        FeedbackLog(app.home) as log,
        open_assistant(app, model=model, profile=None, use_profile=False, runtime=runtime) as assistant,
    ):
        find_pack(assistant.base, app.home)  # not after the last pick: without a pack nothing can be learnt
        for number, question in enumerate(questions):
            say(f"\n{number + 1}/{rounds}  {question}")
            prompt = user_prompt(question)
            seed = sampling.seed + number * TRIES * 2
            answers = _two_answers(assistant, prompt, sampling=replace(sampling, seed=seed % SEEDS))
            if answers is None:
                say("(the model answers this in one way only; next question)")
                picks["skip"] += 1
                continue
            for letter, answer in zip("AB", answers, strict=True):
                write(f"\n[{letter}] {answer.strip()}\n", err=app.json)
            pick = _pick()
            if pick == "quit":
                break
            picks[pick] += 1
            if pick != "skip":
                log.append(profile, [_row(prompt, answers, pick, model=assistant.base.id)])
    picked = picks["a"] + picks["b"]
    report = _learn(app, profile=profile, model=model, runtime=runtime) if picked else None
    if app.json:
        emit_json({"profile": profile, "picked": picked, "skipped": picks["skip"], "report": report})
    elif report is None:
        say("Nothing was picked, so there is nothing to learn.")
    else:
        write("\n")
        show_report(report)


def _two_answers(assistant: Assistant, prompt: Prompt, *, sampling: SamplingConfig) -> tuple[str, str] | None:
    """Two different answers of the base in random order, drawn by the seed; None when there are none."""
    found: list[str] = []
    for turn in range(2 * TRIES):
        one = replace(sampling, seed=(sampling.seed + turn) % SEEDS)
        text = assistant.answer(prompt, sampling=one, steered=False).text
        if text.strip() and text.strip() not in (other.strip() for other in found):
            found.append(text)
        if len(found) == 2:
            random.Random(sampling.seed).shuffle(found)
            return found[0], found[1]
    return None


def _pick() -> Pick:
    """Ask until there is an answer; the end of the input means quit."""
    while True:
        say("\nWhich is better? a, b, s (skip) or q (quit)")
        line = read_line()
        if line is None:
            return "quit"
        if line.strip().lower() in PICKS:
            return PICKS[line.strip().lower()]


def _row(prompt: Prompt, answers: tuple[str, str], pick: Pick, *, model: str) -> FeedbackRow:
    chosen, rejected = answers if pick == "a" else answers[::-1]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return FeedbackRow(prompt, chosen=chosen, rejected=rejected, origin="compare", ts=now, model=model)


def _learn(app: App, *, profile: str, model: str | None, runtime: RuntimeConfig) -> dict[str, Any]:
    from edge_align.personalize import personalize, PersonalizeConfig

    with stages() as progress:
        return personalize(
            home=app.home,
            sources=[],
            profile=profile,
            model=model,
            user=None,
            config=PersonalizeConfig(),
            runtime=runtime,
            progress=progress,
        ).to_dict()
