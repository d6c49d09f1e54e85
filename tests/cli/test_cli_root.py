import errno
import json
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from edge_align.cli import main as main_module
from edge_align.cli.door import guarded
from edge_align.cli.main import cli, COMMANDS
from edge_align.errors import ContextOverflow, SessionClosed, StorageError

HEAVY = ("numpy", "torch", "llama_cpp", "rich", "gguf", "safetensors", "jinja2")


def commands() -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command and group with its path."""

    def walk(path: tuple[str, ...], command: click.Command) -> Iterator[tuple[tuple[str, ...], click.Command]]:
        yield path, command
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                child = command.get_command(context, name)
                assert child is not None
                yield from walk((*path, name), child)

    yield from walk((), cli)


LEAVES = [path for path, command in commands() if not isinstance(command, click.Group)]
ISSUE = """personalize generate chat compare serve eval doctor feedback import|add|list|stats|validate|export|forget
    profiles list|show|use|history|undo|rename|rm|export|import models list|show|add|rm
    bench latency|personalize export pack|onnx|gguf|bundle|verify|control-vector"""


def test_every_command_of_the_specification_is_there_and_no_other():
    words = ISSUE.split()
    expected = {(word,) for word in words[:7]}
    for group, names in zip(words[7::2], words[8::2], strict=True):
        expected |= {(group, name) for name in names.split("|")}
    assert set(LEAVES) == expected


@pytest.mark.parametrize("path", [path for path, _ in commands()], ids=" ".join)
def test_every_command_explains_itself_and_takes_short_h(path, run):
    result = run(*path, "-h")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: edge-align")
    assert result.stdout == run(*path, "--help").stdout
    command = dict(commands())[path]
    assert command.help and len(command.help.split()) >= 3


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_command_takes_json_and_every_option_is_explained(path):
    options = [param for param in dict(commands())[path].params if isinstance(param, click.Option)]
    assert "--json" in [name for option in options for name in option.opts]
    assert [option.name for option in options if not option.help] == []


def test_the_short_helps_in_the_table_are_the_first_words_of_the_commands():
    for name, short in COMMANDS.items():
        text = dict(commands())[(name,)].help or ""
        assert text.splitlines()[0].startswith(short.rstrip(".")), name


def test_help_of_every_command_loads_no_engine_numpy_or_rich():
    script = f"""
import sys
from edge_align.cli.main import cli, COMMANDS
paths = {[path for path, _ in commands()]!r}
loaded = []
for path in paths:
    try:
        cli.main([*path, "--help"])
    except SystemExit as end:
        assert end.code == 0, path
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    if heavy:
        loaded.append((path, heavy))
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_root_help_imports_no_command():
    script = """
import sys
from edge_align.cli.main import cli, COMMANDS
try:
    cli.main(["--help"])
except SystemExit:
    pass
assert [name for name in COMMANDS if f"edge_align.cli.{name}" in sys.modules] == []
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_version(run):
    from edge_align import __version__

    assert run("--version").stdout == f"edge-align, version {__version__}\n"


def test_wrong_usage_exits_with_2_and_says_so_in_json(run):
    result = run("feedback", "list", "--limits", "3", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "UsageError"
    assert "No such option" in result.stderr
    assert run("feedbak").exit_code == 2
    assert run().exit_code == 2


def outcome(error: BaseException, capsys, *args: str) -> tuple[int, str, str]:
    def fail() -> object:
        raise error

    code = guarded(fail, args=args)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ContextOverflow("the prompt is\n9,000 tokens\x1b[2J long"), 2),
        (StorageError("the disk is full"), 2),
        (SessionClosed("closed"), 1),
        (ValueError("what is this"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
    ],
)
def test_every_failure_is_one_line_on_stderr_with_its_exit_code(error, code, capsys):
    given, out, err = outcome(error, capsys)
    assert (given, out) == (code, "")
    assert err.startswith("Error: ") and err.count("\n") == 1 and "\x1b" not in err
    given, out, err = outcome(error, capsys, "x", "--json")
    message = json.loads(out)["error"]["message"]
    assert given == code and err == f"Error: {message}\n"


def test_json_after_the_double_dash_is_text(capsys):
    assert outcome(StorageError("full"), capsys, "generate", "--", "--json")[1] == ""


def test_a_closed_pipe_is_quiet(capsys):
    assert outcome(BrokenPipeError(errno.EPIPE, "Broken pipe"), capsys, "--json") == (1, "", "")


def test_the_traceback_is_shown_on_request(capsys, monkeypatch):
    assert "EDGE_ALIGN_DEBUG=1" in outcome(ValueError("odd"), capsys)[2]
    monkeypatch.setenv("EDGE_ALIGN_DEBUG", "1")
    assert "Traceback" in outcome(ValueError("odd"), capsys)[2]


def test_a_reader_that_leaves_early_ends_the_command_without_noise(home, run, tmp_path):
    rows = ({"prompt": f"q {n}", "chosen": "good " * 50, "rejected": "bad"} for n in range(2000))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("feedback", "import", str(tmp_path / "rows.jsonl")).exit_code == 0
    command = [sys.executable, "-m", "edge_align.cli.main", "--home", str(home.root), "feedback", "export"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b'{"prompt"')
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_a_full_disk_behind_stdout_is_one_line(home, run):
    run("feedback", "add", "--prompt", "q", "--completion", "a", "--up")
    command = [sys.executable, "-m", "edge_align.cli.main", "--home", str(home.root), "feedback", "list"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "Error: No space left on device\n")


def test_the_home_option_wins_over_the_variable(home, run, tmp_path):
    other = str(tmp_path / "other")
    assert run("--home", other, "feedback", "add", "--prompt", "q", "--completion", "a", "--up").exit_code == 0
    assert json.loads(run("feedback", "stats", "--json").stdout)["rows"] == 0
    assert json.loads(run("--home", other, "feedback", "stats", "--json").stdout)["rows"] == 1
    assert not home.root.exists()


def test_the_console_script_is_the_entry_point():
    assert callable(main_module.main)
