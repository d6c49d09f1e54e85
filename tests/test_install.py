"""`scripts/install.py`: what a build for a GPU lacks is said in one line, before anything is installed."""

import os
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
