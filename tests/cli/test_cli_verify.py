"""`export verify` as a command."""

import json

from scripts.tiny_models import write_gguf


def test_a_table_is_printed_and_the_exit_code_is_one_where_something_differs(run, home, tmp_path):
    (tmp_path / "dist").mkdir()
    write_gguf(tmp_path / "dist" / "tiny.gguf", "llama")
    other = write_gguf(tmp_path / "other.gguf", "llama", seed=5)
    options = ("--answers", "2", "--tokens", "12", "--threads", "1")
    fine = run("export", "verify", str(tmp_path / "dist"), *options)
    assert fine.stdout.splitlines()[0].split()[:3] == ["artefact", "engine", "vectors"]
    assert fine.stdout.count("tiny.gguf  llama.cpp") == 2
    assert "Reference: tiny.gguf in PyTorch float32." in fine.stderr
    wrong = run("export", "verify", str(tmp_path / "dist"), "--reference", str(other), *options, "--json")
    assert wrong.exit_code == 1 and json.loads(wrong.stdout)["ok"] is False
    assert wrong.stderr.splitlines()[-1].startswith("Error: ")
