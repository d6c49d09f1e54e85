"""`scripts/install.py`: what a build for a GPU lacks is said in one line, before anything is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import install

SCRIPT = Path(__file__).parent.parent / "scripts" / "install.py"


@pytest.fixture
def said(tmp_path):
    """Runs the installer with only `tools` on the PATH; what it says last."""

    def run(gpu: str, *tools: str, sdk: Path | None = None) -> str:
        for tool in tools:
            (tmp_path / tool).write_text("#!/bin/sh\n")
            (tmp_path / tool).chmod(0o755)
        environment = {"PATH": str(tmp_path)} | ({} if sdk is None else {"VULKAN_SDK": str(sdk)})
        command = [sys.executable, str(SCRIPT), "never-made", "default-base", f"--gpu={gpu}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
        assert not (SCRIPT.parent.parent / "never-made").exists()
        return done.stderr

    return run


def headers(folder: Path, version: int) -> Path:
    (folder / "include" / "vulkan").mkdir(parents=True)
    text = f"// a header\n#define VK_HEADER_VERSION {version}{os.linesep}"
    (folder / "include" / "vulkan" / "vulkan_core.h").write_text(text)
    return folder


def test_an_unknown_gpu_and_a_missing_toolkit_are_named(said):
    assert "unknown GPU 'tpu'; there are cuda, metal, vulkan" in said("tpu")
    assert "for cuda needs nvcc" in said("cuda")
    assert "for vulkan needs glslc" in said("vulkan")


def test_vulkan_headers_that_llama_cpp_does_not_compile_with_are_refused(said, tmp_path):
    sdk = headers(tmp_path / "sdk", 239)  # Debian 12's
    assert "needs Vulkan headers 1.3.272 or newer" in (line := said("vulkan", "glslc", sdk=sdk))
    assert "of version 239" in line and str(sdk) in line


def test_newer_headers_pass_and_the_sdk_comes_before_the_systems_own(tmp_path, monkeypatch):
    monkeypatch.setenv("VULKAN_SDK", str(headers(tmp_path / "sdk", 309)))
    install.check_vulkan_headers()


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_gcc_is_told_to_keep_what_amx_reads_beside_the_flags_that_are_there(monkeypatch):
    monkeypatch.setattr(install.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("CXX", "g++ -m64")
    monkeypatch.setenv("CXXFLAGS", "-O2")
    assert install.compiler_flags() == {"CXXFLAGS": f"-O2 {install.KEEP_STORES}"}
    monkeypatch.setattr(install.platform, "machine", lambda: "aarch64")
    assert install.compiler_flags() == {}


def test_other_compilers_and_none_get_no_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(install.platform, "machine", lambda: "x86_64")
    (tmp_path / "clang++").write_text("#!/bin/sh\necho Debian clang version 14.0.6\n")
    (tmp_path / "clang++").chmod(0o755)
    for compiler in (str(tmp_path / "clang++"), str(tmp_path / "none"), '"'):
        monkeypatch.setenv("CXX", compiler)
        assert install.compiler_flags() == {}
