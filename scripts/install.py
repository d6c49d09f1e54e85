"""Make the project's environment: check Python, create it, install the pinned versions, and say what is going on.

    python3 scripts/install.py VENV EXTRA [EXTRA ...] [--gpu=cuda|metal|vulkan]

--gpu builds llama.cpp for that kind of GPU; later calls without it keep that build. Does nothing when that was done
before with the same constraints.txt and pyproject.toml. Standard library only, because it runs before anything is
installed, and in syntax that Python 3.6 reads, so that an old one gets the message below.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if sys.version_info < (3, 11):  # noqa: UP036  (this runs under whatever python3 is)
    version = ".".join(map(str, sys.version_info[:2]))
    sys.exit(
        f"edge-align needs Python 3.11 or newer; {sys.executable} is {version}. "
        "Install one and name it, for example: make personalize PYTHON=python3.12"
    )

ROOT = Path(__file__).resolve().parent.parent
TICK_SEC = 1.0 if sys.stdout.isatty() else 30.0  # a log file gets a line now and then, a terminal a running clock
COMPILERS = ("cc", "gcc", "clang", "cl")
GPUS = {
    "cuda": ("-DGGML_CUDA=on", "nvcc"),
    "metal": ("-DGGML_METAL=on", "xcrun"),
    "vulkan": ("-DGGML_VULKAN=on", "glslc"),
}
"""Kind of GPU -> (what llama.cpp is built with, the tool that its build cannot do without)."""
KEEP_STORES = "-fno-dse -fno-tree-dse -frecord-gcc-switches"
"""Without these an older GCC breaks llama.cpp's kernels for AMX; edge_align/runtime/llama_build.py looks for them."""
VULKAN_HEADERS = 272  # of 1.3: llama.cpp sets layers through VK_EXT_layer_settings, which is that old


def main() -> None:
    given = [argument for argument in sys.argv[1:] if not argument.startswith("--gpu=")]
    gpu = "".join(argument.split("=", 1)[1] for argument in sys.argv[1:] if argument.startswith("--gpu="))
    if len(given) < 2:
        sys.exit("usage: python3 scripts/install.py VENV EXTRA [EXTRA ...] [--gpu=cuda|metal|vulkan]")
    if gpu:
        check_gpu(gpu)
    venv, extras = ROOT / given[0], set(given[1:])
    python = venv / "bin" / "python"
    stamp = venv / "edge-align.json"

    done = read_stamp(stamp)
    built = "" if done is None else done.get("gpu", "")
    gpu = gpu or built
    if (
        done is not None
        and done["inputs"] == inputs()
        and extras <= set(done["extras"])
        and gpu == built
        and works(python)
    ):
        return
    if done is not None:
        extras |= set(done["extras"])
    if not works(python):
        started = time.monotonic()
        say(f"[install 1/2] creating {venv.name} with Python {sys.version.split()[0]}")
        create(venv)
        say(f"              done in {elapsed(started)}")
    started = time.monotonic()
    say("[install 2/2] installing the pinned versions; llama.cpp is compiled the first time, which takes minutes")
    stamp.unlink(missing_ok=True)
    if gpu:  # pip's cache does not know how a wheel was built: it might hold one without the GPU
        fresh = ["--no-cache-dir", "--force-reinstall", "--no-deps", "llama-cpp-python"]
        install(python, fresh, log=venv / "install.log", cmake_args=GPUS[gpu][0])
    install(python, ["-e", f"{ROOT}[{','.join(sorted(extras))}]"], log=venv / "install.log")
    stamp.write_text(json.dumps({"inputs": inputs(), "extras": sorted(extras), "gpu": gpu}))
    say(f"              done in {elapsed(started)}")


def inputs() -> str:
    """What the environment was made from: a hash of the two files that decide it."""
    content = b"".join((ROOT / name).read_bytes() for name in ("constraints.txt", "pyproject.toml"))
    return hashlib.sha256(content).hexdigest()


def read_stamp(stamp: Path) -> Any:
    """What the last complete install wrote, or None."""
    try:
        return json.loads(stamp.read_text())
    except (OSError, ValueError):
        return None


