"""`edge-align personalize`: feedback in, a profile out, and a report that says what was learnt and how sure it is."""

from __future__ import annotations

from pathlib import Path

import click

from edge_align.cli.options import (
    App,
    engine_option,
    json_option,
    model_option,
    profile_option,
    stdin_bytes,
    threads_option,
)
from edge_align.cli.output import emit_json, stages
from edge_align.config import default, PersonalizeConfig, RuntimeConfig


@click.command("personalize")
@click.option(
    "--feedback",
    "files",
    metavar="FILE",
    multiple=True,
    help="Feedback in any known format (JSON lines, JSON, CSV); `-` is stdin. May be repeated. Without it: what "
    "was logged before.",
)
@profile_option("Profile to learn.")
@model_option
@engine_option
@click.option("--user", metavar="ID", help="Whose verdicts to read from a chat export of several users.")
@click.option(
    "--kl-budget",
    type=float,
    metavar="X",
    default=default(PersonalizeConfig, "kl_budget"),
    help="Most divergence from the base in nats per token; little or noisy feedback gets less.",
)
@click.option(
    "--nll-limit",
    type=float,
    metavar="X",
    default=default(PersonalizeConfig, "nll_limit"),
    help="Most NLL of personal answers under the base, as a multiple of the base's own; strength is lowered to keep "
    "it. 0: they are not tried.",
)
@click.option(
    "--collision-limit",
    type=float,
    metavar="X",
    default=default(PersonalizeConfig, "collision_limit"),
    help="Most sameness of words in personal answers, as a multiple of the base's own; strength is lowered to keep it. "
    "0: not looked at.",
)
@click.option("--seed", type=int, default=default(PersonalizeConfig, "seed"), help="Seed of the training.")
@click.option("--no-activate", is_flag=True, show_default=False, help="Keep the new version, but do not switch to it.")
@click.option("--force", is_flag=True, show_default=False, help="Switch to it even when it cannot be told from chance.")
@threads_option
@json_option
@click.pass_obj
def command(
    app: App,
    files: tuple[str, ...],
    profile: str,
    model: str | None,
    engine: str | None,
    user: str | None,
    kl_budget: float,
    nll_limit: float,
    collision_limit: float,
    seed: int,
    no_activate: bool,
    force: bool,
    runtime: RuntimeConfig,
) -> None:
    """Learn a profile from feedback.

    Adds the feedback to the profile's log (each verdict once), trains on the whole log, tests by cross-validation
    whether the verdicts can be predicted at all, and switches the profile on if so. The model itself is not changed.
    """
    from edge_align.cli.report import show_report
    from edge_align.personalize import personalize, PersonalizeConfig, Source

    config = PersonalizeConfig(
        kl_budget=kl_budget,
        nll_limit=nll_limit,
        collision_limit=collision_limit,
        seed=seed,
        activate=not no_activate,
        force=force,
    )
    sources = [Source("stdin", stdin_bytes()) if name == "-" else Source(name, Path(name)) for name in files]
    with stages() as progress:
        report = personalize(
            home=app.home,
            sources=sources,
            profile=profile,
            model=model,
            user=user,
            config=config,
            runtime=runtime,
            engine=engine,
            progress=progress,
        ).to_dict()
    if app.json:
        emit_json(report)
    else:
        show_report(report)
