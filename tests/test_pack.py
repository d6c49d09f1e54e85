"""A pack is linear, survives a round trip, knows its base, and is refused when damaged."""

import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import packs

from edge_align.errors import ArtefactError, CorruptArtefact, EdgeAlignError, IncompatibleBase, UnsupportedVersion
from edge_align.pack import BaseSample, fit_kl_curve, kl_of_quadratic, load_pack, MANIFEST, save_pack, TENSORS


@pytest.fixture
def folder(tmp_path):
    save_pack(tmp_path / "pack", tensors=packs.tensors(), manifest=packs.manifest(), card="# A pack\n")
    return tmp_path / "pack"


@pytest.fixture
def pack(folder):
    return load_pack(folder)


def latents(n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, packs.K)).astype(np.float32)


def change(folder, **values) -> None:
    body = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(body | values))


def test_decoding_is_linear_and_nothing_decodes_to_nothing(pack):
    a, b = latents(2)
    together = pack.decode(2 * a - 3 * b).array
    np.testing.assert_allclose(together, 2 * pack.decode(a).array - 3 * pack.decode(b).array, rtol=1e-4, atol=1e-5)
    assert pack.decode(np.zeros(packs.K)).is_zero and not pack.decode(a).is_zero
    assert together.shape == (packs.LAYERS, packs.WIDTH) and not together[0].any()


def test_encoding_and_expecting_are_the_products_they_are_documented_as(pack):
    features, described = np.ones((2, packs.F), np.float32), np.full((2, packs.P), 2, np.float32)
    t = packs.tensors()
    np.testing.assert_allclose(pack.encode(features)[0], (1 - t["feature_mean"]) @ t["readout"], rtol=1e-3)
    with_offset = np.array([2, 2, 2, 2, 1])
    np.testing.assert_allclose(pack.expected(described)[0], with_offset @ t["baseline"], rtol=1e-3)
    np.testing.assert_allclose(pack.head_inputs(described)[1], with_offset @ t["prompt_projection"], rtol=1e-5)


def test_a_round_trip_keeps_every_number_and_the_files_are_private(folder):
    pack = load_pack(folder, base_hash=packs.BASE_HASH)
    for name, array in packs.tensors().items():
        np.testing.assert_array_equal(getattr(pack, name), array.astype(np.float32))
        assert not getattr(pack, name).flags.writeable
    assert (pack.k, pack.n_layer, pack.d_model, pack.base_hash) == (3, 4, 6, packs.BASE_HASH)
    assert (folder / "README.md").read_text() == "# A pack\n"
    assert [oct(path.stat().st_mode & 0o777) for path in folder.iterdir()] == ["0o600"] * 3
    save_pack(folder.parent / "again", tensors=packs.tensors(), manifest=packs.manifest())
    assert load_pack(folder.parent / "again").hash == pack.hash


def test_a_pack_of_another_base_is_refused_with_both_hashes(folder):
    with pytest.raises(IncompatibleBase, match=r"base sha256:aaaa.*not sha256:bbbb"):
        load_pack(folder, base_hash="sha256:" + "b" * 64)


def test_a_pack_of_a_newer_version_says_so(folder):
    change(folder, schema=99)
    with pytest.raises(UnsupportedVersion, match="schema 99"):
        load_pack(folder)


def test_every_mismatch_is_listed(folder):
    wrong = packs.tensors()
    wrong["metric"] = np.eye(2, dtype=np.float32)
    wrong["kl_curve"] = np.zeros(4, np.float32)
    wrong["surprise"] = np.zeros(1, np.float32)
    del wrong["variance"]
    save_pack(folder, tensors=wrong, manifest=packs.manifest())
    with pytest.raises(CorruptArtefact) as caught:
        load_pack(folder)
    assert all(name in str(caught.value) for name in ("metric", "kl_curve", "surprise", "variance"))
    assert "\n" not in str(caught.value)


def test_a_pack_that_steers_block_zero_is_refused(folder):
    wrong = packs.tensors()
    wrong["decoder"][0, 0, 0] = 1
    save_pack(folder, tensors=wrong, manifest=packs.manifest())
    with pytest.raises(CorruptArtefact, match="block 0"):
        load_pack(folder)


def test_tensors_of_another_pack_are_noticed(folder):
    save_pack(folder.parent / "other", tensors=packs.tensors(seed=1), manifest=packs.manifest())
    shutil.copy(folder.parent / "other" / TENSORS, folder / TENSORS)
    with pytest.raises(CorruptArtefact, match="not the file its manifest describes"):
        load_pack(folder)


def test_a_folder_without_a_manifest_is_named_as_no_pack(folder):
    (folder / MANIFEST).unlink()
    for where in (folder, folder / "nowhere"):
        with pytest.raises(CorruptArtefact, match="holds no latent pack"):
            load_pack(where)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damaged_tensors_are_always_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    save_pack(folder, tensors=packs.tensors(), manifest=packs.manifest())
    whole = bytearray((folder / TENSORS).read_bytes())
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        whole[place] ^= data.draw(st.integers(1, 255))
    else:
        del whole[place:]
    (folder / TENSORS).write_bytes(whole)
    with pytest.raises(ArtefactError):
        load_pack(folder)


