"""Four sets of prompts that share no topic and no template, for simulated users, packs and benches.

Every set is templates x topics (`topics.py`), combined in a fixed order in which any first N are already diverse.
"""

from __future__ import annotations

import random
from functools import cache
from typing import get_args, Literal

from edge_align.errors import InputError
from edge_align.simulation.topics import COMPARE, Material, PACK, TEST, TRAIN, VALIDATION

PromptSet = Literal["pack", "train", "validation", "test"]

MATERIAL: dict[str, Material] = {"pack": PACK, "train": TRAIN, "validation": VALIDATION, "test": TEST}
SIZE: dict[str, int] = {"pack": 1200, "train": 384, "validation": 160, "test": 160}
"""How many prompts each set has; benches use the first 100 of `test`."""


def prompts(name: PromptSet) -> tuple[str, ...]:
    """The prompts of one set, always the same and in the same order.

    name: "pack" (what a latent pack is built from), "train" (where simulated users give feedback), "validation"
        (where choices are made) or "test" (where claims are measured; the first 100 are used).
    Every template is used once before any is used again, and every topic of a kind about once before any returns.

    Raises InputError for an unknown name.
    """
    if name not in MATERIAL:
        raise InputError(f"no prompt set {name!r}; the sets are {', '.join(get_args(PromptSet))}")
    return _made(name)


def compare_prompts() -> tuple[str, ...]:
    """Twelve friendly prompts for `edge-align compare`; none of them is in a prompt set."""
    return COMPARE


@cache
def _made(name: str) -> tuple[str, ...]:
    return tuple(_combined(MATERIAL[name], random.Random(f"edge-align {name}")))[: SIZE[name]]


def _combined(material: Material, rng: random.Random) -> list[str]:
    """All prompts of `material`, in rounds: each round uses every template once, with a topic it has not had.

    Templates of one kind walk the same shuffled circle of topics from starting points spread evenly over it
    (a Latin rectangle), so no template meets a topic twice and topics come up equally often.
    """
    by_kind: dict[str, list[str]] = {}
    for template in material.templates:
        by_kind.setdefault(_kind(template), []).append(template)
    walks: list[tuple[str, list[dict[str, str]]]] = []  # (template, its topics in order)
    for kind, templates in by_kind.items():
        circle = _topics(material, kind)
        rng.shuffle(circle)
        rng.shuffle(templates)
        for index, template in enumerate(templates):
            start = index * len(circle) // len(templates)
            walks.append((template, circle[start:] + circle[:start]))
    result = []
    for turn in range(max(len(topics) for _, topics in walks)):
        rng.shuffle(walks)
        round_ = [template.format(**topics[turn]) for template, topics in walks if turn < len(topics)]
        result += [text[0].upper() + text[1:] for text in round_]
    return result


def _kind(template: str) -> str:
    return next(kind for kind in ("thing", "doing", "situation", "a") if "{" + kind + "}" in template)


def _topics(material: Material, kind: str) -> list[dict[str, str]]:
    if kind == "a":
        return [{"a": a, "b": b} for a, b in material.pairs]
    values = {"thing": material.things, "doing": material.doings, "situation": material.situations}[kind]
    return [{kind: value} for value in values]
