"""What holds for the code as a whole: the order of its modules, what importing costs, and what never appears in it."""

from __future__ import annotations

import ast
import re
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"edge_align": ROOT / "edge_align", "edge_align_export": ROOT / "export" / "edge_align_export"}

# A module may import only modules that stand above it. A new module gets its line here.
ORDER = """
edge_align
edge_align.errors
edge_align.records
edge_align.config
edge_align.files
edge_align.tensors
edge_align.archive
edge_align.database
edge_align.profile_format
edge_align.home
edge_align.store
edge_align.profiles
edge_align.feedback
edge_align.feedback.fields
edge_align.feedback.turns
edge_align.feedback.formats
edge_align.feedback.formats.trl
edge_align.feedback.formats.native
edge_align.feedback.formats.csv
edge_align.feedback.formats.chatgpt
edge_align.feedback.formats.lm_studio
edge_align.feedback.formats.gpt4all
edge_align.feedback.formats.hh_rlhf
edge_align.feedback.formats.open_webui
edge_align.feedback.formats.openai
edge_align.feedback.formats.ultrafeedback
edge_align.feedback.formats.ultrafeedback_binarized
edge_align.feedback.detect
edge_align.feedback.containers
edge_align.feedback.read
edge_align.feedback.export
edge_align.pairs
edge_align.simulation
edge_align.simulation.lexicon
edge_align.simulation.topics
edge_align.simulation.prompts
edge_align.simulation.judges
edge_align.simulation.combinations
edge_align.simulation.users
edge_align.simulation.foreign
edge_align.pack
edge_align.encoder
edge_align.gguf_header
edge_align.gguf_tensors
edge_align.bundle
edge_align.control_vector
edge_align.onnx_files
edge_align.bases
edge_align.registry
edge_align.runtime
edge_align.runtime.base
edge_align.runtime.stream_text
edge_align.runtime.template
edge_align.runtime.sampling
edge_align.runtime.fake
edge_align.runtime.tokens
edge_align.runtime.llama_build
edge_align.runtime.llama_native
edge_align.runtime.llama_sampler
edge_align.runtime.llama_checks
edge_align.runtime.llama_devices
edge_align.runtime.llama_rows
edge_align.runtime.llamacpp
edge_align.runtime.tokenizer
edge_align.runtime.onnx_session
edge_align.runtime.onnx_rows
edge_align.runtime.onnx_checks
edge_align.runtime.onnx
edge_align.runtime.positions
edge_align.runtime.activations
edge_align.runtime.torch_rows
edge_align.runtime.torch_ref
edge_align.runtime.torch_sample
edge_align.installed
edge_align.speed
edge_align.kl
edge_align.fluency
edge_align.engines
edge_align.exchange
edge_align.features
edge_align.latent_dpo
edge_align.gate
edge_align.learning
edge_align.personalize
edge_align.assistant
edge_align.server
edge_align.server.refusal
edge_align.server.openapi
edge_align.server.fields
edge_align.server.keys
edge_align.server.guard
edge_align.server.listen
edge_align.server.answers
edge_align.server.ledger
edge_align.server.grammar
edge_align.server.tools
edge_align.server.asks
edge_align.server.engine
edge_align.server.prompt_cache
edge_align.server.decoder
edge_align.server.metrics
edge_align.server.refit
edge_align.server.learner
edge_align.server.service
edge_align.server.transport
edge_align.server.openai_shape
edge_align.server.openai_api
edge_align.server.responses_api
edge_align.server.embeddings
edge_align.server.ollama_api
edge_align.server.local_api
edge_align.server.app
edge_align_export
edge_align_export.linear
edge_align_export.card
edge_align_export.metric
edge_align_export.passes
edge_align_export.texts
edge_align_export.measure
edge_align_export.hooked
edge_align_export.clap_loss
edge_align_export.clap
edge_align_export.score
edge_align_export.curves
edge_align_export.pack
edge_align_export.room
edge_align_export.rope
edge_align_export.decoder_spec
edge_align_export.hf_folder
edge_align_export.hf_tokenizer
edge_align_export.hf_to_gguf
edge_align_export.quantise
edge_align_export.gguf_file
edge_align_export.engines
edge_align_export.parity
edge_align_export.verify
edge_align_export.bundle
edge_align_export.checkpoint_gguf
edge_align_export.checkpoint_hf
edge_align_export.checkpoint
edge_align_export.onnx_weights
edge_align_export.onnx_graph
edge_align_export.tokenizer_json
edge_align_export.onnx_export
edge_align.cli
edge_align.cli.output
edge_align.cli.door
edge_align.cli.options
edge_align.cli.report
edge_align.cli.control_vector
edge_align.cli.conversation
edge_align.cli.personalize
edge_align.cli.generate
edge_align.cli.chat
edge_align.cli.compare
edge_align.cli.serve
edge_align.cli.feedback
edge_align.cli.profiles
edge_align.cli.models
edge_align.cli.eval
edge_align.cli.bench
edge_align.cli.export
edge_align.cli.doctor
edge_align.cli.main
""".split()

