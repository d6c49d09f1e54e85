"""The `edge-align` command. A command's module is imported only when the command is used, so that help is instant."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

import click

from edge_align import __version__
from edge_align.cli.door import guarded, Interrupted
from edge_align.cli.options import App

COMMANDS = {
    "personalize": "Learn a profile from feedback.",
    "generate": "Answer one prompt.",
    "chat": "Talk, rate the answers, and learn from it.",
    "compare": "Pick the better of two answers, and learn from it.",
    "serve": "Answer desktop assistants, and learn from their thumbs.",
    "feedback": "Add, inspect, export and forget feedback.",
    "profiles": "List, choose, undo, share and remove profiles.",
    "models": "Show, add and remove the base models that can be personalised.",
    "eval": "Test a profile on feedback it never saw.",
    "bench": "Measure this machine: speed with a profile and without, and the time learning takes.",
    "export": "Prepare a base model for personalisation.",
    "doctor": "Check the installation, the base and the profile.",
}
"""Name -> short help. The module is edge_align.cli.<name>, and its attribute `command` the command."""


class Root(click.Group):
    """The command group, with commands imported when used and one door for all errors."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"edge_align.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([*COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, where a closed pipe or a full disk still meets the door
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                click.echo(err=True)  # the terminal shows ^C without a newline
            raise Interrupted from None
        return result

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,  # noqa: ARG002  # the door always answers with an exit code
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        given = [*(sys.argv[1:] if args is None else args)]
        inner = partial(
            super().main,
            given,
            prog_name or "edge-align",
            complete_var,
            standalone_mode=False,
            windows_expand_args=windows_expand_args,
            **extra,
        )
        sys.exit(guarded(inner, args=given))


@click.group("edge-align", cls=Root, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--home",
    metavar="DIR",
    help="Folder for profiles and feedback (also EDGE_ALIGN_HOME; else the platform's data folder).",
)
@click.version_option(__version__, prog_name="edge-align")
@click.pass_context
def cli(ctx: click.Context, home: str | None) -> None:
    """Make a local language model answer the way you like.

    Learns a small profile from your feedback in seconds, and steers the model with it; the model itself is never
    changed. Start with `edge-align personalize --feedback FILE`, or with `edge-align compare` if you have no file.
    """
    ctx.obj = App(home_option=home)


def main() -> NoReturn:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # a character the terminal cannot show must not end an answer
            reconfigure(errors="backslashreplace")
    cli.main()


if __name__ == "__main__":
    main()
