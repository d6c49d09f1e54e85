"""Which latent pack belongs to which base: packs are folders found by the base hash in their manifests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_align.bases import added_bases, BaseModel, find_base, KNOWN
from edge_align.bundle import PACK
from edge_align.errors import ArtefactError, EdgeAlignError, PackMissing
from edge_align.files import load_json_object
from edge_align.home import Home
from edge_align.pack import LatentPack, load_pack, MANIFEST
from edge_align.profiles import ProfileStore, Usable

MINUTES_PER_GB = 700.0
"""`export pack --recipe linear`: measured minutes on two cores without bfloat16, per gigabyte of GGUF, at the
default sample size; with bfloat16 less than half."""


def shipped_packs() -> Path:
    """The folder of packs that come with edge-align: in the wheel, else in the checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "_models"
    return installed if installed.is_dir() else package.parent / "models"


def pack_folders(home: Home) -> Iterator[Path]:
    """Folders that hold a pack's manifest; the person's own come first, then those that came with an added base."""
    for root, inner in ((home.packs_dir, "."), (home.models_dir, PACK), (shipped_packs(), ".")):
        if root.is_dir():
            yield from sorted(folder / inner for folder in root.iterdir() if (folder / inner / MANIFEST).is_file())


def find_pack(base: BaseModel, home: Home) -> LatentPack:
    """The pack made for this base. Raises PackMissing, CorruptArtefact, UnsupportedVersion."""
    return load_pack(find_folder(base, home), base_hash=base.hash)


def open_profile(
    store: ProfileStore,
    name: str,
    base: BaseModel,
    home: Home,
    *,
    version: int | None = None,
    pack: LatentPack | None = None,
) -> tuple[Usable, LatentPack | None]:
    """A profile that fits this base, by default its active version, and the pack it needs.

    The pack is None for a profile of form "vectors", which needs none. pack: where it is open already.
    Raises InputError, IncompatibleBase (every mismatch), CorruptArtefact, UnsupportedVersion, PackMissing.
    """

    def load(expect: dict[str, Any] | None) -> Usable:
        if version is None:
            return store.load_usable(name, expect=expect)
        return Usable(version, *store.load(name, version, expect=expect))

    expect = {"base_hash": base.hash, "n_layer": base.n_layer, "d_model": base.d_model}
    if load(None).manifest.get("form") == "vectors":
        return load(expect), None
    pack = pack or find_pack(base, home)
    return load(expect | {"pack_hash": pack.hash, "k": pack.k}), pack


def find_folder(base: BaseModel, home: Home) -> Path:
    """The folder of the pack made for this base. Raises PackMissing."""
    for folder in pack_folders(home):
        try:
            if load_json_object(folder / MANIFEST).get("base_hash") == base.hash:
                return folder
        except ArtefactError:
            continue  # a damaged pack of some base must not hide a good one of this base
    if base.export is not None:
        raise PackMissing(
            f"{base.id} has no latent pack here; build one from the GGUF this export was made of, with: "
            "edge-align export pack --model GGUF"
        )
    minutes = estimate_minutes(base)
    raise PackMissing(
        f"{base.id} has no latent pack yet; build one with: edge-align export pack --model {base.path} "
        f"(up to about {minutes:.0f} minutes on this machine)"
    )


def estimate_minutes(base: BaseModel) -> float:
    """How long `export pack --recipe linear` takes at most here, from the file's size and the processors.

    A base whose answers are shorter than the longest that is sampled needs less.
    """
    import os

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1.0, MINUTES_PER_GB * base.size_bytes / 1e9 * 2 / cores)


def known_models(home: Home) -> list[dict[str, Any]]:
    """The known bases, installed or not, and those that were added, with their packs."""
    known = [_describe(name, KNOWN[name].title, home, added=False) for name in KNOWN]
    return known + [_describe(name, _title(home.models_dir / name), home, added=True) for name in added_bases(home)]


def _title(folder: Path) -> str:
    try:
        return str(load_json_object(folder / MANIFEST).get("title", ""))
    except ArtefactError:
        return ""


def _describe(name: str, title: str, home: Home, *, added: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"id": name, "title": title, "added": added, "path": None, "hash": None, "pack": None}
    try:
        base = find_base(name, home=home)
        found |= {"path": str(base.path), "hash": base.hash}
        found["pack"] = describe_pack(find_folder(base, home))
    except EdgeAlignError as error:
        found["error"] = str(error)
    return found


def describe_pack(folder: Path) -> dict[str, Any]:
    """What a pack's manifest says about itself, for a person."""
    manifest = load_json_object(folder / MANIFEST)
    return {
        "folder": str(folder),
        "k": manifest.get("k"),
        "recipe": manifest.get("recipe"),
        "size_bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "health": manifest.get("health", {}),
    }
