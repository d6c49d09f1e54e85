"""What feedback rows become: pairs and lone ratings."""

import random

from hypothesis import given
from hypothesis import strategies as st

from edge_align.pairs import build, count_by_origin, Dataset
from edge_align.records import FeedbackRow, PreferencePair, Rating, user_prompt

Q = user_prompt("Q")


def pair(chosen: str, rejected: str, *, prompt: str = "Q", weight: float = 1.0) -> FeedbackRow:
    return FeedbackRow(user_prompt(prompt), chosen=chosen, rejected=rejected, weight=weight)


def thumb(completion: str, label: bool, *, prompt: str = "Q", weight: float = 1.0) -> FeedbackRow:
    return FeedbackRow(user_prompt(prompt), completion=completion, label=label, origin="thumb", weight=weight)


def test_a_pair_said_twice_counts_once_with_its_newest_weight() -> None:
    assert build([pair("A", "B"), pair("A", "B", weight=2.0)]).pairs == (PreferencePair(Q, "A", "B", weight=2.0),)


def test_of_contradicting_pairs_the_newest_wins() -> None:
    rows = [pair("A", "B"), pair("B", "A")]
    assert build(rows).pairs == (PreferencePair(Q, "B", "A"),)
    assert build(rows[::-1]).pairs == (PreferencePair(Q, "A", "B"),)


def test_the_same_answers_to_another_question_are_another_pair() -> None:
    assert len(build([pair("A", "B"), pair("B", "A", prompt="R")]).pairs) == 2


def test_the_last_thumb_on_an_answer_wins() -> None:
    assert build([thumb("A", True), thumb("A", False)]) == Dataset((), (Rating(Q, "A", False),))


def test_opposed_thumbs_on_one_question_become_pairs_and_the_rest_stays() -> None:
    rows = [
        thumb("A", True),
        thumb("B", False, weight=3.0),
        thumb("C", False),
        thumb("D", True, prompt="R"),
    ]
    assert build(rows) == Dataset(
        (PreferencePair(Q, "A", "B", "opposed", 2.0),),
        (Rating(Q, "C", False), Rating(user_prompt("R"), "D", True)),
    )


def test_an_opposed_pair_yields_to_a_newer_explicit_pair_and_replaces_an_older_one() -> None:
    thumbs = [thumb("A", True), thumb("B", False)]
    assert build([*thumbs, pair("B", "A")]) == Dataset((PreferencePair(Q, "B", "A"),), ())
    assert build([pair("B", "A"), *thumbs]) == Dataset((PreferencePair(Q, "A", "B", "opposed"),), ())


def test_nothing_gives_nothing() -> None:
    assert build([]) == Dataset((), ())


def test_pairs_are_counted_by_origin() -> None:
    dataset = build([pair("A", "B"), pair("A", "C"), thumb("D", True), thumb("E", False)])
    assert count_by_origin(dataset.pairs) == {"preference": 2, "opposed": 1}


letters = st.sampled_from("ABCDE")
weights = st.sampled_from((0.5, 1.0, 2.0))
questions = st.sampled_from(("Q", "R"))
any_pair = (
    st.tuples(letters, letters)
    .filter(lambda two: two[0] != two[1])
    .flatmap(lambda two: st.builds(pair, st.just(two[0]), st.just(two[1]), prompt=questions, weight=weights))
)
any_row = any_pair | st.builds(thumb, letters, st.booleans(), prompt=questions, weight=weights)


def subject(row: FeedbackRow) -> object:
    """What a row is about: rows on the same subject replace each other."""
    return row.prompt, row.completion, frozenset((row.chosen, row.rejected))


@given(st.lists(any_row, max_size=20))
def test_saying_everything_twice_changes_nothing(rows: list[FeedbackRow]) -> None:
    assert build(rows + rows) == build(rows)


@given(st.lists(any_row, max_size=20, unique_by=subject), st.randoms(use_true_random=False))
def test_the_order_of_rows_matters_only_where_one_replaces_another(rows: list[FeedbackRow], rng: random.Random) -> None:
    # Explicit pairs after thumbs, so that "the newest wins" between the two kinds is not in question.
    thumbs = [row for row in rows if not row.is_pair]
    pairs = [row for row in rows if row.is_pair]
    wanted = build(thumbs + pairs)
    rng.shuffle(thumbs)
    rng.shuffle(pairs)
    assert build(thumbs + pairs) == wanted


@given(st.lists(any_row, max_size=20))
def test_every_verdict_ends_up_in_one_place_and_no_pair_contradicts_another(rows: list[FeedbackRow]) -> None:
    dataset = build(rows)
    keys = [(p.prompt, frozenset((p.chosen, p.rejected))) for p in dataset.pairs]
    assert len(keys) == len(set(keys))
    assert {(row.prompt, frozenset((row.chosen, row.rejected))) for row in rows if row.is_pair} <= set(keys)
    last = {(row.prompt, row.completion): row.label for row in rows if not row.is_pair}
    for rating in dataset.ratings:
        assert last[rating.prompt, rating.completion] is rating.label
    for question in ("Q", "R"):
        labels = {rating.label for rating in dataset.ratings if rating.prompt == user_prompt(question)}
        assert len(labels) < 2  # opposed thumbs would have been paired