def json_values(numbers):
    return st.recursive(
        st.none() | st.booleans() | st.integers(-(10**30), 10**30) | numbers | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    )


JSON = json_values(st.floats(allow_nan=False, allow_infinity=False))
NEARLY_JSON = json_values(st.floats())  # NaN and Infinity, which Python's json writes


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(["schema", "kind", "shapes", "n_layer", "d_model", "tensors_sha256", "readout"]), NEARLY_JSON)
def test_a_manifest_with_anything_in_it_raises_artefact_errors_only(tmp_path_factory, key, value):
    folder = tmp_path_factory.getbasetemp() / "odd"
    save_pack(folder, tensors=packs.tensors(), manifest=packs.manifest())
    body = json.loads((folder / MANIFEST).read_text())
    if key == "readout":
        body["shapes"]["readout"] = value
    else:
        body[key] = value
    (folder / MANIFEST).write_text(json.dumps(body))
    try:
        load_pack(folder)
    except ArtefactError as error:
        assert "\n" not in str(error)


def test_the_answers_of_the_base_come_along(folder, pack):
    assert pack.base_sample is None
    kept = {"base_answers": [[1, 2], [3]], "health": {"base_nll": 1.5, "base_collision": 0.01}}
    change(folder, **kept)
    assert load_pack(folder).base_sample == BaseSample(((1, 2), (3,)), 1.5, 0.01)
    for wrong in ({"base_answers": [[1], []]}, {"base_answers": [["a"]]}, {"health": {"base_nll": 1.5}}):
        change(folder, **kept | wrong)
        assert load_pack(folder).base_sample is None


@settings(max_examples=60, deadline=None)
@given(JSON, JSON, JSON)
def test_whatever_stands_in_their_place_is_no_error(tmp_path_factory, answers, nll, collision):
    folder = tmp_path_factory.getbasetemp() / "odd-sample"
    save_pack(folder, tensors=packs.tensors(), manifest=packs.manifest())
    change(folder, base_answers=answers, health={"base_nll": nll, "base_collision": collision})
    found = load_pack(folder).base_sample
    assert found is None or (all(found.answers) and found.nll > 0 and found.collision > 0)


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_a_missing_file_is_an_error_of_ours(folder, name):
    os.remove(folder / name)
    with pytest.raises(EdgeAlignError):
        load_pack(folder)


class TestTheCostInKL:
    def test_scale_for_inverts_mean_kl(self, pack):
        for n in (1, 5):
            for kl in (0.01, 0.3, 1.5):
                scale = pack.scale_for(latents(n), kl)
                assert pack.mean_kl(latents(n) * scale) == pytest.approx(kl, rel=1e-6)

    def test_nothing_costs_nothing_and_gets_no_scale(self, pack):
        nothing = np.zeros((2, packs.K), np.float32)
        assert pack.mean_kl(nothing) == 0.0
        assert pack.scale_for(nothing, 0.5) == 0.0 == pack.scale_for(latents(2), 0.0)

    def test_is_the_curve_of_the_quadratic_form(self, pack):
        z = latents(1)[0]
        q = sum(0.5 * z[i] * z[j] * pack.metric[i, j] for i in range(packs.K) for j in range(packs.K))
        x = np.log(q)
        assert pack.predicted_kl(z) == pytest.approx(np.exp(-0.1 + 0.95 * x - 0.03 * x * x), rel=1e-4)

    @given(
        st.floats(-2, 2),
        st.floats(0.2, 2),
        st.floats(-0.5, 0.5),
        st.floats(np.log(1e-6), np.log(1e4)),
        st.floats(0.01, 3),
    )
    def test_rises_with_the_quadratic_form_whatever_the_curve(self, c0, c1, c2, x, more):
        curve = np.array([c0, c1, c2], np.float32)
        here, beyond = kl_of_quadratic(np.exp(x), curve), kl_of_quadratic(np.exp(x + more), curve)
        assert np.isfinite(beyond) and here < beyond

    @given(st.floats(0.2, 2), st.floats(-0.5, 0.5).filter(lambda c: abs(c) > 0.01))
    def test_has_no_step_where_the_straight_line_takes_over(self, c1, c2):
        curve = np.array([0, c1, c2], np.float32)
        edge = -0.375 * c1 / c2
        if abs(edge) < 100:
            below, above = kl_of_quadratic(np.exp(edge - 1e-6), curve), kl_of_quadratic(np.exp(edge + 1e-6), curve)
            assert above == pytest.approx(below, rel=1e-4)

    def test_a_curve_is_found_again_from_points_on_it(self):
        q = np.geomspace(0.01, 3, 12)
        curve = np.array([-0.2, 0.9, -0.05])
        measured = np.exp(curve[0] + curve[1] * np.log(q) + curve[2] * np.log(q) ** 2)
        np.testing.assert_allclose(fit_kl_curve(q, measured), curve, atol=1e-5)
