"""Profiles to and from llama.cpp control vectors (docs/decisions/0008)."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

import edge_align
from edge_align.bases import find_base
from edge_align.config import bounded, check_strength, default, PersonalizeConfig, RuntimeConfig
from edge_align.control_vector import read_control_vector, write_control_vector
from edge_align.encoder import PreferenceEncoder, profile_vectors
from edge_align.engines import open_backend
from edge_align.errors import IncompatibleBase, InputError
from edge_align.files import check_name, sha256_file, shown
from edge_align.home import Home
from edge_align.profiles import ProfileStore
from edge_align.registry import open_profile

CONTEXT = 512  # tokens; the answers on which KL is measured are short


def export_control_vector(
    path: Path,
    *,
    home: Home,
    profile: str | None = None,
    version: int | None = None,
    model: str | None = None,
    strength: float = 1.0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a profile (None: the one in use) times `strength` as a control vector for the base `model`.

    Of a profile that depends on the prompt it is the mean over the prompts of its pack. Returns what was written.
    Raises InputError, ArtefactError, BackendUnavailable, ModelLoadError, StorageError.
    """
    check_strength(strength)
    if os.path.lexists(path) and not overwrite:
        raise InputError(f"{shown(path)} exists; choose another file, or replace it with --force")
    base = find_base(model, home=home)
    store = ProfileStore(home)
    name = profile or store.current()
    if name is None:
        raise InputError("no profile is in use; give a name from `edge-align profiles list`")
    usable, pack = open_profile(store, name, base, home, version=version)
    facts: dict[str, str | int | float | bool] = {
        "writer": f"edge-align {edge_align.__version__}",
        "base": base.id,
        "base_hash": base.hash,
        "strength": strength,
    }
    mean_over_prompts = False
    if pack is None:
        vectors = profile_vectors(usable.tensors)
    else:
        encoder = PreferenceEncoder.from_tensors(usable.tensors)
        latent = encoder.latent()
        vectors, mean_over_prompts = pack.decode(latent), encoder.depends_on_prompt
        facts |= {"pack_hash": pack.hash, "scale": encoder.scale, "predicted_kl": pack.predicted_kl(latent * strength)}
    facts["mean_over_prompts"] = mean_over_prompts
    vectors = vectors.scaled(strength)
    if vectors.is_zero:
        raise InputError(f"profile {name} does not steer, or strength is 0: there is nothing to write")
    write_control_vector(path, vectors, architecture=base.header.architecture, facts=facts)
    layers = np.flatnonzero(vectors.array.any(axis=1))
    return {
        "file": str(path),
        "size_bytes": path.stat().st_size,
        "profile": name,
        "version": usable.version,
        "strength": strength,
        "predicted_kl": facts.get("predicted_kl"),
        "mean_over_prompts": mean_over_prompts,
        "layers": [int(layers[0]), int(layers[-1])],
        "base": base.id,
    }


def import_control_vector(
    path: Path,
    name: str,
    *,
    home: Home,
    model: str | None = None,
    shift: int = 0,
    kl_budget: float | None = None,
    runtime: RuntimeConfig | None = None,
) -> dict[str, Any]:
    """Keep a control vector as a new version of profile `name`, not active; returns what was found.

    Its vectors are kept as they are. Their KL from the base is measured here, and only where it is over the budget are
    they scaled down to it. Raises InputError, CorruptArtefact, IncompatibleBase, BackendUnavailable, ModelLoadError.
    """
    from edge_align.kl import factor_for_kl, sampled_probe

    budget = default(PersonalizeConfig, "kl_budget") if kl_budget is None else kl_budget
    bounded(budget, 0.001, 2.0, "kl-budget")
    check_name("profile", name)
    base = find_base(model, home=home)
    found = read_control_vector(path, n_layer=base.n_layer, d_model=base.d_model, shift=shift)
    made_for = found.facts.get("base_hash")
    if made_for is not None and made_for != base.hash:
        raise IncompatibleBase(
            f"{shown(path)} was made for base {str(made_for)[:23]}…, not {base.hash[:23]}…; "
            "choose its base with --model"
        )
    notes = []
    if found.model_hint not in (None, base.header.architecture):
        notes.append(f"it was made for a model of type {found.model_hint!r}, this base is {base.header.architecture!r}")
    if found.dropped:
        blocks = ", ".join(map(str, found.dropped))
        notes.append(f"direction {blocks} would go to a block below 1, which cannot be steered; left out")
    runtime = runtime or RuntimeConfig()
    opened = RuntimeConfig(n_ctx=CONTEXT, n_threads=runtime.n_threads, n_gpu_layers=runtime.n_gpu_layers)
    with closing(open_backend(base, opened)) as backend:
        if base.engine == "llamacpp":  # which ignores vectors on some architectures
            from edge_align.runtime.llamacpp import check_steering

            check_steering(backend)
        probe = sampled_probe(backend)
        factor, kl = factor_for_kl(backend, probe, found.vectors, budget, ceiling=True)
    if factor != 1.0:
        notes.append(f"its own strength is over the KL budget of {budget:g}; scaled by {factor:.3g}")
    saved = ProfileStore(home).save(
        name,
        {"vectors": found.vectors.array, "scale": np.array([factor], np.float32)},
        {
            "form": "vectors",
            "base": base.id,
            "base_hash": base.hash,
            "n_layer": base.n_layer,
            "d_model": base.d_model,
            "kl_budget": budget,
            "predicted_kl": round(kl, 6),
            "source": {
                "format": "control vector",
                "sha256": sha256_file(path),
                "model_hint": found.model_hint,
                "shift": shift,
            },
        },
    )
    return {
        "name": name,
        "version": saved.number,
        "size_bytes": saved.size_bytes,
        "model": base.id,
        "scale": factor,
        "predicted_kl": kl,
        "kl_budget": budget,
        "notes": notes,
    }
