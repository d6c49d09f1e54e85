"""Prompts, judges and simulated users. Expected numbers are counted by hand from the texts."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_align.errors import InputError
from edge_align.simulation import combinations, judges
from edge_align.simulation.foreign import foreign_pairs
from edge_align.simulation.lexicon import NEGATIVE, POSITIVE
from edge_align.simulation.prompts import compare_prompts, MATERIAL, prompts, PromptSet
from edge_align.simulation.users import (
    bootstrap_interval,
    COMBINED_USERS,
    make_pairs,
    MORE_USERS,
    pair_lines,
    User,
    user,
    USERS,
    win_rate,
    wins,
)

SETS: tuple[PromptSet, ...] = ("pack", "train", "validation", "test")
LENGTH = User("length", lambda text: float(len(text)), "likes many characters")

# Words that say nothing about a topic.
FUNCTION_WORDS = frozenset(
    """a about again all always am an and another any are at be been before both by can cannot do does during every few
    for from get got had has have her his how i in into is it its last me my never nothing of off on one or our out over
    same so than that the their them they this to too two up us was we were what when where which while who why will
    with would you your first full i'm keep made make making more most new no not old other too want wants went go goes
    come came up down give gives given find found s still second whole as take taking try want feel""".split()
)


def content_words(texts: list[str]) -> set[str]:
    """Lower-cased content words, plural endings off."""
    found = {word for text in texts for word in re.findall(r"[a-z]+", text.lower())} - FUNCTION_WORDS
    return {word[:-1] if word.endswith("s") and len(word) > 3 else word for word in found}


def topics(name: str) -> list[str]:
    material = MATERIAL[name]
    return [*material.things, *material.doings, *itertools.chain(*material.pairs), *material.situations]


# prompts


@pytest.mark.parametrize(
    ("name", "at_least", "templates", "subjects"),
    [("pack", 900, 30, 90), ("train", 300, 12, 40), ("validation", 120, 12, 40), ("test", 100, 12, 40)],
)
def test_each_prompt_set_is_as_large_and_as_varied_as_promised(
    name: PromptSet, at_least: int, templates: int, subjects: int
) -> None:
    found = prompts(name)
    assert len(found) == len(set(found)) >= at_least
    assert len(set(MATERIAL[name].templates)) == len(MATERIAL[name].templates) >= templates
    assert len(set(topics(name))) == len(topics(name)) >= subjects
    assert all(text.strip() == text and "{" not in text and text[-1] in ".?" for text in found)


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SETS, 2)))
def test_two_sets_share_no_prompt_no_template_and_no_content_word_of_a_topic(one: PromptSet, other: PromptSet) -> None:
    assert not set(prompts(one)) & set(prompts(other))
    assert not set(MATERIAL[one].templates) & set(MATERIAL[other].templates)
    assert content_words(topics(one)) & content_words(topics(other)) == set()


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SETS, 2)))
def test_two_sets_share_no_run_of_four_template_words(one: PromptSet, other: PromptSet) -> None:
    def runs(name: str) -> set[tuple[str, ...]]:
        split = [re.findall(r"\{?\w+\}?", template.lower()) for template in MATERIAL[name].templates]
        return {tuple(found[i : i + 4]) for found in split for i in range(len(found) - 3)}

    assert runs(one) & runs(other) == set()


@pytest.mark.parametrize("name", SETS)
def test_the_first_round_uses_every_template_once_and_no_topic_twice(name: PromptSet) -> None:
    material = MATERIAL[name]
    first = prompts(name)[: len(material.templates)]
    used = []
    for template in material.templates:
        pattern = re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(template))
        matches = [found for text in first if (found := re.fullmatch(pattern, text, re.IGNORECASE))]
        assert len(matches) == 1, template
        used.append(matches[0].group(1).lower())
    assert len(set(used)) == len(used)


def test_prompts_are_the_same_on_every_machine() -> None:
    """Pinned, so that a pack, its training pairs and its claims go on meaning the same prompts."""
    text = "\n".join(prompt for name in SETS for prompt in prompts(name))
    digest = "d6f667b7b595b9e66779a0bb641edc2aa776cf6a7ee49a08e09b4f03c7db3e45"
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_compare_prompts_are_twelve_and_in_no_set() -> None:
    assert len(set(compare_prompts())) == 12
    assert not set(compare_prompts()) & {prompt for name in SETS for prompt in prompts(name)}


def test_an_unknown_prompt_set_is_named() -> None:
    with pytest.raises(InputError, match="no prompt set 'dev'"):
        prompts("dev")  # type: ignore[arg-type]


# judges


@pytest.mark.parametrize(
    ("judge", "text", "expected"),
    [
        (judges.positive, "A wonderful day.", 100 / 23),  # 1 of 3 words, 20 neutral ones added
        (judges.positive, "A sad and lonely day.", -200 / 25),
        (judges.positive, "It is not bad.", 100 / 24),  # negated
        (judges.positive, "It isn\u2019t good.", -100 / 23),  # a curly apostrophe
        (judges.positive, "It is not. Good!", 100 / 24),  # a negator ends with its clause
        (judges.positive, "No one there was ever good.", 100 / 26),  # a negator four words back is out of reach
        (judges.positive, "He worries.", -100 / 22),  # worry
        (judges.positive, "The table is round.", 0.0),
        (judges.negative, "A sad and lonely day.", 200 / 25),
        (judges.simple_words, "I can't go", -(1 + 4 + 2) / 3),
        (judges.long_words, "The elephant sat", (3 + 8 + 3) / 3),
        (judges.addresses_reader, "You know your dog, I know mine.", 100 * 2 / 7),
        (judges.addresses_reader, "You're right; youth is not you.", 100 * 2 / 6),
        (judges.first_person, "I\u2019ll keep my own, he keeps his.", 100 * 2 / 7),
        (judges.first_person, "In Rome it rains.", 0.0),
        (judges.short, "One two, three!", -3.0),
        (judges.long, "One two, three!", 3.0),
        (judges.asks_questions, "Really?! Who? I see.", 2.0),
        (judges.asks_questions, "What??", 1.0),
        (judges.asks_questions, "A? B? C? D? E?", 3.0),  # enough is enough
        (judges.casual, "Hey, that's what I don't get!", 100 * 3 / 6),  # hey, don't, !
        (judges.formal, "Moreover, we therefore require it.", 100 * 3 / 5),
        (judges.hedged, "Perhaps it might rain.", 50.0),
        (judges.assertive, "Perhaps it might rain.", -50.0),
        (judges.lists, "Buy:\n- milk\n* eggs\n 2. tea\n2024 was good\n-5 degrees", 3.0),
        (judges.inclusive, "Let's see what we can do for our use.", 100 * 3 / 9),
        (judges.exclaims, "Go! Run!! Now?! Ha! Stop.", 3.0),
        (judges.numbers, "In 1999 it cost 3.50, or 1,200 pence.", 100 * 3 / 10),
        (judges.short_sentences, "It rains. We go home\nand sleep!", -7 / 3),
        (judges.plain, "Stop now it is", -(2 + (4 + 3 + 2 + 2) / 4)),
        (judges.flowery, "Stop now it is", 2 + (4 + 3 + 2 + 2) / 4),
    ],
)
def test_judges_give_the_numbers_counted_by_hand(judge: judges.Judge, text: str, expected: float) -> None:
    assert judge(text) == pytest.approx(expected)


@pytest.mark.parametrize("known", [*USERS, *MORE_USERS, *COMBINED_USERS], ids=lambda known: known.name)
@pytest.mark.parametrize("text", ["", "  \n", "?!", "\U0001f600", "- \n- "])
def test_an_answer_without_a_word_is_worse_than_any_answer_to_everybody(known: User, text: str) -> None:
    assert known.judge(text) == judges.EMPTY
    assert known.judge("word " * 2000) > judges.EMPTY


texts = st.text(alphabet=st.sampled_from("abeno't ?!.,\n\u2019good badhappyIyou"), max_size=80)


@given(texts, st.sampled_from(sorted(POSITIVE)))
def test_a_positive_word_in_a_sentence_of_its_own_never_makes_an_answer_less_positive(text: str, word: str) -> None:
    assert judges.positive(f"{text}. {word}") >= judges.positive(text)
    assert judges.negative(f"x {text}. {word}") <= judges.negative(f"x {text}")


@given(texts, st.sampled_from(sorted(NEGATIVE)))
def test_a_negative_word_in_a_sentence_of_its_own_never_makes_an_answer_more_positive(text: str, word: str) -> None:
    assert judges.positive(f"x {text}. {word}") <= judges.positive(f"x {text}")


@given(texts)
def test_adding_what_a_user_likes_never_costs(text: str) -> None:
    assert judges.addresses_reader(f"{text} you") >= judges.addresses_reader(text)
    assert judges.first_person(f"{text} I") >= judges.first_person(text)
    assert judges.asks_questions(f"{text} so?") >= judges.asks_questions(text)
    assert judges.simple_words(f"{text} a") >= judges.simple_words(text)
    assert judges.short(f"x {text} a") < judges.short(f"x {text}")


def test_the_lexicon_has_hundreds_of_words_each_way_and_none_both_ways() -> None:
    assert len(POSITIVE) >= 300 and len(NEGATIVE) >= 300
    assert not POSITIVE & NEGATIVE


def test_second_judges_agree_with_ours_on_clear_cases() -> None:
    pytest.importorskip("vaderSentiment", reason="extra bench")
    pytest.importorskip("textstat", reason="extra bench")
    second = judges.second_judges()
    cheerful, gloomy = "What a wonderful, happy day!", "What a horrible, sad day."
    plain, learned = "The cat sat on the mat.", "Considerable institutional complexity undermines comprehension."
    assert second["positive"](cheerful) > 0.5 and second["negative"](gloomy) > 0.5
    assert second["simple_words"](plain) > second["simple_words"](learned)
    assert second["long_words"](learned) > second["long_words"](plain)
    assert {judge("") for judge in second.values()} == {judges.EMPTY}


def test_distinct2_is_the_expected_share_of_distinct_bigrams_in_a_draw() -> None:
    assert judges.distinct2(["a b a b"]) == pytest.approx(2 / 3)  # ab, ba, ab
    # two of {ab, ab, ba}: {ab, ab} has 1 distinct, the other two draws have 2: (1 + 2 + 2) / 3 / 2
    assert judges.distinct2(["a b a b"], budget=2) == pytest.approx(5 / 6)
    assert judges.distinct2(["a b", "b a"]) == 1.0  # no bigram runs over two answers
    assert judges.distinct2(["", "word"]) == 0.0


def test_distinct2_is_not_decided_by_length() -> None:
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(50)]
    long = [" ".join(rng.choice(vocabulary, 81)) for _ in range(100)]
    short = [" ".join(rng.choice(vocabulary, 21)) for _ in range(100)]
    assert judges.distinct2_ratio(long, short) == pytest.approx(1.0, abs=0.03)
    assert judges.distinct2(long, budget=8000) < 0.6 * judges.distinct2(short, budget=8000)
    assert judges.distinct2_ratio(["the same thing " * 30] * 100, short) < 0.1
    with pytest.raises(InputError, match="two words"):
        judges.distinct2_ratio(["word"], short)


# users


def test_the_eight_users_stand_in_the_order_they_are_reported() -> None:
    assert [known.name for known in USERS] == [
        "positive",
        "negative",
        "simple_words",
        "long_words",
        "addresses_reader",
        "first_person",
        "short",
        "asks_questions",
    ]
    assert user("short").max_tokens == 256
    with pytest.raises(InputError, match="no user 'grumpy'"):
        user("grumpy")


def test_people_of_three_tastes_add_up_what_is_counted_in_its_own_spread() -> None:
    """By hand: 4 words of 2.75 letters in the mean, nothing cheerful or casual; then 2 words, 1 cheerful, 1 casual."""
    dull, warm = "Stop now it is", "great stuff"
    assert judges.casual(warm) == 50.0 and judges.positive(warm) == pytest.approx(100 / 22)
    friendly = (50.0 / 3.4 + 100 / 22 / 2.6) / 2**0.5
    expected = {
        "elementary_concise_friendly": (-2.75 / 0.49 - 2 / 1.15, -5 / 0.49 - 1 / 1.15 + friendly),
        "expert_concise_unfriendly": (2.75 / 0.49 - 2 / 1.15, 5 / 0.49 - 1 / 1.15 - friendly),
        "elementary_informative_unfriendly": (-2.75 / 0.49 + 2 / 1.15, -5 / 0.49 + 1 / 1.15 - friendly),
    }
    for name, values in expected.items():
        assert (user(name).judge(dull), user(name).judge(warm)) == pytest.approx(values)


def test_the_eight_people_of_three_tastes_are_all_combinations_and_each_has_an_opposite() -> None:
    names = [known.name for known in COMBINED_USERS]
    assert len(set(names)) == 8 and names[0] == "elementary_concise_friendly"
    assert all(known.max_tokens == 256 for known in COMBINED_USERS)
    other = {a: b for _, kinds in combinations.DIMENSIONS for a, b in (list(kinds), list(kinds)[::-1])}
    for known in COMBINED_USERS:
        opposite = user("_".join(other[kind] for kind in known.name.split("_")))
        assert opposite.judge("A fine day, isn't it?") == -known.judge("A fine day, isn't it?")


answer_tables = st.lists(st.lists(st.text(alphabet="ab ", max_size=5), max_size=4), min_size=1, max_size=8)


@given(answer_tables, st.integers(0, 2**32 - 1), st.sampled_from(["extreme", "random"]))
def test_pairs_never_hold_equal_scores_or_blank_answers_and_the_better_is_chosen(
    answers: list[list[str]], seed: int, pick: str
) -> None:
    questions = [f"question {i}" for i in range(len(answers))]
    possible = sum(len(a) > len(b) and bool(b.strip()) and bool(a.strip()) for row in answers for a in row for b in row)
    if not possible:
        return
    rng = np.random.default_rng(seed)
    pairs = make_pairs(LENGTH, questions, answers, n=possible, rng=rng, pick=pick)  # type: ignore[arg-type]
    assert len(pairs) == possible
    for pair in pairs:
        row = answers[questions.index(pair.prompt[0].content)]
        assert pair.chosen in row and pair.rejected in row and pair.rejected.strip()
        assert len(pair.chosen) > len(pair.rejected)
    with pytest.raises(InputError, match=f"only {possible} pairs apart"):
        make_pairs(LENGTH, questions, answers, n=possible + 1, rng=rng)


def test_every_prompt_gives_its_best_and_worst_before_any_gives_a_second_pair() -> None:
    questions = [f"question {i}" for i in range(10)]
    answers = [["aa", "aaaa", "a", "aaa"]] * 10
    pairs = make_pairs(LENGTH, questions, answers, n=15, rng=np.random.default_rng(3))
    assert {pair.prompt[0].content for pair in pairs[:10]} == set(questions)
    assert [pair.prompt[0].content for pair in pairs[:10]] != questions
    assert {(pair.chosen, pair.rejected) for pair in pairs[:10]} == {("aaaa", "a")}
    assert all(len(pair.chosen) - len(pair.rejected) == 2 for pair in pairs[10:])


def test_the_same_seed_gives_the_same_pairs_and_another_seed_others() -> None:
    questions = [f"question {i}" for i in range(10)]
    answers = [["aa", "aaaa", "a", "aaa"]] * 10

    def drawn(seed: int) -> list[object]:
        return list(make_pairs(LENGTH, questions, answers, n=10, rng=np.random.default_rng(seed), pick="random"))

    assert drawn(1) == drawn(1) != drawn(2)


def test_narrow_margins_are_passed_over() -> None:
    # margins 1, 2, 3, 4: the median is 2.5, so two pairs are wide enough
    answers = [["a", "aa"], ["a", "aaa"], ["a", "aaaa"], ["a", "aaaaa"]]
    rng = np.random.default_rng(0)
    pairs = make_pairs(LENGTH, list("pqrs"), answers, n=2, rng=rng, margin_quantile=0.5)
    assert {len(pair.chosen) for pair in pairs} == {4, 5}
    with pytest.raises(InputError, match="only 2 pairs apart"):
        make_pairs(LENGTH, list("pqrs"), answers, n=3, rng=rng, margin_quantile=0.5)


@pytest.mark.parametrize(("flip", "low", "high"), [(0.0, 0, 0), (0.3, 250, 350), (1.0, 1000, 1000)])
def test_flips_turn_the_stated_share_of_verdicts(flip: float, low: int, high: int) -> None:
    """0.3 of 1,000 has a standard deviation of 14.5; the bounds are 3.4 of them."""
    questions = [f"question {i}" for i in range(1000)]
    pairs = make_pairs(LENGTH, questions, [["a", "aa"]] * 1000, n=1000, rng=np.random.default_rng(5), flip=flip)
    assert low <= sum(pair.chosen == "a" for pair in pairs) <= high


def test_options_and_lengths_that_make_no_sense_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="2 prompts but 1 lists"):
        make_pairs(LENGTH, ["p", "q"], [["a", "aa"]], n=1, rng=rng)
    with pytest.raises(InputError, match="flip in"):
        make_pairs(LENGTH, ["p"], [["a", "aa"]], n=1, rng=rng, flip=1.5)
    with pytest.raises(InputError, match="cannot be set against"):
        win_rate(judges.short, ["one"], [])
    with pytest.raises(InputError, match="cannot be set against"):
        win_rate(judges.short, [], [])


def test_win_rate_counts_a_tie_as_half() -> None:
    personal, base = ["one", "one two", "one two", "one"], ["one two", "one", "two one", "one two three"]
    assert wins(judges.short, personal, base).tolist() == [1.0, 0.0, 0.5, 1.0]
    assert win_rate(judges.short, personal, base) == 0.625
    assert win_rate(judges.long, personal, base) == 0.375


def test_two_empty_answers_tie_and_an_empty_answer_loses() -> None:
    assert wins(judges.short, ["", "", "word"], ["", "word " * 300, ""]).tolist() == [0.5, 0.0, 1.0]


def test_the_bootstrap_interval_agrees_with_the_normal_one() -> None:
    values = np.array([1.0] * 70 + [0.0] * 30)
    low, high = bootstrap_interval(values, rng=np.random.default_rng(0), draws=4000)
    half = 1.96 * (0.7 * 0.3 / 100) ** 0.5  # 0.0898
    assert low == pytest.approx(0.7 - half, abs=0.015) and high == pytest.approx(0.7 + half, abs=0.015)
    assert bootstrap_interval(np.ones(5), rng=np.random.default_rng(0)) == (1.0, 1.0)


def test_foreign_pairs_are_told_apart_by_their_judge_and_never_repeat() -> None:
    pairs = foreign_pairs("plain", n=200, rng=np.random.default_rng(0))
    assert len({(pair.prompt, pair.chosen, pair.rejected) for pair in pairs}) == 200
    assert len({pair.prompt for pair in pairs[:46]}) == 46
    assert all(judges.plain(pair.chosen) > judges.plain(pair.rejected) for pair in pairs)
    reverse = foreign_pairs("flowery", n=200, rng=np.random.default_rng(0))
    assert [(pair.chosen, pair.rejected) for pair in reverse] == [(pair.rejected, pair.chosen) for pair in pairs]
    used = {prompt for name in SETS for prompt in prompts(name)}
    assert not used & {pair.prompt[0].content for pair in pairs}
    with pytest.raises(InputError, match="no foreign user"):
        foreign_pairs("terse", n=1, rng=np.random.default_rng(0))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="fewer than 9999"):
        foreign_pairs("plain", n=9999, rng=np.random.default_rng(0))


def test_pairs_are_written_as_the_lines_of_a_feedback_file() -> None:
    pairs = make_pairs(LENGTH, ["Why?\n\u00e9"], [["a", "b\nc"]], n=1, rng=np.random.default_rng(0))
    (line,) = pair_lines(pairs)
    assert "\n" not in line
    assert json.loads(line) == {"prompt": "Why?\n\u00e9", "chosen": "b\nc", "rejected": "a"}


def test_importing_the_simulation_loads_neither_numpy_nor_another_library() -> None:
    code = (
        "import sys, edge_align.simulation.users, edge_align.simulation.prompts, edge_align.simulation.foreign; "
        "print(sorted({'numpy', 'torch', 'llama_cpp', 'textstat', 'vaderSentiment'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