LINES = 400
TABLES = {"edge_align.simulation.topics"}  # word lists, not code


@cache
def modules() -> dict[str, Path]:
    """Name -> file of every module of both packages."""
    found = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> set[str]:
    """Names of our own modules that a file imports anywhere in it, inside functions and for types too."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = inner & modules().keys()
            names |= submodules
            if len(submodules) < len(inner):  # something that stands in the module itself
                names.add(str(node.module))
    return {name for name in names if name.split(".")[0] in SOURCES}


def code_files() -> list[Path]:
    """Every Python file of the repository that is no test."""
    inside = [ROOT / "bench", ROOT / "scripts", *SOURCES.values()]
    return sorted(path for folder in inside for path in folder.rglob("*.py"))


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]  # a file may be deleted but not yet committed


def test_every_module_has_a_place_in_the_order() -> None:
    unknown = modules().keys() - set(ORDER)
    assert not unknown, f"give these a line in ORDER: {', '.join(sorted(unknown))}"


def test_the_order_names_only_modules_that_exist() -> None:
    gone = set(ORDER) - modules().keys()
    assert not gone, f"no such module: {', '.join(sorted(gone))}"


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_only_modules_above_it(name: str) -> None:
    above = set(ORDER[: ORDER.index(name)])
    wrong = imported(modules()[name]) - above
    assert not wrong, f"{name} imports {', '.join(sorted(wrong))}"


def test_the_import_check_sees_functions_types_and_submodules(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(
        "from typing import TYPE_CHECKING\n"
        "from edge_align.feedback import turns\n"
        "if TYPE_CHECKING:\n    from edge_align.records import Prompt\n"
        "def late():\n    import edge_align.home\n"
    )
    assert imported(planted) == {"edge_align.feedback.turns", "edge_align.records", "edge_align.home"}


@pytest.mark.parametrize("name", sorted(modules().keys() - TABLES))
def test_a_module_has_at_most_400_lines(name: str) -> None:
    assert len(modules()[name].read_text(encoding="utf-8").splitlines()) <= LINES


UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_NAMES = {"LlamaDiskCache", "allow_pickle"}  # the disk cache pickles what it keeps


def unsafe(path: Path) -> list[str]:
    """Where a file could load code from data."""
    found = []
    for node in ast.walk(tree(path)):
        names: set[str] = set()
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names} & UNSAFE_MODULES
        elif isinstance(node, ast.ImportFrom):
            names = {str(node.module).split(".")[0]} & UNSAFE_MODULES
            names |= {alias.name for alias in node.names} & UNSAFE_NAMES
        elif isinstance(node, ast.keyword) and not (isinstance(node.value, ast.Constant) and node.value.value is False):
            names = {node.arg or ""} & UNSAFE_NAMES
        elif isinstance(node, ast.Attribute):
            names = {node.attr} & UNSAFE_NAMES
            if isinstance(node.value, ast.Name) and (node.value.id, node.attr) == ("torch", "load"):
                names = {"torch.load"}
        found += [f"{path}:{getattr(node, 'lineno', '?')}: {name}" for name in sorted(names)]
    return found


def test_nothing_loads_code_from_data() -> None:
    assert [place for path in code_files() for place in unsafe(path)] == []


def test_the_unsafe_check_finds_what_it_looks_for(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(
        "import pickle\nfrom llama_cpp import LlamaDiskCache\ntorch.load(p)\n"
        "np.load(p, allow_pickle=False)\nnp.load(p, allow_pickle=True)\nnp.save(p, a, allow_pickle=maybe)\n"
    )
    found = sorted(place.rsplit(":", 2)[1:] for place in unsafe(planted))
    assert found == [
        ["1", " pickle"],
        ["2", " LlamaDiskCache"],
        ["3", " torch.load"],
        ["5", " allow_pickle"],
        ["6", " allow_pickle"],
    ]


HEAVY = "numpy torch llama_cpp gguf jinja2 safetensors transformers onnxruntime matplotlib".split()


def loaded_by(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after `code`."""
    report = "\nimport sys\nsys.stderr.write('LOADED ' + ' '.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code + report], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "LOADED " in result.stderr, result.stderr
    return set(result.stderr.rsplit("LOADED ", 1)[1].split()) & set(HEAVY)


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import edge_align") == set()
    assert loaded_by("import edge_align, numpy") == {"numpy"}  # the measurement sees what it should


