"""stdout is data, stderr is talk: JSON documents, tables, streamed text, and progress."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

LINE_EVERY_SEC = 60.0  # in a log, of a stage that goes on
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160))}
_KEPT = {code: shown for code, shown in _CONTROLS.items() if chr(code) not in "\n\t"}


def clean(text: str) -> str:
    """`text` without control characters, which could move a terminal's cursor or fake its content."""
    return text.translate(_KEPT)


def one_line(text: str) -> str:
    """`text` as one line without control characters; runs of white space become one space."""
    return " ".join(text.split()).translate(_CONTROLS)


def shorten(text: str, width: int) -> str:
    """`one_line(text)` in at most `width` characters."""
    line = one_line(text)
    return line if len(line) <= width else line[: width - 1] + "…"


def emit_json(document: Mapping[str, Any]) -> None:
    """The one document of a --json command, on stdout; NaN and infinity become null."""
    click.echo(json.dumps(_finite(document), ensure_ascii=False, indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def say(text: str) -> None:
    """A line of talk on stderr."""
    click.echo(clean(text), err=True)


def write(text: str, *, err: bool = False) -> None:
    """A piece of streamed text, at once; control characters are taken out only where a terminal would obey them."""
    stream = sys.stderr if err else sys.stdout
    stream.write(clean(text) if stream.isatty() else text)
    stream.flush()


def console() -> Console:
    """A console on stdout that interprets nothing in the texts it shows."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


def show_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """A table on stdout: fitted to a terminal, else one plain line per row. right: headers of columns of numbers."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        _show_plain([list(headers), *cells], [header in right for header in headers])
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    console().print(table)


def show_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Labelled lines on stdout: a table of two columns without a header."""
    cells = [[label, one_line(value)] for label, value in facts]
    if not sys.stdout.isatty():
        _show_plain(cells, [False, False])
        return
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in cells:
        grid.add_row(Text(label, style="bold"), Text(value))
    console().print(grid)


def _show_plain(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        click.echo("  ".join(padded).rstrip())


def size(n_bytes: int) -> str:
    """Bytes for a person."""
    value = float(n_bytes)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def plural(count: int, noun: str) -> str:
    """ "1 row", "2 rows"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


@contextmanager
def stages(*, lines: bool = False) -> Iterator[Callable[[str, float], None]]:
    """A function to report (stage, fraction done) to: bars on stderr where that is a terminal.

    Elsewhere silence or, with `lines`, a line when a stage begins and every minute that it goes on.
    """
    if not sys.stderr.isatty():
        said: dict[str, float] = {}

        def mention(stage: str, done: float) -> None:
            now = time.monotonic()
            if not lines or now < said.get(stage, -math.inf) + LINE_EVERY_SEC:
                return
            say(f"- {stage}: {done:.0%}" if stage in said else f"- {stage}")
            said[stage] = now

        yield mention
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<12}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, markup=False), transient=True) as progress:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: float) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=1.0)
            progress.update(tasks[stage], completed=done)

        yield report
