import io
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edge_align.archive import pack_members
from edge_align.errors import (
    CorruptArtefact,
    EdgeAlignError,
    IncompatibleBase,
    InputError,
    StorageError,
    UnsupportedVersion,
)
from edge_align.files import canonical_json
from edge_align.home import Home
from edge_align.profiles import ProfileStore

MANIFEST = {"base_hash": "sha256:" + "a" * 64, "n_layer": 30, "d_model": 576, "k": 4, "pack_hash": "sha256:" + "b" * 64}


def tensors(number: int) -> dict[str, np.ndarray]:
    return {"mu": np.full(4, number, np.float32), "head": np.arange(6, dtype=np.float16).reshape(2, 3)}


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


@pytest.fixture
def store(home):
    return ProfileStore(home)


def keep(store: ProfileStore, name: str, count: int, *, activate: bool = True) -> None:
    for _ in range(count):
        version = store.save(name, tensors(len(store.versions(name)) + 1 if name in store.names() else 1), MANIFEST)
        if activate:
            store.activate(name, version.number)


def version_folder(home: Home, name: str, number: int) -> Path:
    return home.profiles_dir / name / f"v{number:04d}"


def test_a_saved_version_comes_back_as_it_was(store):
    version = store.save("alice", tensors(1), {**MANIFEST, "note": "é", "report": {"p": 0.01}})
    assert (version.number, version.active, version.profile) == (1, False, "alice")
    back, manifest = store.load("alice", 1, expect=MANIFEST)
    assert back.keys() == {"mu", "head"}
    for name, array in tensors(1).items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].dtype == array.dtype and not back[name].flags.writeable
    assert manifest == version.manifest
    assert manifest["report"] == {"p": 0.01} and manifest["note"] == "é" and manifest["k"] == 4
    assert manifest["schema"] == 1 and manifest["created"].endswith("+00:00")
    assert manifest["tensors"] == {"mu": ["float32", [4]], "head": ["float16", [2, 3]]}


def test_the_size_of_a_version_is_what_lies_on_the_disk(store, home):
    version = store.save("alice", tensors(1), MANIFEST)
    files = [*version_folder(home, "alice", 1).iterdir()]
    assert sorted(path.name for path in files) == ["encoder.safetensors", "manifest.json"]
    assert store.size_bytes("alice", 1) == version.size_bytes == sum(path.stat().st_size for path in files) < 1500


def test_activation_and_undo_walk_the_versions(store):
    keep(store, "p", 2, activate=False)
    assert store.active_version("p") is None
    with pytest.raises(InputError, match="no active version"):
        store.load("p")
    with pytest.raises(InputError, match="no active version"):
        store.load_usable("p")
    with pytest.raises(InputError, match="no earlier version"):
        store.undo("p")
    store.activate("p", 2)
    store.activate("p", 1)
    store.activate("p", 1)
    assert store.active_version("p") == 1
    assert store.load("p")[0]["mu"][0] == 1
    assert store.undo("p") == 2 == store.active_version("p")
    assert [version.active for version in store.history("p")] == [False, True]
    with pytest.raises(InputError, match="no earlier version"):
        store.undo("p")
    assert store.active_version("p") == 2


def test_a_retired_profile_has_no_active_version_until_undo_or_a_new_one(store):
    keep(store, "p", 2, activate=False)
    store.retire("p")  # nothing to retire
    store.activate("p", 1)
    store.retire("p")
    store.retire("p")
    assert store.active_version("p") is None and [version.active for version in store.history("p")] == [False, False]
    assert store.list()[0].active is None
    for call in (store.load, store.load_usable):
        with pytest.raises(InputError, match="no active version"):
            call("p")
    assert store.undo("p") == 1 == store.active_version("p")
    store.retire("p")
    store.activate("p", 2)
    assert store.load_usable("p").version == 2
    assert store.undo("p") == 1 == store.load_usable("p").version  # passes over the time without one


