"""Packs are found by the base they were made for."""

import json
import shutil
from pathlib import Path

import pytest
from reference import packs

from edge_align.bases import BaseModel, find_base
from edge_align.errors import PackMissing
from edge_align.home import Home
from edge_align.pack import MANIFEST, save_pack, TENSORS
from edge_align.registry import describe_pack, estimate_minutes, find_pack, known_models, pack_folders, shipped_packs


@pytest.fixture
def base(base_path) -> BaseModel:
    base = find_base()
    base.__dict__["hash"] = packs.BASE_HASH  # stands in for hashing the file
    return base


@pytest.fixture
def home(tmp_path, monkeypatch) -> Home:
    monkeypatch.setattr("edge_align.registry.shipped_packs", lambda: tmp_path / "shipped")
    return Home(tmp_path / "home")


def put(folder: Path, seed: int = 0, **manifest: object) -> Path:
    save_pack(folder, tensors=packs.tensors(seed), manifest=packs.manifest() | manifest)
    return folder


def test_a_pack_is_found_by_its_base_wherever_it_lies_the_persons_own_first(base, home, tmp_path):
    with pytest.raises(PackMissing, match=r"edge-align export pack --model .* \(up to about \d+ minutes"):
        find_pack(base, home)
    put(tmp_path / "shipped" / "any-name", seed=1)
    put(home.packs_dir / "other", base_hash="sha256:other")
    assert find_pack(base, home).readout.tolist() == packs.tensors(1)["readout"].tolist()
    put(home.packs_dir / "zz-own", seed=2)
    assert find_pack(base, home).readout.tolist() == packs.tensors(2)["readout"].tolist()


def test_a_damaged_pack_of_some_base_hides_no_good_one(base, home, tmp_path):
    broken = put(home.packs_dir / "aa-broken")
    (broken / MANIFEST).write_text("{")
    (home.packs_dir / "unfinished").mkdir()
    (home.packs_dir / "unfinished" / TENSORS).write_bytes(b"half")  # the manifest comes last: not there, no pack
    good = put(home.packs_dir / "good")
    assert list(pack_folders(home)) == [broken, good]
    assert find_pack(base, home).k == packs.K


def test_the_packs_that_ship_lie_beside_the_package():
    assert shipped_packs().name in ("models", "_models") and shipped_packs().is_dir()


def test_a_description_is_what_the_manifest_says_and_the_size_on_disk(home):
    folder = put(home.packs_dir / "own", recipe="linear", health={"r2": 0.5})
    described = describe_pack(folder)
    assert described == {
        "folder": str(folder),
        "k": packs.K,
        "recipe": "linear",
        "size_bytes": len((folder / MANIFEST).read_bytes()) + len((folder / TENSORS).read_bytes()),
        "health": {"r2": 0.5},
    }
    json.dumps(described)


def test_known_models_are_listed_with_and_without_a_pack(built, home):
    (bare,) = known_models(home)
    assert bare["id"] == "smollm2-135m-instruct" and "export pack" in bare["error"] and bare["pack"] is None
    shutil.copytree(built[0].packs_dir, home.packs_dir)
    (full,) = known_models(home)
    assert "error" not in full and full["pack"]["size_bytes"] > 100_000 and full["hash"].startswith("sha256:")


def test_the_estimate_grows_with_the_file(base, tmp_path):
    small = tmp_path / "small.gguf"
    small.write_bytes(b"x" * 1000)
    assert estimate_minutes(BaseModel("small", small, base.header)) == 1.0
    assert estimate_minutes(base) > 5
