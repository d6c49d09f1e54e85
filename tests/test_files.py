import errno
import hashlib
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_align import files
from edge_align.errors import CorruptArtefact, EdgeAlignError, InputError, StorageError
from edge_align.files import (
    cached_hash,
    canonical_json,
    check_name,
    load_json_object,
    make_private_dir,
    read_file,
    sha256_file,
    storage_errors,
    write_atomic,
    write_json,
)
from edge_align.home import Home
from edge_align.tensors import dump_tensors, load_tensors, parse_tensors, save_tensors

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions and links")


@pytest.fixture
def open_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("name", ["a", "default", "Alice-2_b.c", "0", "x" * 64, "console", "com10"])
def test_usual_names_are_allowed(name):
    assert check_name("profile", name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a..b", "a.", ".a", "-a", "a/b", "a\\b", "a\n", "a b", "é", "x" * 65, "\ud800", "a\0"]
    + ["con", "NUL", "Aux.txt", "com1", "LPT9.x.y"],
)
def test_names_that_could_leave_the_folder_or_fail_on_some_system_are_refused(name):
    with pytest.raises(InputError, match="profile name") as caught:
        check_name("profile", name)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


@posix
def test_files_are_0600_and_folders_0700_under_an_open_umask(tmp_path, open_umask):
    folder = make_private_dir(tmp_path / "a" / "b")
    write_atomic(folder / "f", b"1")
    with Home(tmp_path / "home").lock("p"):
        pass
    assert {mode(tmp_path / "a"), mode(folder), mode(tmp_path / "home"), mode(tmp_path / "home" / "locks")} == {0o700}
    assert {mode(folder / "f"), mode(tmp_path / "home" / "locks" / "profile-p.lock")} == {0o600}


def test_a_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "f"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [*tmp_path.iterdir()] == [path]


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "f"
    write_atomic(path, b"old")
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from edge_align.errors import StorageError; from edge_align.files import write_atomic\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_atomic(Path(sys.argv[1]), b'n' * 5000)\n"
        "except StorageError as error: sys.stdout.write(str(error))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(str(path)) and "ulimit -f" in run.stdout and "\n" not in run.stdout
    assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "--home"),
        (errno.EPERM, "--home"),
        (errno.EFBIG, "ulimit"),
        (errno.EXDEV, os.strerror(errno.EXDEV)),
    ],
)
def test_a_refusal_of_the_disk_names_the_path_and_the_remedy_in_one_line(number, words):
    with pytest.raises(StorageError) as caught:
        with storage_errors(Path("/some/pl\nace")):
            raise OSError(number, os.strerror(number))
    assert words in str(caught.value)
    assert "pl\\nace" in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_where_a_folder_should_be_is_a_storage_error(tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(StorageError, match="not a folder"):
        make_private_dir(tmp_path / "f" / "g")
    with pytest.raises(StorageError, match="not a folder"):
        make_private_dir(tmp_path / "f")
    with pytest.raises(InputError, match="not a folder"):
        Home.find(str(tmp_path / "f"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc cannot be written to by anyone")
def test_a_home_that_cannot_be_made_is_a_storage_error():
    with pytest.raises(StorageError, match="/proc/edge-align"):
        with Home(Path("/proc/edge-align")).lock("p"):
            pass


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), json_values, max_size=5))
@settings(max_examples=60, deadline=None)
def test_canonical_json_reads_back_and_has_one_spelling(value):
    data = canonical_json(value)
    back = files.parse_json_object(data, "x")
    assert back == value
    assert canonical_json(dict(reversed(back.items()))) == data


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"x", {1, 2}, "\ud800"])
def test_values_that_json_cannot_hold_are_refused(value):
    with pytest.raises(InputError, match="cannot be stored"):
        canonical_json({"key": value})


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{", b'{"a": NaN}', b'{"a": 1e999}', b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"\0"],
)
def test_json_that_is_no_object_of_finite_numbers_is_damage(tmp_path, data):
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(CorruptArtefact, match="damaged"):
        load_json_object(tmp_path / "f")


def test_missing_oversized_and_irregular_files_are_damage(tmp_path):
    (tmp_path / "big").write_bytes(b"x" * 11)
    os.mkfifo(tmp_path / "fifo")
    for name, words in (("none", "missing"), ("big", "larger than 10"), ("fifo", "regular"), ("", "regular")):
        with pytest.raises(CorruptArtefact, match=words):
            read_file(tmp_path / name, limit=10)


@posix
def test_links_are_not_followed(tmp_path):
    (tmp_path / "real").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(StorageError, match="symbolic link"):
        load_json_object(tmp_path / "link")


def test_a_hash_is_tagged_and_is_sha256(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")  # the example of FIPS 180-2
    known = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "f") == files.sha256_bytes(b"abc") == known
    with pytest.raises(StorageError, match="no such file"):
        sha256_file(tmp_path / "missing")


