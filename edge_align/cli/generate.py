"""`edge-align generate`: one prompt, one answer, streamed; with --compare the base's answer beside it."""

from __future__ import annotations

from typing import Any, TYPE_CHECKING

import click

from edge_align.cli.options import (
    App,
    engine_option,
    json_option,
    model_option,
    open_assistant,
    profile_option,
    read_value,
    runtime_options,
    sampling_options,
    strength_option,
)
from edge_align.cli.output import clean, console, emit_json, say, write
from edge_align.config import check_strength, RuntimeConfig, SamplingConfig
from edge_align.errors import InputError
from edge_align.records import check_text, join_chunks, Prompt, user_prompt

if TYPE_CHECKING:
    from edge_align.assistant import Assistant

TWO_COLUMNS = 100  # columns of a terminal from which two answers stand side by side


@click.command("generate")
@click.argument("prompt")
@profile_option("Profile to answer with.  [default: the one in use]", fallback=None)
@click.option("--no-profile", is_flag=True, show_default=False, help="Answer as the base does.")
@click.option("--compare", is_flag=True, show_default=False, help="Show the base's answer and the personal one.")
@strength_option
@click.option("--system", metavar="TEXT", help="System prompt.")
@sampling_options
@model_option
@engine_option
@runtime_options
@json_option
@click.pass_obj
def command(
    app: App,
    prompt: str,
    profile: str | None,
    no_profile: bool,
    compare: bool,
    strength: float,
    system: str | None,
    sampling: SamplingConfig,
    model: str | None,
    engine: str | None,
    runtime: RuntimeConfig,
) -> None:
    """Answer one prompt. PROMPT is text, or `-` for stdin.

    The answer depends only on the prompt, the profile, the strength, the sampling options and the seed.
    """
    check_strength(strength)
    if no_profile and (profile is not None or compare):
        raise InputError("--no-profile cannot be combined with --profile or --compare; drop one of them")
    conversation = user_prompt(read_value(prompt, name="prompt"), system=system)
    for message in conversation:
        check_text("prompt" if message.role == "user" else "system prompt", message.content)
    with open_assistant(
        app, model=model, profile=profile, use_profile=not no_profile, runtime=runtime, engine=engine
    ) as assistant:
        if assistant.profile is None and compare:
            raise InputError("there is no profile to compare with the base; make one with `edge-align personalize`")
        if assistant.profile is None and not no_profile:
            say("Note: no profile is in use; this is the base's answer.")
        if compare:
            _compare(app, assistant, conversation, sampling=sampling, strength=strength)
            return
        document = _answer(assistant, conversation, sampling=sampling, strength=strength, stream=not app.json)
        if app.json:
            emit_json(document)
        else:
            write("\n")


def _answer(
    assistant: Assistant,
    prompt: Prompt,
    *,
    sampling: SamplingConfig,
    strength: float,
    steered: bool = True,
    stream: bool = False,
) -> dict[str, Any]:
    """Generate an answer and describe it; `stream` also writes it to stdout as it is decoded."""
    chunks = []
    for chunk in assistant.stream(prompt, sampling=sampling, strength=strength, steered=steered):
        if stream:
            write(chunk.text)
        chunks.append(chunk)
    answer = join_chunks(chunks)
    profile = assistant.profile if steered else None
    stats = answer.stats
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": stats.prompt_tokens if stats else None,
        "completion_tokens": len(answer.tokens),
        "ttft_sec": stats.ttft_sec if stats else None,
        "generation_tps": stats.generation_tps if stats else None,
        "prompt_tps": stats.prompt_tps if stats else None,
        "profile": profile.name if profile else None,
        "version": profile.version if profile else None,
        "strength": strength if profile else 0.0,
        "model": assistant.base.id,
        "seed": sampling.seed,
    }


def _compare(app: App, assistant: Assistant, prompt: Prompt, *, sampling: SamplingConfig, strength: float) -> None:
    """Both answers with the same seed: side by side where there is room, else one below the other as they come."""
    profile = assistant.profile
    personal = f"{profile.name} version {profile.version}, strength {strength:g}" if profile else ""
    screen = console()
    columns = screen.is_terminal and screen.width >= TWO_COLUMNS and not app.json
    documents = {}
    for key, heading, steered in (("base", "base", False), ("personal", personal, True)):
        stream = not app.json and not columns
        if stream:
            write(f"{heading}\n{'-' * len(heading)}\n" if key == "base" else f"\n{heading}\n{'-' * len(heading)}\n")
        documents[key] = _answer(
            assistant, prompt, sampling=sampling, strength=strength, steered=steered, stream=stream
        )
        if stream:
            write("\n")
    if app.json:
        emit_json(documents)
    elif columns:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 4, 0, 0), expand=True, header_style="bold")
        table.add_column(Text("base"), ratio=1, overflow="fold")
        table.add_column(Text(personal), ratio=1, overflow="fold")
        table.add_row(*(Text(clean(documents[key]["text"].strip())) for key in ("base", "personal")))
        screen.print(table)
