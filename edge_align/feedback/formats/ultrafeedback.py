"""openbmb/UltraFeedback as published: an instruction with several scored completions.

The best answer makes a pair with each strictly lower one, at most MAX_PAIRS, the widest gaps first. An answer's score
is `overall_score`, or the mean of its annotations' ratings where that is missing.
"""

from __future__ import annotations

from edge_align.errors import InputError
from edge_align.feedback.fields import Format, kind, number, optional_text, Record, text
from edge_align.records import FeedbackRow, user_prompt

MAX_PAIRS = 3


def matches(record: Record) -> bool:
    return {"instruction", "completions"} <= record.keys()


def read(record: Record) -> list[FeedbackRow]:
    asked = user_prompt(text(record["instruction"], "instruction"))
    completions = record["completions"]
    if not isinstance(completions, list):
        raise InputError(f"completions is {kind(completions)}; it must be a list of objects")
    if not all(isinstance(item, dict) for item in completions):
        raise InputError("completions holds something other than objects")
    scored = [(score(item), text(item.get("response"), "response"), item) for item in completions]
    if not scored:
        raise InputError("completions is empty")
    top, best, winner = max(scored, key=lambda entry: entry[0])  # the first of equals
    lower = sorted((entry for entry in scored if entry[0] < top and entry[1] != best), key=lambda entry: entry[0])
    if not lower:
        raise InputError("no completion scores lower than another, so there is no preference")
    model = optional_text(winner.get("model"), "model")
    return [
        FeedbackRow(asked, chosen=best, rejected=worse, model=model, source="ultrafeedback")
        for _, worse, _ in lower[:MAX_PAIRS]
    ]


def score(completion: Record) -> float:
    """How good an answer was judged; InputError when nothing says."""
    if completion.get("overall_score") is not None:
        return number(completion["overall_score"], "overall_score")
    annotations = completion.get("annotations")
    ratings = []
    for aspect in annotations.values() if isinstance(annotations, dict) else ():
        if isinstance(aspect, dict) and aspect.get("Rating") not in (None, "N/A"):
            ratings.append(number(aspect["Rating"], "Rating"))
    if not ratings:
        raise InputError("a completion has neither overall_score nor ratings")
    return sum(ratings) / len(ratings)


FORMAT = Format("ultrafeedback", matches, read)
