"""The commands as a person runs them: a process of their own, on the real base."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from edge_align.cli import doctor
from edge_align.runtime import llama_native
from edge_align.runtime.llama_native import amx, has_amx

MAIN = [sys.executable, "-m", "edge_align.cli.main"]
LIST_MODULES = """
import sys
from edge_align.cli.main import cli
try:
    cli.main(sys.argv[1:])
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""


@pytest.fixture
def process(home, base_path):
    """Run a command line in a process of its own."""

    def run(*args: str, input: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run([*MAIN, *args], input=input, capture_output=True, text=True, timeout=120)

    return run


def test_the_same_seed_gives_the_same_answer_and_torch_is_not_loaded(home, base_path):
    def answer(seed: str) -> tuple[dict[str, object], str]:
        arguments = [
            "generate",
            "What is tea?",
            "--no-profile",
            "--max-tokens",
            "6",
            "--seed",
            seed,
            "--threads",
            "1",
            "--json",
        ]
        done = subprocess.run(
            [sys.executable, "-c", LIST_MODULES, *arguments], capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout), done.stderr

    (first, modules), (again, _), (other, _) = answer("1"), answer("1"), answer("2")
    assert "llama_cpp" in modules.split() and "torch" not in modules.split()
    assert first["text"] == again["text"] != other["text"]
    assert (first["finish_reason"], first["completion_tokens"], first["model"]) == (
        "length",
        6,
        "smollm2-135m-instruct",
    )
    assert 0 < float(str(first["ttft_sec"])) < 60 and float(str(first["generation_tps"])) > 1


def test_a_prompt_longer_than_the_context_is_one_line(process):
    done = process("generate", "tea " * 500, "--no-profile", "--n-ctx", "128")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--n-ctx" in done.stderr and done.stderr.count("\n") == 1


def test_a_file_that_is_no_model_is_one_line(process, tmp_path):
    fake = tmp_path / "model.gguf"
    fake.write_bytes(b"GGUF" + bytes(100))
    for model in (str(fake), str(tmp_path / "nothing.gguf"), "no-such-id"):
        done = process("generate", "Hi", "--model", model)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1


def interrupted(*args: str, after: bytes, then: bytes = b"") -> tuple[int, bytes, bytes]:
    """Press Ctrl-C once the first bytes of the answer are there; `after` is typed before, `then` afterwards."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*MAIN, *args], **pipes) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(after)
        process.stdin.flush()
        first = os.read(process.stdout.fileno(), 1)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(then, timeout=60)
    return process.returncode, first + out, err


def test_ctrl_c_ends_generate_with_130_and_one_line(home, base_path):
    arguments = ("generate", "Tell me a long story.", "--no-profile", "--max-tokens", "2000", "--threads", "1")
    code, out, err = interrupted(*arguments, after=b"")
    assert code == 130 and out
    assert err == b"Error: interrupted\n"


def test_ctrl_c_in_a_chat_stops_only_the_answer(home, base_path):
    arguments = ("chat", "--no-profile", "--max-tokens", "2000", "--threads", "1")
    then = b"/up\n/quit\n"
    code, out, err = interrupted(*arguments, after=b"Tell me a long story.\n", then=then)
    assert (code, err) == (0, b"(stopped)\nLogged: good.\n")
    assert out.endswith(b"\n")


def test_models_show_knows_the_default_base(process, base_path):
    document = json.loads(process("models", "show", "--json").stdout)
    assert (document["architecture"], document["n_layer"], document["d_model"]) == ("llama", 30, 576)
    assert document["path"] == str(base_path)
    assert document["size_bytes"] == base_path.stat().st_size
    listed = json.loads(process("models", "list", "--json").stdout)
    assert [model["id"] for model in listed["models"]] == [listed["default"]] == [document["id"]]


def test_a_base_without_a_pack_names_the_command_and_the_time(process, base_path, tmp_path):
    other = tmp_path / "other.gguf"
    data = bytearray(base_path.read_bytes())
    data[-1] ^= 1  # another hash, so another base
    other.write_bytes(data)
    document = json.loads(process("models", "show", str(other), "--json").stdout)
    assert document["pack"] is None and document["estimate_minutes"] >= 1
    assert f"edge-align export pack --model {other}" in document["pack_error"]
    assert "minutes" in document["pack_error"]
    rows = '{"prompt": "q", "chosen": "a", "rejected": "b"}\n'
    done = process("personalize", "--model", str(other), "--feedback", "-", input=rows)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"Error: {document['pack_error']}\n")


def test_doctor_finds_that_vectors_steer_and_exits_by_what_is_broken(process, home):
    done = process("doctor", "--json")
    document = json.loads(done.stdout)
    checks = {check["name"]: check for check in document["checks"]}
    assert checks["steering"]["status"] == "ok" and "changes the logits" in checks["steering"]["detail"]
    assert (checks["base"]["status"], checks["home"]["status"], checks["profile"]["status"]) == ("ok", "ok", "note")
    assert checks.get("AMX", {"status": None})["status"] == (("ok" if amx() else "note") if has_amx() else None)
    broken = [name for name, check in checks.items() if check["status"] == "broken"]
    assert document["ok"] == (not broken) and done.returncode == (1 if broken else 0)
    unknown = process("doctor", "--model", "no-such-id")
    assert unknown.returncode == 1 and "base    " in unknown.stdout and "broken" in unknown.stdout
    home.root.chmod(0o755)
    assert "chmod 700" in process("doctor", "--model", "no-such-id").stdout


@pytest.mark.parametrize(("used", "status"), [(True, "ok"), (False, "note")])
def test_doctor_says_how_to_have_the_matrix_units_used(monkeypatch, used, status):
    monkeypatch.setattr(llama_native, "has_amx", lambda: True)
    monkeypatch.setattr(llama_native, "amx", lambda: used)
    (check,) = doctor._amx()
    assert check.status == status and ("CXXFLAGS='-fno-dse" in check.detail) is not used
