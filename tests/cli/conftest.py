from collections.abc import Iterator

import pytest
from cli_double import DoubleAssistant, Report
from click.testing import CliRunner, Result

from edge_align.cli.main import cli
from edge_align.home import Home


@pytest.fixture
def home(tmp_path, monkeypatch) -> Home:
    monkeypatch.setenv("EDGE_ALIGN_HOME", str(tmp_path / "home"))
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "EDGE_ALIGN_DEBUG", "EDITOR", "VISUAL"):
        monkeypatch.delenv(name, raising=False)
    return Home(tmp_path / "home")


@pytest.fixture
def run(home):
    """Run a command line; the result has exit_code, stdout and stderr."""

    def invoke(*args: str, input: str | bytes | None = None) -> Result:
        return CliRunner().invoke(cli, [*args], input=input)

    return invoke


@pytest.fixture
def engine(monkeypatch, home) -> Iterator[type[DoubleAssistant]]:
    """The double in place of the engine. Its `asked` holds the arguments `personalize` was called with."""

    class Engine(DoubleAssistant):
        profiles = {"default": 3, "work": 1}
        current = "default"
        opened = []
        asked = []

    def personalize(**arguments):
        Engine.asked.append(arguments)
        arguments["progress"]("fit", 0.5)
        return Report(profile=arguments["profile"])

    monkeypatch.setattr("edge_align.personalize.personalize", personalize)
    monkeypatch.setattr("edge_align.assistant.Assistant", Engine)
    monkeypatch.setattr("edge_align.registry.find_pack", lambda _base, _home: None)
    yield Engine
