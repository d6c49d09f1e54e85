"""Simulated users: who they are, the pairs they pick, and how often a profile wins with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TYPE_CHECKING

from edge_align.errors import InputError
from edge_align.records import PreferencePair, user_prompt
from edge_align.simulation import judges
from edge_align.simulation.combinations import combined, PEOPLE
from edge_align.simulation.judges import Judge

if TYPE_CHECKING:
    import numpy as np

Pick = Literal["extreme", "random"]


@dataclass(frozen=True, slots=True)
class User:
    """Somebody whose taste is one judge."""

    name: str
    judge: Judge
    description: str
    max_tokens: int | None = None  # answers must be sampled with this cap: length users need room to differ


USERS: tuple[User, ...] = (
    User("positive", judges.positive, "likes a cheerful answer"),
    User("negative", judges.negative, "likes a gloomy, critical answer"),
    User("simple_words", judges.simple_words, "likes simple words"),
    User("long_words", judges.long_words, "likes long words"),
    User("addresses_reader", judges.addresses_reader, "likes to be spoken to as 'you'"),
    User("first_person", judges.first_person, "likes an answer that speaks as 'I'"),
    User("short", judges.short, "likes a short answer", max_tokens=256),
    User("asks_questions", judges.asks_questions, "likes to be asked something"),
)
"""The eight attribute users of every claim, in the order they are reported."""

MORE_USERS: tuple[User, ...] = (
    User("long", judges.long, "likes a long answer", max_tokens=256),
    User("casual", judges.casual, "likes a casual tone"),
    User("formal", judges.formal, "likes a formal tone"),
    User("hedged", judges.hedged, "likes a careful answer"),
    User("assertive", judges.assertive, "likes a firm answer"),
    User("lists", judges.lists, "likes lists"),
    User("plain", judges.plain, "likes a plain, brief answer", max_tokens=256),
    User("flowery", judges.flowery, "likes a flowery answer", max_tokens=256),
    User("inclusive", judges.inclusive, "likes an answer that says 'we'"),
    User("exclaims", judges.exclaims, "likes exclamation marks"),
    User("numbers", judges.numbers, "likes figures"),
    User("short_sentences", judges.short_sentences, "likes short sentences"),
)
"""People by whom choices are made (validation); no claim is made of them."""


COMBINED_USERS: tuple[User, ...] = tuple(
    User("_".join(kinds), combined(kinds), f"likes {kinds[0]}, {kinds[1]} and {kinds[2]} answers", max_tokens=256)
    for kinds in PEOPLE
)
"""The eight people of Personalized Soups, whose tastes have three parts (`simulation.combinations`)."""

GROUPS = {"attributes": USERS, "combined": COMBINED_USERS, "validation": MORE_USERS}


def user(name: str) -> User:
    """The user of that name. Raises InputError for an unknown one."""
    everybody = [known for group in GROUPS.values() for known in group]
    for known in everybody:
        if known.name == name:
            return known
    raise InputError(f"no user {name!r}; the users are {', '.join(known.name for known in everybody)}")


def make_pairs(
    user: User,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    n: int,
    rng: np.random.Generator,
    pick: Pick = "extreme",
    margin_quantile: float = 0.0,
    flip: float = 0.0,
) -> list[PreferencePair]:
    """`n` pairs as `user` would pick them among sampled answers.

    answers: for each prompt its sampled answers; blank ones are never shown.
    Prompts come in an order drawn by `rng`; each gives one pair before any gives a second. Only answers the judge
    tells apart make a pair.

    pick: "extreme" shows a prompt's best and worst answer first, then pairs of falling margin; "random" shows its
        distinguishable pairs in random order.
    margin_quantile: in [0, 1); pairs whose margin lies below this quantile of all margins are passed over, for a
        person who rates only what differs clearly.
    flip: the chance that a verdict is given the wrong way round.

    Raises InputError when lengths differ, an option is out of range, or there are fewer than `n` such pairs.
    """
    import numpy as np

    if len(prompts) != len(answers):
        raise InputError(f"{len(prompts)} prompts but {len(answers)} lists of answers")
    if not (0.0 <= margin_quantile < 1.0 and 0.0 <= flip <= 1.0):
        raise InputError("margin_quantile must lie in [0, 1) and flip in [0, 1]")
    tables = [_margins(user.judge, texts) for texts in answers]
    margins = [margin for table in tables for margin, _, _ in table]
    floor = float(np.quantile(margins, margin_quantile)) if margins else 0.0
    queues: list[tuple[str, list[tuple[str, str]]]] = []
    for index in rng.permutation(len(prompts)):
        table = [row for row in tables[index] if row[0] >= floor]
        if pick == "random":
            table = [table[i] for i in rng.permutation(len(table))]
        queues.append((prompts[index], [(better, worse) for _, better, worse in table]))
    found: list[PreferencePair] = []
    for turn in range(max((len(queue) for _, queue in queues), default=0)):
        for prompt, queue in queues:
            if turn < len(queue):
                better, worse = queue[turn]
                if rng.random() < flip:
                    better, worse = worse, better
                found.append(PreferencePair(user_prompt(prompt), better, worse))
                if len(found) == n:
                    return found
    if len(found) < n:
        raise InputError(f"{user.name} tells only {len(found)} pairs apart, fewer than {n}; sample more answers")
    return found


def _margins(judge: Judge, texts: Sequence[str]) -> list[tuple[float, str, str]]:
    """(margin, better, worse) of every pair the judge separates, widest first; blank answers left out."""
    scored = [(judge(text), text) for text in texts if text.strip()]
    table = [(a - b, better, worse) for a, better in scored for b, worse in scored if a > b]
    return sorted(table, key=lambda row: -row[0])


def wins(judge: Judge, personal: Sequence[str], base: Sequence[str]) -> np.ndarray:
    """Per prompt 1 where the judge prefers the personal answer, 0 where the base's, 0.5 at a tie; (n,) float64.

    Raises InputError when there is no answer or the lengths differ.
    """
    import numpy as np

    if len(personal) != len(base) or not personal:
        raise InputError(f"{len(personal)} personal answers cannot be set against {len(base)} of the base")
    margin = np.array([judge(ours) - judge(theirs) for ours, theirs in zip(personal, base, strict=True)])
    return np.asarray((np.sign(margin) + 1.0) / 2.0)


def win_rate(judge: Judge, personal: Sequence[str], base: Sequence[str]) -> float:
    """Share of prompts on which the judge prefers the personal answer; a tie counts half. Errors as `wins`."""
    return float(wins(judge, personal, base).mean())


def bootstrap_interval(
    values: np.ndarray, *, rng: np.random.Generator, level: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`.

    values: (n,) one value per prompt, e.g. of `wins`; prompts are what is drawn again.
    """
    import numpy as np

    means = values[rng.integers(0, len(values), size=(draws, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def pair_lines(pairs: Sequence[PreferencePair]) -> Iterator[str]:
    """One-question pairs as JSON lines (`prompt`, `chosen`, `rejected`), the form of a feedback file."""
    for pair in pairs:
        record = {"prompt": pair.prompt[-1].content, "chosen": pair.chosen, "rejected": pair.rejected}
        yield json.dumps(record, ensure_ascii=False)
