"""The one door for errors: every failure becomes one line on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

import click

from edge_align.cli.output import emit_json, one_line
from edge_align.errors import EdgeAlignError

DEBUG = "EDGE_ALIGN_DEBUG"
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Interrupted(Exception):
    """Ctrl-C, out of reach of click, which would print a line of its own."""


def guarded(run: Callable[[], object], *, args: Sequence[str]) -> int:
    """Run a command and return the process's exit code.

    0 or the command's own integer; an EdgeAlignError's code (1 or 2); 2 for wrong usage; 130 after Ctrl-C; 1 for a
    closed pipe and for anything unexpected. With --json among `args`, a failure also puts
    {"error": {"type", "message"}} on stdout.
    """
    wants_json = "--json" in (args[: args.index("--")] if "--" in args else args)
    try:
        code = run()
    except EdgeAlignError as error:
        return _fail(type(error).__name__, str(error), error.exit_code, wants_json)
    except click.ClickException as error:
        error.show()
        if wants_json:
            _document("UsageError", error.format_message())
        return error.exit_code
    except (Interrupted, click.Abort, KeyboardInterrupt):
        return _fail("Interrupted", "interrupted", EXIT_INTERRUPTED, wants_json)
    except OSError as error:
        if error.errno == errno.EPIPE:
            _drop_stdout()
            return 1
        return _fail(type(error).__name__, _operating_system(error), 2, wants_json)
    except Exception as error:
        message = f"unexpected {type(error).__name__}: {error} (run with {DEBUG}=1 for the traceback)"
        return _fail(type(error).__name__, message, 1, wants_json)
    return code if isinstance(code, int) else 0


def _fail(kind: str, message: str, code: int, wants_json: bool) -> int:
    if os.environ.get(DEBUG):
        import traceback

        traceback.print_exc(file=sys.stderr)
    click.echo(f"Error: {one_line(message)}", err=True)
    _document(kind, message, wants_json)
    return code


def _document(kind: str, message: str, wanted: bool = True) -> None:
    try:
        if wanted:
            emit_json({"error": {"type": kind, "message": one_line(message)}})
        sys.stdout.flush()
    except OSError:  # nobody reads, or the disk is full: the line on stderr has said it
        _drop_stdout()


def _drop_stdout() -> None:
    """Nothing more can be written there: let what is buffered go nowhere, or Python complains of it at exit."""
    with suppress(OSError, ValueError):  # no descriptor behind it
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _operating_system(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"
