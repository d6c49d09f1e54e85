"""The documentation says what is so: commands, formats, links, versions."""

from __future__ import annotations

import ast
import io
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

import edge_align
from edge_align.cli.main import cli
from edge_align.feedback.detect import SOURCES
from edge_align.feedback.read import read_feedback
from edge_align.records import FeedbackRow

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


@cache
def pages() -> list[Path]:
    """The Markdown pages that git knows, or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file())


def blocks(path: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(path.read_text(encoding="utf-8")) if language in languages]


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command of the command line, as the words that call it."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, f"{name} is listed but not there"
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def command_lines(path: Path) -> list[str]:
    """`edge-align` command lines in the shell blocks of a page, without prompt, comment, pipe or redirection."""
    found = []
    for block in blocks(path, "", "bash", "console", "sh", "text"):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.match(r"\s*(?:\$ )?(edge-align .*)", line)
            if match:
                found.append(re.split(r"\s(?:#|\||>|<|&&)\s", match.group(1) + " ")[0].strip())
    return found


def parse(command: click.Command, words: list[str], parent: click.Context | None = None) -> None:
    """Parse a command line as the program would, without running anything. Raises click.UsageError."""
    name, *arguments = words
    try:
        context = command.make_context(name, arguments, parent=parent)
    except click.exceptions.Exit:  # --help, --version
        return
    if isinstance(command, click.Group):
        rest = arguments[len(arguments) - len(context._protected_args) - len(context.args) :]
        _, inner, _ = command.resolve_command(context, rest)
        assert inner is not None
        parse(inner, rest, context)


def test_every_command_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    missing = [" ".join(path) for path in commands() if f"edge-align {' '.join(path)}" not in text]
    assert missing == []


def test_command_lines_in_the_documentation_parse() -> None:
    wrong, count = [], 0
    for path in pages():
        if path.name == "cli.md":  # usage lines, with placeholders
            continue
        for line in command_lines(path):
            count += 1
            try:
                parse(cli, shlex.split(line))
            except click.UsageError as error:
                wrong.append(f"{path.relative_to(ROOT)}: {line}: {error.format_message()}")
    assert wrong == []
    assert count >= 5, "the README shows how to use the command line"


@pytest.mark.parametrize("line", ["edge-align personalise", "edge-align personalize --no-such-option x"])
def test_a_wrong_command_line_does_not_parse(line: str) -> None:
    with pytest.raises(click.UsageError):
        parse(cli, line.split())


def test_make_targets_in_the_documentation_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {name for path in pages() for name in re.findall(r"`make (\w+)`", path.read_text(encoding="utf-8"))}
    assert {"personalize", "test"} <= named <= targets


def test_python_in_the_documentation_is_python() -> None:
    for path in pages():
        for block in blocks(path, "python"):
            for node in ast.walk(ast.parse(block, str(path))):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("edge_align"):
                    exec(compile(ast.Module([node], []), str(path), "exec"), {})  # the names exist


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_to_a_file_leads_somewhere(path: Path) -> None:
    targets = [a or b for a, b in LINK.findall(re.sub(FENCE, "", path.read_text(encoding="utf-8")))]
    files = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert [file for file in files if not (path.parent / file).exists()] == []


def test_the_changelog_and_the_package_agree_on_the_version() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert released[0].split()[0] == edge_align.__version__ == project["version"]


def test_the_documentation_installs_the_pytorch_that_is_pinned() -> None:
    pinned = re.findall(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.findall(r"torch==\S+", (ROOT / "README.md").read_text(encoding="utf-8")) == pinned


def examples() -> list[tuple[str, str]]:
    """(format's name, example) of every example in docs/formats.md, by the heading it stands under."""
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    found = []
    for section in text.split("\n## ")[1:]:
        name = section.splitlines()[0]
        found += [(name, body) for language, body in FENCE.findall(section) if language in ("json", "csv")]
    return found


def test_every_format_has_an_example_in_the_documentation() -> None:
    assert {name for name, _ in examples()} == SOURCES


@pytest.mark.parametrize(("name", "example"), examples())
def test_an_example_of_a_format_is_read_as_that_format(name: str, example: str) -> None:
    rows = list(read_feedback(io.BytesIO(example.encode()), name="example"))
    assert rows
    assert all(isinstance(row, FeedbackRow) and row.source == name for row in rows), rows


def test_the_demo_asks_what_the_example_feedback_does_not_hold() -> None:
    script = (ROOT / "scripts" / "personalize_demo").read_text(encoding="utf-8")
    questions = re.findall(r'^    "(.*\?)"$', script, re.MULTILINE)
    assert len(questions) == 3
    lines = (ROOT / "examples" / "feedback.jsonl").read_text(encoding="utf-8").splitlines()
    asked = {str(json.loads(line)["prompt"]) for line in lines}
    assert len(asked) >= 8
    assert not [question for question in questions if any(question in prompt for prompt in asked)]
