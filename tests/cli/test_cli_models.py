"""`models add`, `models rm` and `export gguf` as commands: words, documents, exit codes."""

import json

from scripts.tiny_models import write_gguf


def test_a_file_is_added_listed_and_removed(run, home, tmp_path):
    model = write_gguf(tmp_path / "tiny.gguf", "qwen2")
    added = run("models", "add", str(model), "--threads", "1")
    assert added.exit_code == 0, added.stderr
    assert added.stdout.startswith("tiny is installed (") and "without a pack" in added.stdout
    assert "edge-align export pack --model tiny" in added.stderr
    listed = json.loads(run("models", "list", "--json").stdout)["models"]
    assert [model["id"] for model in listed if model["added"]] == ["tiny"]
    shown = json.loads(run("models", "show", "tiny", "--json").stdout)
    assert (shown["architecture"], shown["n_layer"], shown["d_model"], shown["pack"]) == ("qwen2", 4, 64, None)
    said = run("generate", "Hi", "--model", "tiny", "--no-profile", "--max-tokens", "3", "--threads", "1", "--json")
    assert json.loads(said.stdout)["model"] == "tiny"
    assert run("models", "rm", "tiny").exit_code == 2  # needs a yes
    gone = json.loads(run("models", "rm", "tiny", "--yes", "--json").stdout)
    assert gone["freed_bytes"] >= model.stat().st_size
    assert run("models", "rm", "tiny", "--yes").exit_code == 2


def test_a_gguf_is_quantised_and_what_cannot_be_is_one_line(run, home, tmp_path):
    model = write_gguf(tmp_path / "tiny.gguf", "gemma")
    out = tmp_path / "out"
    types = ("--quant", "q8_0", "--quant", "f16")
    done = run("export", "gguf", "--from", str(model), *types, "--out", str(out), "--threads", "1", "--json")
    assert done.exit_code == 0, done.stderr
    assert [made["file"] for made in json.loads(done.stdout)["files"]] == ["tiny-Q8_0.gguf", "tiny-F16.gguf"]
    again = run("export", "gguf", "--from", str(model), "--out", str(out))
    assert (again.exit_code, again.stdout) == (2, "") and "not empty" in again.stderr
    assert again.stderr.splitlines()[-1].startswith("Error: ")
