"""Programmatic judges of answers, and measures of fluency. Pure Python.

A judge is a function of the answer's text alone; higher means that its user likes the answer more. Judges compare:
their units differ. To every judge a text without a word is worth `EMPTY`, less than any real answer, so that saying
nothing never wins.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps

from edge_align.errors import BackendUnavailable, InputError
from edge_align.simulation.lexicon import (
    CASUAL,
    FIRST_PERSON,
    FIRST_PERSON_PLURAL,
    FORMAL,
    HEDGES,
    NEGATIVE,
    NEGATORS,
    POSITIVE,
    SECOND_PERSON,
    stems,
)

Judge = Callable[[str], float]

EMPTY = -1e6
"""What an answer without a word is worth to anybody; keep it out of means."""

QUESTIONS_ENOUGH = 3
"""More questions, or exclamations, than this in one answer please nobody more."""

NEGATION_REACH = 3
"""A negator turns the sentiment of this many words after it, within its clause."""

SENTIMENT_PRIOR = 20
"""Neutral words added to every answer, so that one word alone is not a strong sentiment."""

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_CLAUSE_END = re.compile(r"[.,;:!?\n]+")
_QUESTION = re.compile(r"\?[?!\"')\s]*")
_EXCLAMATION = re.compile(r"![?!\"')\s]*")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_SENTENCE_END = re.compile(r"[.?!]+(?:\s|$)|\n+")
_LIST_LINE = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+\S", re.MULTILINE)


def words(text: str) -> list[str]:
    """Lower-cased words of `text`; an apostrophe inside a word stays (curly ones become straight)."""
    return _WORD.findall(text.replace("\u2019", "'").lower())


def word_count(text: str) -> int:
    """Number of words."""
    return len(words(text))


def _judge(score: Callable[[str], float]) -> Judge:
    """`score`, with EMPTY for a text that has no word."""

    @wraps(score)
    def judged(text: str) -> float:
        return score(text) if words(text) else EMPTY

    return judged


@_judge
def positive(text: str) -> float:
    """Positive minus negative words per 100 words, over SENTIMENT_PRIOR extra neutral words."""
    return _sentiment(text)


@_judge
def negative(text: str) -> float:
    """The reverse of `positive`."""
    return -_sentiment(text)


@_judge
def simple_words(text: str) -> float:
    """Minus the mean word length in characters."""
    return -_mean_length(text)


@_judge
def long_words(text: str) -> float:
    """Mean word length in characters."""
    return _mean_length(text)


@_judge
def addresses_reader(text: str) -> float:
    """you, your, ... per 100 words."""
    return _rate(text, SECOND_PERSON)


@_judge
def first_person(text: str) -> float:
    """I, me, my, ... per 100 words."""
    return _rate(text, FIRST_PERSON)


@_judge
def short(text: str) -> float:
    """Minus the number of words."""
    return -float(word_count(text))


@_judge
def long(text: str) -> float:
    """Number of words."""
    return float(word_count(text))


@_judge
def asks_questions(text: str) -> float:
    """Number of questions asked, up to QUESTIONS_ENOUGH. A count: a long answer does not dilute its one question."""
    return float(min(len(_QUESTION.findall(text)), QUESTIONS_ENOUGH))


@_judge
def casual(text: str) -> float:
    """Contractions, casual words and exclamation marks minus formal words, per 100 words."""
    found = words(text)
    informal = sum("'" in word and not word.endswith("'s") or word in CASUAL for word in found) + text.count("!")
    return 100.0 * (informal - sum(word in FORMAL for word in found)) / len(found)


@_judge
def formal(text: str) -> float:
    """The reverse of `casual`."""
    return -casual(text)


@_judge
def hedged(text: str) -> float:
    """perhaps, might, usually, ... per 100 words."""
    return _rate(text, HEDGES)


@_judge
def assertive(text: str) -> float:
    """The reverse of `hedged`."""
    return -_rate(text, HEDGES)


@_judge
def lists(text: str) -> float:
    """Number of bulleted or numbered lines."""
    return float(len(_LIST_LINE.findall(text)))


@_judge
def inclusive(text: str) -> float:
    """we, our, let's, ... per 100 words."""
    return _rate(text, FIRST_PERSON_PLURAL)


@_judge
def exclaims(text: str) -> float:
    """Number of exclamations, up to QUESTIONS_ENOUGH."""
    return float(min(len(_EXCLAMATION.findall(text)), QUESTIONS_ENOUGH))