def test_unknown_profiles_and_versions_are_named_with_what_there_is(store):
    with pytest.raises(InputError, match="unknown profile bob; .*personalize"):
        store.load("bob")
    keep(store, "alice", 2)
    with pytest.raises(InputError, match="unknown profile bob; there is alice"):
        store.activate("bob", 1)
    with pytest.raises(InputError, match="no version 7; there is 1, 2"):
        store.load("alice", 7)
    for call in (store.use, store.remove, store.versions, store.history, store.undo):
        with pytest.raises(InputError, match="unknown profile bob"):
            call("bob")
    for name in ("../alice", "", "con", "a\n"):
        with pytest.raises(InputError, match="not allowed"):
            store.load(name)
        with pytest.raises(InputError, match="not allowed"):
            store.save(name, tensors(1), MANIFEST)


def test_a_profile_of_another_base_lists_every_mismatch(store):
    keep(store, "p", 1)
    expect = {"base_hash": "sha256:" + "c" * 64, "n_layer": 32, "d_model": 576, "k": 8, "vocabulary": 5}
    with pytest.raises(IncompatibleBase) as caught:
        store.load("p", expect=expect)
    message = str(caught.value)
    for words in ("base_hash is 'sha256:aaa", "here 'sha256:ccc", "n_layer is 30, here 32", "k is 4, here 8"):
        assert words in message
    assert "vocabulary is None, here 5" in message and "d_model" not in message and "\n" not in message
    with pytest.raises(IncompatibleBase):  # never passed over
        keep(store, "p", 1)
        store.load_usable("p", expect=expect)


def flip(path: Path, at: int) -> None:
    body = bytearray(path.read_bytes())
    body[at] ^= 1
    path.write_bytes(body)


def test_a_damaged_active_version_falls_back_to_the_one_active_before_and_says_so(store, home):
    keep(store, "p", 2)
    keep(store, "p", 1, activate=False)  # refused: not a fallback
    store.activate("p", 3)
    store.undo("p")
    flip(version_folder(home, "p", 2) / "encoder.safetensors", -1)
    with pytest.raises(CorruptArtefact, match="v0002 is damaged"):
        store.load("p")
    usable = store.load_usable("p", expect=MANIFEST)
    assert usable.version == 1 and usable.tensors["mu"][0] == 1
    assert usable.reason is not None and "v0002 is damaged" in usable.reason and "version 1 is used" in usable.reason
    assert [version.damage is None for version in store.history("p")] == [True, False, True]
    with pytest.raises(CorruptArtefact):
        store.activate("p", 2)
    flip(version_folder(home, "p", 1) / "manifest.json", 5)
    with pytest.raises(CorruptArtefact, match="no earlier version of profile p opens"):
        store.load_usable("p")


def test_a_sound_active_version_is_used_without_a_reason(store):
    keep(store, "p", 2)
    usable = store.load_usable("p")
    assert (usable.version, usable.reason) == (2, None)


def test_undo_passes_over_damaged_versions(store, home):
    keep(store, "p", 3)
    shutil.rmtree(version_folder(home, "p", 2))
    assert store.undo("p") == 1


def test_a_damaged_record_of_activations_is_repaired_by_undo_or_a_new_activation(store, home):
    keep(store, "p", 2)
    record = home.profiles_dir / "p" / "active.json"
    damaged = [b"", b"{}", b'{"schema":1,"activated":[-1]}', b'{"schema":1,"activated":[true]}', b"\xff", b"[]"]
    for body in damaged:
        record.write_bytes(body)
        for call in (store.active_version, store.load, store.load_usable):
            with pytest.raises(CorruptArtefact):
                call("p")
        assert store.list()[0].damage is not None
        assert store.undo("p") == 2 == store.load_usable("p").version
        record.write_bytes(body)
        store.activate("p", 1)
        assert store.active_version("p") == 1
    record.write_bytes(b'{"schema":2}')
    with pytest.raises(UnsupportedVersion, match="upgrade"):
        store.load("p")