def aged(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_cached_hash_is_read_once_and_again_after_a_change(tmp_path):
    model, cache = tmp_path / "m.gguf", tmp_path / "cache" / "hashes.json"
    model.write_bytes(b"one")
    aged(model, 100)
    assert cached_hash(model, cache) == "sha256:" + hashlib.sha256(b"one").hexdigest()
    entries = load_json_object(cache)
    entries[str(model.resolve())][2] = "sha256:from-the-cache"
    write_json(cache, entries)
    assert cached_hash(model, cache) == "sha256:from-the-cache"
    model.write_bytes(b"two")
    aged(model, 50)
    assert cached_hash(model, cache) == "sha256:" + hashlib.sha256(b"two").hexdigest()


def test_a_file_written_just_now_is_not_cached(tmp_path):
    model, cache = tmp_path / "m.gguf", tmp_path / "hashes.json"
    model.write_bytes(b"one")
    cached_hash(model, cache)
    assert not cache.exists()


@pytest.mark.parametrize("content", [b"junk", b"{}", b'{"%s": 3}', b'{"%s": [3, 4]}', b'{"%s": null}'])
def test_a_damaged_or_unwritable_cache_costs_only_a_hash(tmp_path, content):
    model, cache = tmp_path / "m.gguf", tmp_path / "hashes.json"
    model.write_bytes(b"one")
    aged(model, 100)
    cache.write_bytes(content.replace(b"%s", str(model.resolve()).encode()))
    assert cached_hash(model, cache) == "sha256:" + hashlib.sha256(b"one").hexdigest()
    assert cached_hash(model, model / "no" / "folder.json") == "sha256:" + hashlib.sha256(b"one").hexdigest()


def test_home_is_the_option_then_the_variable_then_the_platforms(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_ALIGN_HOME", str(tmp_path / "variable"))
    assert Home.find(str(tmp_path / "option")).root == tmp_path / "option"
    assert Home.find().root == tmp_path / "variable"
    monkeypatch.setenv("EDGE_ALIGN_HOME", "")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path in Home.find().root.parents and Home.find().root.name == "edge-align"
    assert Home.find("~/x").root == tmp_path / "x"
    assert [*tmp_path.iterdir()] == []  # looking creates nothing
    for bad in ("", "  ", "a\0b"):
        with pytest.raises(InputError, match="home"):
            Home.find(bad)


def test_a_lock_keeps_others_out_until_it_is_dropped(tmp_path):
    home = Home(tmp_path)
    with home.lock("alice"):
        with pytest.raises(StorageError, match="working on profile alice; try again"):
            with home.lock("alice"):
                pass
        with home.lock("bob"), home.write_lock("profiles"):
            pass
    with home.lock("alice"):
        pass
    with pytest.raises(InputError):
        with home.lock("../alice"):
            pass


def test_a_lock_waits_as_long_as_it_is_told(tmp_path):
    home = Home(tmp_path)
    held, drop = threading.Event(), threading.Event()

    def hold() -> None:
        with home.lock("p"):
            held.set()
            drop.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    threading.Timer(0.1, drop.set).start()
    with home.lock("p", timeout_sec=10):
        assert drop.is_set()
    thread.join()


ARRAYS = {"mu": np.arange(4, dtype=np.float32), "head": np.ones((2, 3), np.float16), "n": np.array(7, np.int64)}
EXPECTED = {"mu": ("float32", (4,)), "head": ("float16", (2, None)), "n": ("int64", ())}


def test_tensors_read_back_with_their_types_and_are_read_only(tmp_path):
    save_tensors(tmp_path / "t", {**ARRAYS, "mu": ARRAYS["mu"][::-1]})  # not contiguous
    back = load_tensors(tmp_path / "t", EXPECTED)
    np.testing.assert_array_equal(back["mu"], [3, 2, 1, 0])
    np.testing.assert_array_equal(back["head"], ARRAYS["head"])
    assert {name: (array.dtype.name, array.shape) for name, array in back.items()} == {
        "mu": ("float32", (4,)),
        "head": ("float16", (2, 3)),
        "n": ("int64", ()),
    }
    with pytest.raises(ValueError, match="read-only"):
        back["mu"][0] = 1


def test_every_mismatch_is_reported_at_once():
    bad = {"mu": np.array([1, 2, 3], np.float64), "extra\n": np.zeros(1), "n": np.zeros((1,), np.int64)}
    data = dump_tensors(bad).replace(np.float64(2).tobytes(), np.float64("nan").tobytes())
    with pytest.raises(CorruptArtefact) as caught:
        parse_tensors(data, EXPECTED, name="t")
    message = str(caught.value)
    for words in ("'head' is missing", "'extra\\n' is unknown", "'mu' is float64 (3,), expected float32 (4)"):
        assert words in message
    assert "'n' is int64 (1,), expected int64 ()" in message and "'mu' holds NaN" in message and "\n" not in message


@pytest.mark.parametrize("array", [np.array([1.0, np.nan]), np.array([np.inf]), np.array(["x"]), np.array([1j])])
def test_arrays_that_cannot_be_trusted_later_are_not_stored(array):
    with pytest.raises(InputError, match="stored"):
        dump_tensors({"a": array})


def test_absurd_headers_are_damage_not_a_crash(tmp_path):
    body = dump_tensors(ARRAYS)
    for head in (0, 1, 2**31, 2**63 - 1, 2**64 - 1):
        with pytest.raises(CorruptArtefact):
            parse_tensors(head.to_bytes(8, "little") + body[8:], EXPECTED, name="t")
    huge = b'{"mu":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}'
    with pytest.raises(CorruptArtefact):
        parse_tensors(len(huge).to_bytes(8, "little") + huge + bytes(16), EXPECTED, name="t")
    (tmp_path / "t").write_bytes(body)
    with pytest.raises(CorruptArtefact, match="larger than"):
        load_tensors(tmp_path / "t", EXPECTED, limit=len(body) - 1)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_tensor_bytes_raise_our_error_or_still_fit(data):
    body = bytearray(dump_tensors(ARRAYS))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(body[: data.draw(st.integers(0, len(body)))])
    for damaged in (bytes(body), cut):
        try:
            back = parse_tensors(damaged, EXPECTED, name="t")
        except EdgeAlignError as error:
            assert isinstance(error, CorruptArtefact)
        else:
            assert back.keys() == EXPECTED.keys() and all(np.isfinite(array).all() for array in back.values())
