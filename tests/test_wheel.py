"""What an installation gets: the two packages and the shipped latent packs, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SEC = 120


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built as pip would, with the build backend that is installed here."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run(
        [*command, "--wheel-dir", str(out), str(ROOT)], capture_output=True, text=True, timeout=TIMEOUT_SEC, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files in a folder of their own, away from the checkout."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_our_two_packages_and_nothing_else(installed: Path) -> None:
    top = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"edge_align", "edge_align_export"}


def test_every_module_of_the_checkout_is_in_the_wheel(installed: Path) -> None:
    for source, package in ((ROOT, "edge_align"), (ROOT / "export", "edge_align_export")):
        modules = {path.relative_to(source) for path in (source / package).rglob("*.py")}
        assert modules == {
            path.relative_to(installed) for path in (installed / package).rglob("*.py") if "_models" not in path.parts
        }


def test_the_latent_packs_are_in_the_wheel_byte_for_byte(installed: Path) -> None:
    shipped = installed / "edge_align" / "_models"
    files = {path.relative_to(ROOT / "models"): path for path in (ROOT / "models").rglob("*") if path.is_file()}
    assert {path.name for path in files} >= {"README.md", "manifest.json", "pack.safetensors"}
    assert {path.relative_to(shipped) for path in shipped.rglob("*") if path.is_file()} == files.keys()
    assert [name for name, path in files.items() if (shipped / name).read_bytes() != path.read_bytes()] == []


def test_the_wheel_stays_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 16 << 20  # the pack may take 8 MB, the code a fraction of one


def test_the_installed_command_works_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); import edge_align; "
        f"assert edge_align.__file__.startswith({str(installed)!r}); from edge_align.cli.main import main; main()"
    )
    for arguments, expected in ((["--help"], "Usage:"), (["models", "list", "--json"], "smollm2")):
        result = subprocess.run(
            [sys.executable, "-P", "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert expected in result.stdout
