"""Which builds of llama.cpp may use AMX: told from what the compiler wrote into the library."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from edge_align.runtime.llama_build import amx_is_sound, FLAGS, keeps_tile_configuration
from scripts.install import KEEP_STORES

# the first of each release whose code keeps the stores: GCC bug 114098, "fixed in"
GCC = [("11.4.0", False), ("11.5.0", True), ("12.2.0", False), ("12.4.0", True), ("13.2.0", False), ("13.3.0", True)]
GCC += [("9.5.0", False), ("14.1.0", True), ("15.2.1", True)]


@pytest.mark.parametrize(("version", "sound"), GCC)
def test_a_gcc_is_sound_from_its_mended_release_on(version: str, sound: bool) -> None:
    library = f"\x7fELF\0\0GCC: (Debian {version}-14+deb12u1) {version}\0\0".encode()
    assert keeps_tile_configuration(library) is sound


def test_one_broken_part_makes_a_library_unsound() -> None:
    assert not keeps_tile_configuration(b"GCC: (GNU) 14.2.0\0GCC: (GNU) 12.2.0\0")


def test_a_library_that_does_not_say_is_not_trusted(tmp_path: Path) -> None:
    assert not keeps_tile_configuration(b"\x7fELF")
    assert not amx_is_sound(tmp_path)
    (tmp_path / "libggml-cpu.so").mkdir()
    assert not amx_is_sound(tmp_path)


def test_every_build_of_the_kernels_has_to_be_sound(tmp_path: Path) -> None:
    (tmp_path / "libggml-cpu-haswell.so").write_bytes(b"GCC: (GNU) 14.2.0\0")
    (tmp_path / "libllama.so").write_bytes(b"GCC: (GNU) 12.2.0\0")
    assert amx_is_sound(tmp_path)
    (tmp_path / "libggml-cpu-sapphirerapids.so").write_bytes(b"GCC: (GNU) 12.2.0\0")
    assert not amx_is_sound(tmp_path)


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_the_flags_of_the_installer_are_found_in_what_they_compile(tmp_path: Path) -> None:
    (tmp_path / "empty.cpp").write_text("int one() { return 1; }\n")
    library = tmp_path / "libggml-cpu.so"
    assert KEEP_STORES == FLAGS  # the installer runs before there is anything to import
    flags = FLAGS.split()
    done = subprocess.run(["g++", *flags, "-shared", "-fPIC", "-o", library, tmp_path / "empty.cpp"], check=False)
    assert done.returncode == 0
    subprocess.run(["strip", library], check=True)  # as an installed library is
    assert amx_is_sound(tmp_path)
