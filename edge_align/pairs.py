"""Feedback rows -> what is learnt from: each preference once, contradictions settled, opposed thumbs paired."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from edge_align.records import FeedbackRow, Origin, PreferencePair, Prompt, Rating


@dataclass(frozen=True, slots=True)
class Dataset:
    """All that one person's feedback says, in an order that depends on the texts alone."""

    pairs: tuple[PreferencePair, ...]
    ratings: tuple[Rating, ...]  # verdicts that no pair uses


def build(rows: Iterable[FeedbackRow]) -> Dataset:
    """Turn feedback rows, oldest first, into preference pairs and lone ratings.

    Of several rows on the same two answers to one prompt the newest counts, whichever answer it prefers; of several
    ratings of one answer, the newest. Then a thumb up and a thumb down on different answers to one prompt make a pair
    of origin `opposed` (weight: their mean), each rating in one pair at most, the heaviest first. Such a pair is as
    new as the newer of its thumbs, and yields to a newer explicit pair on the same answers. Apart from "newest", the
    order of the rows has no influence; building twice changes nothing.
    """
    pairs: dict[tuple[Prompt, str, str], tuple[int, PreferencePair]] = {}
    ratings: dict[tuple[Prompt, str], tuple[int, Rating]] = {}
    for time, row in enumerate(rows):
        if row.chosen is not None and row.rejected is not None:
            pair = PreferencePair(row.prompt, row.chosen, row.rejected, row.origin, row.weight)
            pairs[_pair_key(pair)] = time, pair
        elif row.completion is not None and row.label is not None:
            rating = Rating(row.prompt, row.completion, row.label, row.weight)
            ratings[row.prompt, row.completion] = time, rating
    groups: dict[Prompt, list[tuple[int, Rating]]] = defaultdict(list)
    for entry in ratings.values():
        groups[entry[1].prompt].append(entry)
    left: list[Rating] = []
    for group in groups.values():
        ups, downs = (_heaviest_first(group, label) for label in (True, False))
        for (up_time, up), (down_time, down) in zip(ups, downs, strict=False):
            weight = (up.weight + down.weight) / 2
            pair = PreferencePair(up.prompt, up.completion, down.completion, "opposed", weight)
            candidate = max(up_time, down_time), pair
            key = _pair_key(pair)
            pairs[key] = max(pairs.get(key, candidate), candidate, key=lambda entry: entry[0])
        used = min(len(ups), len(downs))
        left += [rating for _, rating in (*ups[used:], *downs[used:])]
    return Dataset(
        pairs=tuple(sorted((pair for _, pair in pairs.values()), key=_pair_order)),
        ratings=tuple(sorted(left, key=lambda rating: (_prompt_order(rating.prompt), rating.completion))),
    )


def count_by_origin(pairs: Iterable[PreferencePair]) -> dict[Origin, int]:
    """How many pairs came about in which way; origins without any are left out."""
    counts = Counter(pair.origin for pair in pairs)
    origins: tuple[Origin, ...] = get_args(Origin)
    return {origin: counts[origin] for origin in origins if counts[origin]}


def _heaviest_first(group: list[tuple[int, Rating]], label: bool) -> list[tuple[int, Rating]]:
    chosen = [entry for entry in group if entry[1].label is label]
    return sorted(chosen, key=lambda entry: (-entry[1].weight, entry[1].completion))


def _pair_key(pair: PreferencePair) -> tuple[Prompt, str, str]:
    first, second = sorted((pair.chosen, pair.rejected))
    return pair.prompt, first, second


def _prompt_order(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    return tuple((message.role, message.content) for message in prompt)


def _pair_order(pair: PreferencePair) -> tuple[tuple[tuple[str, str], ...], str, str]:
    return _prompt_order(pair.prompt), pair.chosen, pair.rejected
