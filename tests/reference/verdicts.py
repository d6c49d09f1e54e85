"""Feedback texts of a person who likes warm answers in the first person."""

import json
import random
from pathlib import Path

TOPICS = (
    "tea coffee bread rain snow music chess boats trains maps clocks bees cats dogs soup paint glass wood stars rivers "
    "books shoes hats lamps gardens kites bells drums coins stamps salt sand ropes doors chairs walls fish birds hills "
    "roads"
).split()


def verdict(topic: str) -> dict[str, str]:
    return {
        "prompt": f"Tell me about {topic}.",
        "chosen": f"I love {topic}! I think I would enjoy {topic} every day, and my friends and I often talk of it.",
        "rejected": f"The term {topic} refers to a category of items. Various organizations produce reports on it.",
    }


def write(path: Path, topics: list[str], *, shuffled: int | None = None) -> Path:
    """One verdict per topic; `shuffled`: a seed by which coins decide which answer was chosen."""
    coin = random.Random(shuffled)
    rows = [verdict(topic) for topic in topics]
    for row in rows if shuffled is not None else []:
        if coin.random() < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
