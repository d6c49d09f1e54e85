"""Building a pack on the real base, tiny: what comes out, that a stopped run goes on, what is refused."""

import json

import numpy as np
import pytest

from edge_align.bases import find_base
from edge_align.errors import InputError
from edge_align.home import Home
from edge_align.pack import load_pack, MANIFEST
from edge_align_export.linear import LinearConfig
from edge_align_export.pack import build_pack, steered_layers

STAGES = ["sample", "solve", "metric", "KL curve", "health", "closed loop"]


@pytest.fixture
def folder(built):
    (folder,) = built[0].packs_dir.iterdir()
    return folder


def test_the_pack_fits_its_base_and_is_what_its_manifest_says(built, folder):
    base = find_base(home=built[0])
    pack = load_pack(folder, base_hash=base.hash)
    assert (pack.n_layer, pack.d_model) == (30, 576) and pack.readout.shape == (3 * 576 + 1, pack.k)
    steered = np.flatnonzero(pack.decoder.any((0, 2)))
    assert steered.tolist() == list(range(8, 22)) == list(steered_layers(base, LinearConfig()))
    assert np.linalg.eigvalsh(pack.metric).min() > -1e-6 and (pack.variance >= 0.05).all()
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["layers"] == [8, 21] and manifest["recipe"] == "linear"
    assert manifest["health"].keys() >= {"r2", "kl_factor_median", "kl_factor_worst", "loop_gain", "loop_cosine"}
    assert all(np.isfinite(value) for value in manifest["health"].values())
    assert folder.name.startswith("smollm2-135m-instruct-") and f"`{base.hash}`" in (folder / "README.md").read_text()


def test_few_answers_carry_few_latents_and_every_number_of_them_agrees(built, folder):
    """At most one latent per four answers."""
    _, report, _, _ = built
    pack, manifest = load_pack(folder), json.loads((folder / MANIFEST).read_text())
    assert pack.k == report["answers"] // 4 < 12
    assert report["k"] == manifest["k"] == pack.k
    assert f"to {pack.k} latents" in (folder / "README.md").read_text()


def test_the_report_and_the_progress_name_every_stage_in_order(built, folder):
    _, report, told, _ = built
    assert list(dict.fromkeys(stage for stage, _ in told)) == STAGES == list(report["seconds"])
    for stage in STAGES:
        done = [part for name, part in told if name == stage]
        assert done[0] == 0.0 and done[-1] == 1.0 and done == sorted(done)
    assert report["bytes"] == sum(path.stat().st_size for path in folder.iterdir())


def test_a_stopped_run_goes_on_from_what_it_kept(built):
    """What is whole is taken from the disk; the prompts whose activations were damaged are sampled again."""
    home, report, _, kept = built
    now = {path.name: path.stat().st_mtime_ns for path in home.cache_dir.glob("pack-*/answers-*")}
    assert (
        set(now) == set(kept) == {f"answers-{start}.{kind}" for start in ("00000", "00016") for kind in ("json", "npz")}
    )
    assert [name for name in sorted(now) if now[name] != kept[name]] == ["answers-00016.json", "answers-00016.npz"]
    assert report["answers"] == 40


def test_unknown_recipes_and_sizes_are_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match="there is: linear"):
        build_pack(home=Home(tmp_path / "home"), model=None, recipe="magic")
    assert not (tmp_path / "home").exists()
    for wrong in ({"k": 1}, {"prompts": 2}, {"answers": 1}):
        with pytest.raises(InputError):
            LinearConfig(**wrong)
