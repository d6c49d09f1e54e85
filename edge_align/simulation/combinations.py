"""The eight people of Personalized Soups (arXiv 2310.11564, section 4.1): expertise x informativeness x style.

The paper asks a language model which answer fits three prompts; here each of the three is counted. A person's judge
is their sum, each over its standard deviation between answers of the default base to the same question (511 answers to
the training questions), so that none of the three decides alone.
"""

from __future__ import annotations

import math
from itertools import product

from edge_align.simulation import judges
from edge_align.simulation.judges import EMPTY, Judge, word_count

LETTERS = 0.49
"""Standard deviation of the mean word length, letters."""

DOUBLINGS = 1.15
"""Standard deviation of log2 of the number of words."""

CASUAL = 3.4
SENTIMENT = 2.6
"""Standard deviations of the judges `casual` and `positive`; they hardly correlate (-.01)."""


def expertise(text: str) -> float:
    """Long words: the paper's P1B (for an expert) against P1A (for a child)."""
    return judges.long_words(text) / LETTERS


def informativeness(text: str) -> float:
    """Many words: the paper's P2B (informative) against P2A (concise)."""
    return math.log2(word_count(text)) / DOUBLINGS


def friendliness(text: str) -> float:
    """A cheerful, casual tone: the paper's P3A (friendly) against P3B (unfriendly)."""
    return (judges.casual(text) / CASUAL + judges.positive(text) / SENTIMENT) / math.sqrt(2.0)


DIMENSIONS = (
    (expertise, {"elementary": -1.0, "expert": 1.0}),
    (informativeness, {"concise": -1.0, "informative": 1.0}),
    (friendliness, {"friendly": 1.0, "unfriendly": -1.0}),
)
"""What is counted, and the sign with which each kind of person likes it."""

PEOPLE: tuple[tuple[str, ...], ...] = tuple(product(*(kinds for _, kinds in DIMENSIONS)))
"""All eight combinations, e.g. ("elementary", "concise", "friendly")."""


def combined(kinds: tuple[str, ...]) -> Judge:
    """The judge of somebody who is of these kinds, one of each dimension."""

    def judge(text: str) -> float:
        if not word_count(text):
            return EMPTY
        return sum(signs[kind] * score(text) for (score, signs), kind in zip(DIMENSIONS, kinds, strict=True))

    return judge