def test_any_flipped_byte_or_cut_is_noticed(store, home):
    keep(store, "p", 1)
    rng = random.Random(0)
    for name in ("manifest.json", "encoder.safetensors"):
        path = version_folder(home, "p", 1) / name
        intact = path.read_bytes()
        for trial in range(150):
            body = bytearray(intact)
            if trial % 5 == 0:
                body = body[: rng.randrange(len(body))]
            else:
                body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
            path.write_bytes(body)
            with pytest.raises((CorruptArtefact, UnsupportedVersion)) as caught:
                store.load("p")
            assert "\n" not in str(caught.value) and "v0001" in str(caught.value)
        path.write_bytes(intact + b"x")
        with pytest.raises(CorruptArtefact):
            store.load("p")
        path.unlink()
        with pytest.raises(CorruptArtefact, match="missing"):
            store.load("p")
        path.mkdir()
        with pytest.raises(CorruptArtefact, match="regular"):
            store.load("p")
        path.rmdir()
        path.write_bytes(intact)
    assert store.load("p")[0]["mu"][0] == 1


def test_a_manifest_of_a_newer_schema_asks_for_an_upgrade(store, home):
    keep(store, "p", 1)
    (version_folder(home, "p", 1) / "manifest.json").write_bytes(canonical_json({"schema": 2}))
    with pytest.raises(UnsupportedVersion, match="upgrade"):
        store.load("p")


def test_an_incomplete_version_is_ignored_and_its_number_is_not_used_again(store, home):
    keep(store, "p", 1)
    broken = version_folder(home, "p", 2)
    broken.mkdir()
    (broken / "encoder.safetensors").write_bytes(b"half")
    assert store.versions("p") == (1,) and [v.number for v in store.history("p")] == [1]
    with pytest.raises(InputError, match="no version 2"):
        store.activate("p", 2)
    assert store.save("p", tensors(3), MANIFEST).number == 3
    assert [*broken.iterdir()] == [broken / "encoder.safetensors"]


def test_values_that_cannot_be_kept_are_refused_before_anything_is_written(store, home):
    for bad in ({"mu": np.array([np.nan])}, {"mu": np.zeros(5 * 2**20, np.float32)}):
        with pytest.raises(InputError):
            store.save("p", bad, MANIFEST)
    for manifest in ({"x": float("nan")}, {"x": object()}, {"x": "\ud800"}):
        with pytest.raises(InputError):
            store.save("p", tensors(1), manifest)
    assert not home.root.exists()


def test_names_that_differ_only_in_case_are_refused(store):
    keep(store, "Alice", 1)
    keep(store, "bob", 1)
    with pytest.raises(InputError, match="there is a profile Alice"):
        store.save("alice", tensors(1), MANIFEST)
    with pytest.raises(InputError, match="there is a profile Alice"):
        store.rename("bob", "aLICE")


def test_the_profile_in_use_follows_rename_and_goes_with_remove(store, home):
    assert store.current() is None
    keep(store, "a", 2)
    keep(store, "b", 1)
    store.use("a")
    assert store.current() == "a"
    with pytest.raises(InputError, match="already"):
        store.rename("a", "b")
    store.rename("a", "c")
    assert store.current() == "c" and store.names() == ("b", "c") and store.active_version("c") == 2
    store.remove("b")
    assert store.current() == "c"
    store.remove("c")
    assert store.current() is None and store.names() == ()
    assert [*home.profiles_dir.iterdir()] == []
    keep(store, "c", 1)
    assert store.current() is None
    store.use("c")
    store.use(None)
    assert store.current() is None


@pytest.mark.parametrize("body", [b"", b"{}", b'{"schema":1,"profile":3}', b"\0" * 20])
def test_a_damaged_state_file_is_mended_by_a_new_choice(store, home, body):
    keep(store, "p", 1)
    home.state_file.write_bytes(body)
    with pytest.raises(CorruptArtefact, match="state.json"):
        store.current()
    assert [summary.name for summary in store.list()] == ["p"]
    store.use("p")
    assert store.current() == "p"


