"""Control vectors: written as llama.cpp reads them, read whatever llama.cpp would read and nothing else."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import naive_control_vector as naive

from edge_align.control_vector import read_control_vector, write_control_vector
from edge_align.errors import CorruptArtefact, InputError
from edge_align.records import SteeringVectors

LAYERS, WIDTH = 5, 6


def random(seed: int = 0) -> SteeringVectors:
    array = np.random.default_rng(seed).normal(size=(LAYERS, WIDTH))
    array[0] = 0
    array[3] = 0  # a block that is not steered
    return SteeringVectors(array)


def test_the_buffer_that_llama_cpp_would_load_is_the_rows_from_block_one_on(tmp_path):
    path, vectors = tmp_path / "v.gguf", random()
    write_control_vector(
        path, vectors, architecture="llama", facts={"strength": 0.5, "scale": 2, "base": "b", "on": True}
    )
    n_embd, data = naive.load(path)
    assert n_embd == WIDTH and data.tobytes() == vectors.array[1:].tobytes()
    assert naive.load(path, strength=2.0)[1].tolist() == (2 * vectors.array[1:]).ravel().tolist()
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["v.gguf"]


def test_what_was_written_is_read_back_with_its_facts(tmp_path):
    path, vectors = tmp_path / "v.gguf", random()
    facts = {"strength": 0.5, "scale": 2, "base": "b", "on": True}
    write_control_vector(path, vectors, architecture="qwen2", facts=facts)
    back = read_control_vector(path, n_layer=LAYERS, d_model=WIDTH)
    assert back.vectors.array.tobytes() == vectors.array.tobytes()
    assert (back.model_hint, back.facts, back.dropped) == ("qwen2", facts, ())


def test_a_file_of_repeng_is_read_spellings_of_one_block_added_up(tmp_path):
    a, b = np.full(WIDTH, 1.5, np.float32), np.full(WIDTH, 0.25, np.float32)
    path = naive.write(tmp_path / "r.gguf", {"1": a, "01": b, "4": b}, model_hint="mistral")
    found = read_control_vector(path, n_layer=LAYERS, d_model=WIDTH)
    assert found.vectors.array[:, 0].tolist() == [0, 1.75, 0, 0, 0.25]
    assert found.vectors.array[1:].ravel().tolist() == naive.load(path)[1].tolist()
    assert found.model_hint == "mistral"


def test_a_shift_puts_the_files_of_cvector_generator_right(tmp_path):
    rows = {str(layer + 1): np.full(WIDTH, layer, np.float32) for layer in range(LAYERS)}  # after block i as i + 1
    path = naive.write(tmp_path / "g.gguf", rows)
    found = read_control_vector(path, n_layer=LAYERS, d_model=WIDTH, shift=-1)
    assert found.vectors.array[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert found.dropped == (1,)
    with pytest.raises(CorruptArtefact, match="direction.5 would go to block 5, the base's last is 4"):
        read_control_vector(path, n_layer=LAYERS, d_model=WIDTH)
    with pytest.raises(InputError, match="shift"):
        read_control_vector(path, n_layer=LAYERS, d_model=WIDTH, shift=9)


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path):
    ok = np.ones(WIDTH, np.float32)
    rows = {"0": ok, "x": ok, "1": ok[:3], "2": ok.astype(np.float16), "3": ok * np.nan, "4": ok[None] * ok[:, None]}
    path = naive.write(tmp_path / "b.gguf", rows)
    with pytest.raises(CorruptArtefact) as caught:
        read_control_vector(path, n_layer=LAYERS, d_model=WIDTH)
    message = str(caught.value)
    for part in (
        "direction.0",
        "direction.x",
        "width 3",
        "direction.2 is not",
        "direction.3 holds NaN",
        "direction.4 is",
    ):
        assert part in message, part
    assert "\n" not in message


def test_a_file_that_steers_nothing_or_is_none_is_refused(tmp_path, base_path):
    zero = naive.write(tmp_path / "z.gguf", {"1": np.zeros(WIDTH, np.float32)})
    with pytest.raises(CorruptArtefact, match="steers no block"):
        read_control_vector(zero, n_layer=LAYERS, d_model=WIDTH)
    with pytest.raises(CorruptArtefact, match="is no direction.N"):  # a model is a GGUF too
        read_control_vector(base_path, n_layer=30, d_model=576)
    with pytest.raises(InputError, match="does not exist"):
        read_control_vector(tmp_path / "none.gguf", n_layer=LAYERS, d_model=WIDTH)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 2000), value=st.integers(0, 255), cut=st.integers(0, 400))
def test_damage_anywhere_is_our_error_or_other_numbers(tmp_path_factory, place, value, cut):
    path = tmp_path_factory.mktemp("d") / "v.gguf"
    write_control_vector(path, random(), architecture="llama", facts={"scale": 1.5})
    data = bytearray(path.read_bytes())
    data[place % len(data)] = value
    path.write_bytes(data[: len(data) - cut])
    try:
        found = read_control_vector(path, n_layer=LAYERS, d_model=WIDTH)
    except CorruptArtefact:
        return
    assert found.vectors.array.shape == (LAYERS, WIDTH) and np.isfinite(found.vectors.array).all()


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "v.gguf"
    write_control_vector(path, random(), architecture="llama", facts={})
    before = path.read_bytes()

    def stop(_self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", stop)
    with pytest.raises(KeyboardInterrupt):
        write_control_vector(path, random(1), architecture="llama", facts={})
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["v.gguf"]
