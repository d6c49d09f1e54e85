"""The model card of a pack: what it is, how it was made, what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LATENTS = {
    "first_order_gain": "decoder, to first order: correlation of its effect with the latent, held-out prompts",
    "nll_none": "NLL of the base's answers to held-out prompts, nats per token",
    "nll_own_latent": "the same, steered by each answer's own latent",
    "nll_swapped_latent": "the same, by the latent of another answer to the prompt",
    "mutual_information": "mutual information of a latent and its answer among 8, nats (at most 2.08)",
    "active_latents": "share of latents that vary between answers",
}


def card(manifest: Mapping[str, Any]) -> str:
    """Markdown for people; every figure is from the manifest."""
    health = manifest["health"]
    told = "".join(f"\n| {title} | {health[name]} |" for name, title in LATENTS.items() if name in health)
    return f"""# Latent pack for {manifest["base"]}

Maps answers to {manifest["k"]} latents and latents to steering vectors for blocks {manifest["layers"][0]} to
{manifest["layers"][1]} of one base model. Everyone who uses this base shares the pack; it holds nothing of any person.
It fits the base with hash `{manifest["base_hash"]}` and no other.

Made by `{manifest["command"]}` with edge-align {manifest["edge_align"]}
from {manifest["answers"]} answers of up to {manifest["config"]["max_tokens"]} tokens. They are the base's own,
to the prompts of set `pack` (`edge_align.simulation.prompts`), sampled at
temperature 1, top-k 100, top-p 0.95, seed {manifest["config"]["seed"]}.{_training(manifest)}

| health | value |
| --- | --- |
| held-out R2 of the deep latents, read from the first two blocks | {health["r2"]} |
| predicted against measured KL, median factor | {health["kl_factor_median"]} |
| the same, worst of {manifest["config"]["curve_points"]} directions and radii | {health["kl_factor_worst"]} |
| NLL of the base's own short answers, nats per token | {health["base_nll"]} |
| chance that two of their tokens are the same | {health["base_collision"]} |
| closed loop: share of an injected latent that comes back in the answers | {health["loop_gain"]} |
| closed loop: cosine between what was injected and what came back | {health["loop_cosine"]} |{told}

Limits: latents describe how the base itself varies its answers. A taste that the base never shows by chance cannot be
read from them, and prompts in other languages were not part of the sample.
"""


def _training(manifest: Mapping[str, Any]) -> str:
    """What recipe `score` or `clap` did after the regression."""
    score, clap = manifest["config"].get("score"), manifest["config"].get("clap")
    if score is None:
        return ""
    solved = _latents(manifest) + (
        f"\nIts decoder was solved from the scores of the answers' first {score['tokens']} tokens."
    )
    if clap is None:
        return solved
    what = "decoder and readout" if clap["readout_lr"] else "decoder"
    return solved + (
        f"\nThen its {what} was trained through the frozen base: {clap['steps']} steps of {clap['prompts']} prompts "
        f"with {clap['answers']} answers each."
    )


def _latents(manifest: Mapping[str, Any]) -> str:
    """Whose latents a pack has that took them from another."""
    readout = manifest.get("readout")
    if readout is None:
        return ""
    return (
        f"\n`PACK` is the pack with hash `{readout['pack_hash']}`, whose latents these are; it was made by\n"
        f"`{readout['command']}` from {readout['answers']} answers."
    )
