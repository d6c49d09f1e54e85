"""Write docs/cli.md, the reference of the command line, from the help of every command.

python scripts/cli_reference.py            writes it
python scripts/cli_reference.py --check    exits with 1 when it is not current
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

from edge_align.cli.main import cli  # noqa: E402

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
WIDTH = 110

HEAD = """\
# The command line

Written by `scripts/cli_reference.py` from the help of each command; change it there.

What holds for every command: data goes to stdout, talk and progress to stderr. `--json` puts exactly one JSON document
on stdout, `{"error": {"type", "message"}}` when the command fails. An error is one line on stderr; with
`EDGE_ALIGN_DEBUG=1` its traceback comes before it.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | an engine failed, `doctor` found something broken, or an unexpected error |
| 2 | wrong usage or bad input: a file, an option, a model, a profile, the disk |
| 130 | stopped with Ctrl-C |
"""


def sections(command: click.Command, context: click.Context) -> Iterator[str]:
    """One section per command, groups before what is in them."""
    depth = "##" if len(context.command_path.split()) < 3 else "###"
    yield f"{depth} {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None:
                yield from sections(child, click.Context(child, info_name=name, parent=context))


def reference() -> str:
    """The whole page."""
    settings = {"terminal_width": WIDTH, "max_content_width": WIDTH, "help_option_names": ["-h", "--help"]}
    context = click.Context(cli, info_name="edge-align", show_default=True, **settings)  # type: ignore[arg-type]
    return "\n".join([HEAD, *sections(cli, context)])


def main(arguments: list[str]) -> int:
    text = reference()
    if arguments == ["--check"]:
        if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text:
            return 0
        print("docs/cli.md is not current; run: python scripts/cli_reference.py", file=sys.stderr)
        return 1
    if arguments:
        print(__doc__, file=sys.stderr)
        return 2
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