def works(python: Path) -> bool:
    """Is there an environment whose interpreter starts (it may have been upgraded away) and is new enough?"""
    test = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    try:
        return subprocess.run([python, "-c", test], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def create(venv: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", venv], capture_output=True, text=True, check=False
    )
    if result.returncode:
        print(result.stdout + result.stderr)
        sys.exit(f"{sys.executable} cannot create an environment; Debian and Ubuntu have that in package python3-venv")


def check_gpu(gpu: str) -> None:
    """End here, in one line, where a build for this GPU cannot work."""
    if gpu not in GPUS:
        sys.exit(f"unknown GPU {gpu!r}; there are {', '.join(GPUS)}")
    tool = GPUS[gpu][1]
    if not shutil.which(tool):
        sys.exit(f"building llama.cpp for {gpu} needs {tool}, which is not on the PATH; install its toolkit first")
    if gpu == "vulkan":
        check_vulkan_headers()


def check_vulkan_headers() -> None:
    """End here where the first headers a build would find are too old; where none are found, CMake may know better."""
    sdk = os.environ.get("VULKAN_SDK")
    for folder in ([Path(sdk, "include")] if sdk else []) + [Path("/usr/local/include"), Path("/usr/include")]:
        header = folder / "vulkan" / "vulkan_core.h"
        if not header.is_file():
            continue
        found = re.search(r"define VK_HEADER_VERSION (\d+)", header.read_text(errors="replace"))
        if found and int(found[1]) < VULKAN_HEADERS:
            sys.exit(
                f"building llama.cpp for vulkan needs Vulkan headers 1.3.{VULKAN_HEADERS} or newer; those in {folder} "
                f"are of version {found[1]}; install newer ones and name their folder in VULKAN_SDK"
            )
        return


def install(python: Path, what: list[str], *, log: Path, cmake_args: str = "") -> None:
    """pip install `what` into the environment, its talk into `log`, with a sign of life here."""
    command = [python, "-m", "pip", "install", "--progress-bar", "off", "-c", ROOT / "constraints.txt", *what]
    environment = {**os.environ, **compiler_flags()} | ({"CMAKE_ARGS": cmake_args} if cmake_args else {})
    started = time.monotonic()
    with log.open("w") as out:
        # In a group of its own with the compilers it starts, so that Ctrl-C can end them all.
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            watch(process, log, started)
        except BaseException:
            stop(process)
            raise
    if process.returncode:
        print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-30:]))
        if not any(shutil.which(name) for name in COMPILERS):
            sys.exit("installing failed: there is no C/C++ compiler; install one (on Debian: build-essential)")
        sys.exit(f"installing failed; the end of pip's log is above, the whole in {log}")


def compiler_flags() -> dict[str, str]:
    """CXXFLAGS with KEEP_STORES, for GCC on x86-64; what is there stays."""
    if platform.machine() != "x86_64":
        return {}
    try:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    except (OSError, ValueError):
        return {}
    if "Free Software Foundation" not in done.stdout:
        return {}
    return {"CXXFLAGS": f"{os.environ.get('CXXFLAGS', '')} {KEEP_STORES}".strip()}


def watch(process: "subprocess.Popen[bytes]", log: Path, started: float) -> None:
    """Show what pip does and for how long, until it ends."""
    shown = started
    while process.poll() is None:
        time.sleep(0.2)
        if time.monotonic() - shown >= TICK_SEC:
            shown = time.monotonic()
            line = f"              {elapsed(started):>9}  {activity(log)}"
            say(f"\r{line:<100.100}" if sys.stdout.isatty() else line, end="" if sys.stdout.isatty() else "\n")
    if sys.stdout.isatty() and shown > started:
        say("\r" + " " * 100 + "\r", end="")


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End pip and the compilers it started; asked politely, it removes its temporary files."""
    for how in (signal.SIGINT, signal.SIGTERM):
        os.killpg(process.pid, how)
        try:
            process.wait(timeout=10)
            return
        except subprocess.TimeoutExpired:
            pass


def activity(log: Path) -> str:
    """The last thing pip said it began."""
    for line in reversed(log.read_text(errors="replace").splitlines()):
        words = line.strip()
        if words.startswith("Building wheel for"):
            return f"compiling {words.split()[3]}"
        if words.startswith("Installing collected packages"):
            return "unpacking what was downloaded"
        if words.startswith(("Collecting", "Downloading", "Using cached", "Installing")):
            return words[:70]
    return "starting pip"


def elapsed(started: float) -> str:
    seconds = time.monotonic() - started
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"


def say(text: str, *, end: str = "\n") -> None:
    print(text, end=end, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to go on")
