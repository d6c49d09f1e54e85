"""Which latent pack belongs to which base: packs are folders found by the base hash in their manifests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_align.bases import BaseModel, find_base, KNOWN
from edge_align.errors import ArtefactError, EdgeAlignError, PackMissing
from edge_align.files import load_json_object
from edge_align.home import Home
from edge_align.pack import LatentPack, load_pack, MANIFEST

MINUTES_PER_GB = 360.0
"""`export pack --recipe linear`: measured minutes on two cores per gigabyte of GGUF, at the default sample size."""


def shipped_packs() -> Path:
    """The folder of packs that come with edge-align: in the wheel, else in the checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "_models"
    return installed if installed.is_dir() else package.parent / "models"


def pack_folders(home: Home) -> Iterator[Path]:
    """Folders that hold a pack's manifest; the person's own come first."""
    for root in (home.packs_dir, shipped_packs()):
        if root.is_dir():
            yield from sorted(folder for folder in root.iterdir() if (folder / MANIFEST).is_file())


def find_pack(base: BaseModel, home: Home) -> LatentPack:
    """The pack made for this base. Raises PackMissing, CorruptArtefact, UnsupportedVersion."""
    return load_pack(_find_folder(base, home), base_hash=base.hash)


def _find_folder(base: BaseModel, home: Home) -> Path:
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
        f"(about {minutes:.0f} minutes on this machine)"
    )


def estimate_minutes(base: BaseModel) -> float:
    """How long `export pack --recipe linear` takes here, from the file's size and the processors."""
    import os

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1.0, MINUTES_PER_GB * base.size_bytes / 1e9 * 2 / cores)


def known_models(home: Home) -> list[dict[str, Any]]:
    """The known bases, installed or not, with their packs."""
    return [_describe_known(name, home) for name in KNOWN]


def _describe_known(name: str, home: Home) -> dict[str, Any]:
    found: dict[str, Any] = {"id": name, "title": KNOWN[name].title, "path": None, "hash": None, "pack": None}
    try:
        base = find_base(name, hash_cache=home.hash_cache)
        found |= {"path": str(base.path), "hash": base.hash}
        found["pack"] = describe_pack(_find_folder(base, home))
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