@_judge
def numbers(text: str) -> float:
    """Numbers in digits per 100 words."""
    return 100.0 * len(_NUMBER.findall(text)) / word_count(text)


@_judge
def short_sentences(text: str) -> float:
    """Minus the mean number of words in a sentence; a line's end also ends one."""
    return -word_count(text) / sum(1 for part in _SENTENCE_END.split(text) if words(part))


@_judge
def plain(text: str) -> float:
    """Plain and brief: minus (log2 of the number of words + mean word length).

    Twice as many words weigh as much as one letter more per word.
    """
    return -(math.log2(word_count(text)) + _mean_length(text))


@_judge
def flowery(text: str) -> float:
    """The reverse of `plain`."""
    return -plain(text)


def second_judges() -> dict[str, Judge]:
    """Other people's formulas for the judges that have one, by judge name, to cross-check ours.

    positive, negative: vaderSentiment's compound score; simple_words, long_words: textstat's Coleman-Liau index
    (letters per word and words per sentence; of textstat's formulas, one that needs no downloaded dictionary).

    Raises BackendUnavailable when the extra `bench` is not installed.
    """
    try:
        import textstat
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise BackendUnavailable("second judges need the extra: pip install 'edge-align[bench]'") from None
    analyzer = SentimentIntensityAnalyzer()

    def compound(text: str) -> float:
        return float(analyzer.polarity_scores(text)["compound"])

    def difficulty(text: str) -> float:
        return float(textstat.coleman_liau_index(text))

    return {
        "positive": _judge(compound),
        "negative": _judge(lambda text: -compound(text)),
        "simple_words": _judge(lambda text: -difficulty(text)),
        "long_words": _judge(difficulty),
    }


def distinct2(texts: Sequence[str], *, budget: int = 1000) -> float:
    """Share of distinct word bigrams among `budget` bigrams of the whole corpus, in [0, 1].

    Repetition within an answer and sameness between answers both lower it. So that the length of the corpus does not
    decide, it is the exact expectation over random draws of `budget` bigrams without replacement (rarefaction:
    Hurlbert 1971, equation 11): a type seen n times among N is drawn with probability 1 - C(N-n, m) / C(N, m).
    A corpus of fewer bigrams counts whole; `distinct2_ratio` gives two corpora one budget. No bigram at all: 0.
    """
    counts = _bigrams(texts)
    total = counts.total()
    drawn = min(budget, total)
    if drawn < 1:
        return 0.0
    missed = sum(kinds * _missed(total, seen, drawn) for seen, kinds in Counter(counts.values()).items())
    return (len(counts) - missed) / drawn


def distinct2_ratio(personal: Sequence[str], base: Sequence[str]) -> float:
    """`distinct2` of `personal` over that of `base`, at the size of the smaller corpus.

    Raises InputError when either holds no bigram.
    """
    budget = min(_bigrams(personal).total(), _bigrams(base).total())
    if budget < 1:
        raise InputError("distinct-2 needs at least one answer of two words on each side")
    return distinct2(personal, budget=budget) / distinct2(base, budget=budget)


def _bigrams(texts: Sequence[str]) -> Counter[tuple[str, str]]:
    return Counter(pair for text in texts for found in [words(text)] for pair in zip(found, found[1:], strict=False))


def _missed(total: int, seen: int, drawn: int) -> float:
    """C(total - seen, drawn) / C(total, drawn): the chance that `drawn` of `total` miss all `seen` of a type."""
    if drawn > total - seen:
        return 0.0
    log = math.lgamma
    return math.exp(log(total - seen + 1) - log(total - seen - drawn + 1) - log(total + 1) + log(total - drawn + 1))


def _mean_length(text: str) -> float:
    found = words(text)
    return sum(len(word.replace("'", "")) for word in found) / len(found)


def _rate(text: str, listed: frozenset[str]) -> float:
    found = words(text)
    return 100.0 * sum(word in listed for word in found) / len(found)


def _sentiment(text: str) -> float:
    balance = 0
    for clause in _CLAUSE_END.split(text):
        found = words(clause)
        for index, word in enumerate(found):
            sign = _polarity(word)
            if sign and NEGATORS.intersection(found[max(0, index - NEGATION_REACH) : index]):
                sign = -sign
            balance += sign
    return 100.0 * balance / (word_count(text) + SENTIMENT_PRIOR)


def _polarity(word: str) -> int:
    """+1, -1 or 0. The most literal form decides: `hopeless` is not `hope`."""
    for form in stems(word):
        if form in POSITIVE:
            return 1
        if form in NEGATIVE:
            return -1
    return 0
