"""Install the programs that tests talk to the server with, each apart from the project's own environment.

    python scripts/clients.py

openai for Node (where there are node and npm), and langchain-openai with litellm, which need other versions than
constraints.txt has. They go to .cache/clients in the versions that tests/server/programs pins. Does nothing when that
was done before with the same files.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "tests" / "server" / "programs"
CLIENTS = ROOT / ".cache" / "clients"
NODE_FILES = ("package.json", "package-lock.json", ".npmrc")


def main() -> None:
    if shutil.which("node") and shutil.which("npm"):
        once(CLIENTS / "node", [PINS / "node" / name for name in NODE_FILES], install_node)
    else:
        print("[clients] there is no node with npm: the tests of openai for Node are skipped")
    once(CLIENTS / "python", [PINS / "requirements.txt"], install_python)


def once(folder: Path, inputs: list[Path], install: Callable[[Path], None]) -> None:
    """Call install(folder) in an empty folder, unless it was done with the same inputs."""
    stamp = folder / "inputs.sha256"
    made_from = hashlib.sha256(b"".join(path.read_bytes() for path in inputs)).hexdigest()
    if stamp.is_file() and stamp.read_text() == made_from:
        return
    print(f"[clients] installing the {folder.name} programs of the tests into {folder.relative_to(ROOT)}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    install(folder)
    stamp.write_text(made_from)


def install_node(folder: Path) -> None:
    for name in NODE_FILES:
        shutil.copy(PINS / "node" / name, folder)
    run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], folder)


def install_python(folder: Path) -> None:
    run([sys.executable, "-m", "venv", str(folder)], ROOT)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    run([str(python), "-m", "pip", "install", "--quiet", "-r", str(PINS / "requirements.txt")], ROOT)


def run(command: list[str], folder: Path) -> None:
    if subprocess.run(command, cwd=folder, check=False).returncode:
        sys.exit(f"[clients] {command[0]} failed; its message is above")


if __name__ == "__main__":
    main()
