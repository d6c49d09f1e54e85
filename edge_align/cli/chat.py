"""`edge-align chat`: talk with the model, rate its answers, and have it learn from that."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from edge_align.cli.options import (
    App,
    engine_option,
    json_option,
    model_option,
    open_assistant,
    profile_option,
    runtime_options,
    sampling_options,
    strength_option,
)
from edge_align.cli.output import emit_json, say
from edge_align.config import check_strength, RuntimeConfig, SamplingConfig
from edge_align.errors import InputError


@click.command("chat")
@profile_option("Profile to talk to.  [default: the one in use]", fallback=None)
@click.option("--no-profile", is_flag=True, show_default=False, help="Start with the base.")
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
    profile: str | None,
    no_profile: bool,
    strength: float,
    system: str | None,
    sampling: SamplingConfig,
    model: str | None,
    engine: str | None,
    runtime: RuntimeConfig,
) -> None:
    """Talk, rate the answers, and learn from it.

    Lines that begin with / are commands: /help lists them. Every verdict is in the feedback log at once. Ctrl-C stops
    an answer, /quit or the end of the input ends the chat. With --json, answers go to stderr and the whole
    conversation to stdout at the end.
    """
    from edge_align.cli.conversation import Conversation

    check_strength(strength)
    if no_profile and profile is not None:
        raise InputError("--no-profile cannot be combined with --profile; drop one of them")
    with open_assistant(
        app, model=model, profile=profile, use_profile=not no_profile, runtime=runtime, engine=engine
    ) as assistant:
        conversation = Conversation(
            assistant,
            home=app.home,
            sampling=sampling,
            strength=strength,
            system=system,
            answers_on_stderr=app.json,
            stoppable=stoppable,
        )
        if sys.stdin.isatty():
            say(f"{conversation.where()}; /help lists the commands, /quit ends.")
        conversation.run(read_line)
        if app.json:
            emit_json(conversation.document())


def read_line() -> str | None:
    """The next line of the person, None at the end; a prompt is shown only where somebody sees it."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    try:
        if sys.stdout.isatty():
            import readline  # noqa: F401  # line editing and history for input()

            return input("> ")
        say(">")
        return input()
    except ImportError:
        return input("> ")
    except EOFError:
        return None


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Ctrl-C within it is not raised but reported by the function; a second one is raised."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def handle(_number: int, _frame: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
