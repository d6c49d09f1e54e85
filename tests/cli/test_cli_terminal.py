"""What differs on a terminal: columns, progress, and text that cannot steer it."""

import os
import pty
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

fcntl = pytest.importorskip("fcntl")
termios = pytest.importorskip("termios")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPT = """
import edge_align.assistant, edge_align.personalize
from cli_double import DoubleAssistant, Report
from edge_align.cli.main import main
DoubleAssistant.profiles, DoubleAssistant.current = {"default": 3}, "default"
def learn(**arguments):
    arguments["progress"]("encode", 0.5)
    return Report()
edge_align.assistant.Assistant, edge_align.personalize.personalize = DoubleAssistant, learn
main()
"""


@pytest.fixture
def terminal(home):
    """Run a command on a terminal of so many columns; returns what it shows."""

    def show(*args: str, columns: int = 120, keys: str = "") -> str:
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
        environment |= {"PYTHONPATH": f"{HERE}:{ROOT}", "TERM": "xterm", "EDGE_ALIGN_HOME": str(home.root)}
        command = [sys.executable, "-c", SCRIPT, *args]
        with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment) as process:
            os.close(slave)
            os.write(master, keys.encode())
            output = b""
            while True:
                try:
                    piece = os.read(master, 65536)
                except OSError:  # Linux says so when the other side is closed
                    break
                if not piece:
                    break
                output += piece
        os.close(master)
        assert process.returncode == 0, output
        return output.decode().replace("\r\n", "\n")

    return show


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_a_wide_terminal_shows_two_answers_side_by_side_and_a_narrow_one_below_the_other(terminal):
    wide = plain(terminal("generate", "Hi", "--compare")).splitlines()
    assert [line.split("    ")[0].strip() for line in wide] == ["base", "base answers 'Hi' with seed 0"]
    assert wide[1].rstrip().endswith("default answers 'Hi' with seed 0")
    narrow = plain(terminal("generate", "Hi", "--compare", columns=60)).splitlines()
    assert "base answers 'Hi' with seed 0" in narrow and "default answers 'Hi' with seed 0" in narrow


def test_an_answer_cannot_steer_the_terminal(terminal):
    assert "\x1b" not in terminal("generate", "\x1b[2J", "--no-profile")


def test_learning_shows_its_stages_and_leaves_only_the_report(terminal):
    shown = terminal("personalize")
    assert "encode" in shown and "\x1b[" in shown
    assert plain(shown).strip().endswith("--compare")


def test_a_chat_prompts_and_ends_at_the_end_of_the_input(terminal):
    shown = plain(terminal("chat", keys="Hi\n/quit\n"))
    assert "double with profile default version 3; /help lists the commands" in shown
    assert "default answers 'Hi' with seed 0" in shown
    assert "> " in shown
