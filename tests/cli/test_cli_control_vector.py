"""`profiles export|import --format gguf` and `export control-vector`: options, notes, documents, exit codes."""

import json

import numpy as np
import pytest

from edge_align.bases import find_base
from edge_align.profiles import ProfileStore
from edge_align.registry import find_pack


@pytest.fixture
def on_toy(toy_home, run):
    """Run with a home that has a pack and the profile `me` in use, which depends on the prompt."""
    base = find_base(home=toy_home)
    pack = find_pack(base, toy_home)
    inputs = pack.prompt_projection.shape[1]
    tensors = {
        "mean": np.ones(pack.k, np.float32),
        "scale": np.array([0.1], np.float32),
        "head_in": np.ones((1, inputs), np.float32),
        "head_out": np.ones((pack.k, 1), np.float32),
    }
    expected = {"base_hash": base.hash, "pack_hash": pack.hash, "n_layer": pack.n_layer, "d_model": pack.d_model}
    store = ProfileStore(toy_home)
    store.activate("me", store.save("me", tensors, expected | {"k": pack.k}).number)
    store.use("me")
    return lambda *args: run("--home", str(toy_home.root), *args)


def test_both_commands_write_the_same_file_and_say_what_it_is_not(on_toy, tmp_path):
    one = on_toy("profiles", "export", "me", str(tmp_path / "a.gguf"), "--format", "gguf", "--strength", "0.5")
    assert one.exit_code == 0, one.stderr
    assert "strength 0.5" in one.stdout
    assert "its mean over prompts" in one.stderr and "steers the prompt" in one.stderr
    other = on_toy("export", "control-vector", "--out", str(tmp_path / "b.gguf"), "--strength", "0.5", "--json")
    document = json.loads(other.stdout)
    assert document["mean_over_prompts"] and document["strength"] == 0.5 and document["predicted_kl"] > 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_gguf_is_known_by_its_first_bytes_and_imported(on_toy, tmp_path):
    file = tmp_path / "friend.gguf"
    on_toy("profiles", "export", "me", str(file), "--format", "gguf")
    done = on_toy("profiles", "import", str(file), "--threads", "1", "--json")
    document = json.loads(done.stdout)
    assert (document["name"], document["version"], document["activated"]) == ("friend", 1, True)
    assert document["scale"] <= 1.0 and document["predicted_kl"] <= document["kl_budget"] * 1.02
    shifted = on_toy("profiles", "import", str(file), "far", "--shift", "40")
    assert (shifted.exit_code, shifted.stdout) == (2, "") and "shift" in shifted.stderr
    wrong = on_toy("profiles", "import", str(file), "far", "--format", "edge-align")
    assert wrong.exit_code == 2 and wrong.stderr.count("\n") == 1


def test_options_of_the_other_format_are_refused(on_toy, tmp_path):
    for more in (("--strength", "2"), ("--model", "smollm2-135m-instruct")):
        done = on_toy("profiles", "export", "me", str(tmp_path / "x"), *more)
        assert done.exit_code == 2 and "--format gguf" in done.stderr
    assert on_toy("profiles", "export", "me", str(tmp_path / "x"), "--format", "gguf", "--strength", "9").exit_code == 2
    assert not (tmp_path / "x").exists()