def test_a_list_says_what_there_is(store):
    keep(store, "a", 2)
    keep(store, "b", 1, activate=False)
    store.use("a")
    a, b = store.list()
    assert (a.name, a.active, a.versions, a.current, b.name, b.active, b.current) == ("a", 2, 2, True, "b", None, False)
    assert a.size_bytes == store.size_bytes("a", 1) + store.size_bytes("a", 2)


def test_reading_a_home_that_is_not_there_creates_nothing(store, home):
    assert store.names() == () and store.list() == () and store.current() is None
    for call in (store.load_usable, store.undo, store.use, store.remove, lambda name: store.activate(name, 1)):
        with pytest.raises(InputError, match="unknown profile"):
            call("default")
    assert not home.root.exists()


def test_folders_that_are_no_profiles_do_not_disturb_the_list(store, home):
    keep(store, "p", 1)
    for name in (".removed-1", "my notes", "a..b"):
        (home.profiles_dir / name).mkdir()
    (home.profiles_dir / "file").write_text("x")
    assert store.names() == ("p",) and [summary.name for summary in store.list()] == ["p"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_everything_is_private_under_an_open_umask(store, home):
    before = os.umask(0)
    try:
        keep(store, "p", 1)
        store.use("p")
        store.export("p", None, home.root.parent / "p.zip")
    finally:
        os.umask(before)
    found = [home.root, home.root.parent / "p.zip", *home.root.rglob("*")]
    assert len(found) > 8
    for path in found:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_links_in_place_of_a_profile_a_version_or_a_file_are_refused(store, home, tmp_path):
    keep(store, "real", 1)
    (home.profiles_dir / "link").symlink_to(home.profiles_dir / "real")
    for call in (store.load, store.load_usable, store.versions, store.remove, store.undo):
        with pytest.raises(StorageError, match="symbolic link"):
            call("link")
    with pytest.raises(StorageError, match="symbolic link"):
        store.save("link", tensors(1), MANIFEST)
    assert store.names() == ("real",)
    assert store.has("real")
    assert not any(store.has(entry.name) for entry in store._home.profiles_dir.iterdir() if entry.name != "real")
    assert not any(store.has(name) for name in ("", ".", "..", "real/..", "unreal", "a\0b"))
    folder = version_folder(home, "real", 1)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="symbolic link"):
        store.load("real")
    folder.unlink()
    (tmp_path / "elsewhere").rename(folder)
    (folder / "manifest.json").rename(tmp_path / "manifest.json")
    (folder / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(StorageError, match="symbolic link"):
        store.load("real")


def test_an_exported_version_comes_back_whole_and_not_active(store, tmp_path):
    keep(store, "p", 2)
    store.export("p", None, tmp_path / "p.zip")
    store.export("p", 2, tmp_path / "again.zip")
    assert (tmp_path / "p.zip").read_bytes() == (tmp_path / "again.zip").read_bytes()
    with pytest.raises(InputError, match="exists"):
        store.export("p", 1, tmp_path / "p.zip")
    store.export("p", 1, tmp_path / "again.zip", overwrite=True)
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == ["encoder.safetensors", "manifest.json"]
        assert json.loads(archive.read("manifest.json"))["k"] == 4
    assert store.import_(tmp_path / "p.zip", "q").number == 1
    assert store.active_version("q") is None
    assert store.load("q", 1)[1] == store.load("p", 2)[1]
    assert store.import_(tmp_path / "p.zip", "p").number == 3


def zip_of(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def test_archives_that_were_not_exported_here_are_refused(store, home, tmp_path):
    keep(store, "p", 1)
    folder = version_folder(home, "p", 1)
    manifest, data = (folder / "manifest.json").read_bytes(), (folder / "encoder.safetensors").read_bytes()
    good = [("manifest.json", manifest), ("encoder.safetensors", data)]
    bad = {
        "empty": b"",
        "no zip": b"PK" * 100,
        "one member": zip_of(good[:1]),
        "a third member": zip_of([*good, ("x", b"")]),
        "a path": zip_of([good[0], ("../encoder.safetensors", data)]),
        "compressed": zip_of(good, zipfile.ZIP_DEFLATED),
        "a bomb": zip_of([good[0], ("encoder.safetensors", bytes(40 * 2**20))], zipfile.ZIP_DEFLATED),
        "other tensors": zip_of([good[0], ("encoder.safetensors", data[:-1] + b"\x01")]),
        "other manifest": zip_of([("manifest.json", manifest.replace(b'"k":4', b'"k":5')), good[1]]),
        "too large": bytes(49 * 2**20),
    }
    with pytest.warns(UserWarning, match="Duplicate"):
        bad["twice the same"] = zip_of([*good, good[1]])
    path = tmp_path / "x.zip"
    for what, body in bad.items():
        path.write_bytes(body)
        with pytest.raises(CorruptArtefact) as caught:
            store.import_(path, "q")
        assert str(path) in str(caught.value) and "\n" not in str(caught.value), what
    path.write_bytes(zip_of(good))
    assert store.import_(path, "q").number == 1
    with pytest.raises(InputError, match="does not exist"):
        store.import_(tmp_path / "none.zip", "q")
    with pytest.raises(EdgeAlignError):
        store.import_(tmp_path, "q")


def test_a_damaged_archive_raises_our_error_or_is_the_same_profile(store, tmp_path):
    keep(store, "p", 1)
    path = tmp_path / "p.zip"
    store.export("p", 1, path)
    intact, expected = path.read_bytes(), store.load("p", 1)[1]
    rng = random.Random(1)
    refused = 0
    for _ in range(200):
        body = bytearray(intact)
        body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        path.write_bytes(body)
        try:
            number = store.import_(path, "q").number
        except EdgeAlignError as error:
            refused += 1
            assert isinstance(error, CorruptArtefact)
        else:
            assert store.load("q", number)[1] == expected
    assert refused > 150


def test_the_archive_format_has_no_clock_in_it():
    assert pack_members({"a": b"1"}) == pack_members({"a": b"1"})
    with zipfile.ZipFile(io.BytesIO(pack_members({"a": b"1"}))) as archive:
        assert archive.infolist()[0].date_time == (1980, 1, 1, 0, 0, 0)


@pytest.mark.skipif(os.name != "posix", reason="RLIMIT_FSIZE")
def test_a_full_disk_is_a_storage_error_and_the_active_version_stays(store, home):
    keep(store, "p", 1)
    code = """
import resource, sys
from pathlib import Path
import numpy as np
from edge_align.errors import StorageError
from edge_align.home import Home
from edge_align.profiles import ProfileStore
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
store = ProfileStore(Home(Path(sys.argv[1])))
for tensors, manifest in (({"mu": np.zeros(1000)}, {}), ({"mu": np.zeros(2)}, {"note": "x" * 3000})):
    try: store.save("p", tensors, manifest)
    except StorageError as error: print(error)
"""
    run = subprocess.run([sys.executable, "-c", code, home.root], capture_output=True, text=True, check=True)
    assert run.stdout.count("ulimit -f") == 2 == run.stdout.count("\n")
    assert store.versions("p") == (1,) and store.load_usable("p").reason is None
    assert sorted(path.name for path in (home.profiles_dir / "p").iterdir()) == ["active.json", "v0001"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc cannot be written to by anyone")
def test_a_home_that_cannot_be_written_is_a_storage_error():
    store = ProfileStore(Home(Path("/proc/edge-align")))
    with pytest.raises(StorageError, match="/proc/edge-align"):
        store.save("p", tensors(1), MANIFEST)
    assert store.names() == ()
