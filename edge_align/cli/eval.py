"""`edge-align eval`: how often a profile predicts verdicts it never saw."""

from __future__ import annotations

from pathlib import Path

import click

from edge_align.cli.options import App, json_option, model_option, profile_option, stdin_bytes, threads_option
from edge_align.cli.output import emit_json, show_facts
from edge_align.cli.report import accuracy_in_words, dropped_lines, rows_in_words
from edge_align.config import RuntimeConfig


@click.command("eval")
@click.option(
    "--feedback",
    "files",
    metavar="FILE",
    multiple=True,
    required=True,
    help="Feedback the profile was not learnt from, in any known format; `-` is stdin. May be repeated.",
)
@profile_option("Profile to test.  [default: the one in use]", fallback=None)
@model_option
@click.option("--user", metavar="ID", help="Whose verdicts to read from a chat export of several users.")
@threads_option
@json_option
@click.pass_obj
def command(
    app: App,
    files: tuple[str, ...],
    profile: str | None,
    model: str | None,
    user: str | None,
    runtime: RuntimeConfig,
) -> None:
    """Test a profile on feedback it never saw.

    Prints the share of pairs where the profile prefers the chosen answer. Nothing is logged or learnt.
    """
    from edge_align.personalize import evaluate, Source

    sources = [Source("stdin", stdin_bytes()) if name == "-" else Source(name, Path(name)) for name in files]
    result = evaluate(home=app.home, sources=sources, profile=profile, model=model, user=user, runtime=runtime)
    if app.json:
        emit_json(result)
        return
    rows = result["rows"]
    facts = [("Rows", rows_in_words(rows))]
    facts += [("", line) for line in dropped_lines(rows["dropped"], more=rows["dropped_more"])]
    facts.append(("Profile", f"{result['profile']} version {result['version']} on {result['model']}"))
    facts.append(("Accuracy", accuracy_in_words(result["heldout"])))
    show_facts(facts)