def test_help_of_every_command_loads_nothing_heavy() -> None:
    code = """
import click
from click.testing import CliRunner
from edge_align.cli.main import cli

def walk(command, context, path):
    result = CliRunner().invoke(cli, [*path, "--help"])
    assert result.exit_code == 0 and result.output.startswith("Usage:"), (path, result.output)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            walk(command.get_command(context, name), context, [*path, name])

walk(cli, click.Context(cli), [])
"""
    assert loaded_by(code) == set()


# The brackets keep the patterns from finding themselves.
MACHINE_PATHS = re.compile(r"(?<![\w.~$}/-])/(?:wor[k]|roo[t]|tm[p]|op[t]|hom[e])/[a-z]")
HOSTS = re.compile(r"pyp[i]\.(?:org|io)|python[h]osted|download\.pytorc[h]|anacond[a]\.(?:org|com)")


@pytest.mark.parametrize("pattern", [MACHINE_PATHS, HOSTS], ids=["paths of one machine", "hosts of package registries"])
def test_no_tracked_file_names(pattern: re.Pattern[str]) -> None:
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in pattern.finditer(text)]
    assert found == []


def test_the_patterns_find_what_they_look_for() -> None:
    assert MACHINE_PATHS.search("open('/{}/main/x')".format("work"))
    assert not MACHINE_PATHS.search("https://a.example/{}/c".format("work"))
    assert HOSTS.search("https://{}.org/simple".format("pypi"))


def test_tests_reach_this_machine_only() -> None:
    with pytest.raises(AssertionError, match="without a network"):
        socket.create_connection(("192.0.2.1", 80), timeout=0.1)  # an address reserved for documentation (RFC 5737)
    with pytest.raises(AssertionError, match="without a network"):
        socket.getaddrinfo("example.org", 80)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass


def test_the_installer_can_be_read_by_an_old_python() -> None:
    text = (ROOT / "scripts" / "install.py").read_text(encoding="utf-8")
    ast.parse(text, feature_version=(3, 7))  # else its message about the version is never seen
    with pytest.raises(SyntaxError):
        ast.parse("(a := 1)", feature_version=(3, 7))
