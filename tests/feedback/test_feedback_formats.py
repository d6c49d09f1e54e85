"""Every format's fixture gives exactly the rows that are written down here."""

from pathlib import Path

import pytest

from edge_align.errors import InputError
from edge_align.feedback import fields
from edge_align.feedback.formats import open_webui
from edge_align.feedback.read import read_feedback
from edge_align.records import DroppedRow, FeedbackRow, Message, user_prompt

FIXTURES = Path(__file__).parent / "fixtures"
SKY = user_prompt("What color is the sky?")


def read(name: str, *, user: str | None = None) -> tuple[list[FeedbackRow], dict[int, str]]:
    """(rows, reason by line) of a fixture."""
    items = list(read_feedback(FIXTURES / name, name=name, user=user))
    dropped = {item.line: item.reason for item in items if isinstance(item, DroppedRow)}
    assert all(item.file == name for item in items if isinstance(item, DroppedRow))
    return [item for item in items if isinstance(item, FeedbackRow)], dropped


def test_native_rows_keep_their_metadata_and_edits_become_pairs() -> None:
    rows, dropped = read("native.jsonl")
    assert rows == [
        FeedbackRow(
            user_prompt("Explain DNS"), completion="DNS maps names.", label=True, origin="thumb", weight=2.0,
            reason="short", tags=("style",), ts="2025-01-02T03:04:05Z", model="m", id="n1", source="native",
        ),
        FeedbackRow(
            user_prompt("Explain TCP"), chosen="A short text.", rejected="A long text.", origin="edit",
            ts="2024-10-27T03:33:20+00:00", source="native",
        ),
        FeedbackRow(user_prompt("Hi", system="Be kind."), chosen="Hello!", rejected="What?", weight=0.5),
        FeedbackRow(user_prompt("Same"), completion="Kept.", label=True, origin="thumb"),
    ]  # fmt: skip
    assert dropped == {5: "edited is the same text as completion"}


def test_trl_rows_of_every_type_are_read() -> None:
    rows, dropped = read("trl.jsonl")
    blue = FeedbackRow(SKY, chosen="It is blue.", rejected="It is green.", source="trl")
    assert rows == [
        FeedbackRow(user_prompt("The sky is"), chosen=" blue.", rejected=" green.", source="trl"),
        FeedbackRow(user_prompt("The sky is"), chosen=" blue.", rejected=" black.", source="trl"),
        blue,
        blue,
        FeedbackRow(user_prompt("The sky is"), completion=" blue.", label=True, origin="thumb", source="trl"),
        FeedbackRow(SKY, completion="It is green.", label=False, origin="thumb", source="trl"),
        FeedbackRow(user_prompt("Who?"), completion="Me.", label=True, origin="thumb", source="trl"),
    ]
    assert dropped == {}


def test_hh_rlhf_transcripts_are_split_into_turns() -> None:
    rows, dropped = read("hh_rlhf.jsonl")
    poem = (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "A poem"))
    assert rows == [
        FeedbackRow(user_prompt("Hi"), chosen="Hello!", rejected="No.", source="hh_rlhf"),
        FeedbackRow(poem, chosen="Roses\n\nare red.", rejected=" Later. ", source="hh_rlhf"),
    ]
    assert dropped == {
        3: "the two transcripts differ before their last answer",
        4: "a transcript does not end with an answer of the assistant",
    }


def test_ultrafeedback_pairs_the_best_with_at_most_three_lower_answers() -> None:
    rows, dropped = read("ultrafeedback.jsonl")
    q1 = [
        FeedbackRow(user_prompt("Q1"), chosen="B", rejected=worse, model="b", source="ultrafeedback")
        for worse in ("D", "E", "A")  # 2, 4, 6.5; F (7) is the fourth
    ]
    # Q2 has no overall_score: 3 against the mean of 5 and 2.
    assert rows == [*q1, FeedbackRow(user_prompt("Q2"), chosen="B", rejected="A", model="b", source="ultrafeedback")]
    assert dropped == {
        3: "no completion scores lower than another, so there is no preference",
        4: "completions is empty",
        5: "a completion has neither overall_score nor ratings",
    }


def test_ultrafeedback_binarized_does_not_repeat_the_question() -> None:
    rows, dropped = read("ultrafeedback_binarized.jsonl")
    assert rows == [FeedbackRow(user_prompt("Q"), chosen="R1", rejected="R2", source="ultrafeedback_binarized")]
    assert dropped == {
        2: "score_chosen is not above score_rejected, so there is no preference",
        3: "the turns before the answer in chosen are not the prompt",
    }


def test_openai_preference_rows_are_read_and_tools_are_refused() -> None:
    rows, dropped = read("openai.jsonl")
    assert rows == [FeedbackRow(user_prompt("Q"), chosen="A", rejected="B", source="openai")]
    assert dropped == {
        2: "preferred_output holds tool calls; only text can be learnt from",
        3: "input.messages has a message of role 'tool'; only system, user, assistant can be learnt from",
        4: "input is text; it must be an object with messages",
    }


def test_gpt4all_edits_become_pairs_and_ratings_stay_unpaired() -> None:
    rows, dropped = read("gpt4all.jsonl")
    asked = user_prompt("Hi")
    later = (*asked, Message("assistant", "Hello"), Message("user", "Bye"))
    assert rows == [
        FeedbackRow(asked, chosen="Hi!", rejected="Hello", origin="edit", model="m.gguf", source="gpt4all"),
        FeedbackRow(later, completion="Ciao", label=True, origin="thumb", model="m.gguf", source="gpt4all"),
    ]
    assert dropped == {2: "this is one rated message without its question; export the whole conversation"}


def test_open_webui_siblings_become_pairs_and_the_last_rating_of_a_message_wins() -> None:
    rows, dropped = read("open_webui.json")
    asked = user_prompt("Hi", system="Be brief.")
    later = (*asked, Message("assistant", "Hello."), Message("user", "Thanks"))
    assert rows == [
        FeedbackRow(
            asked, chosen="Hello.", rejected="Hello, how are you today?", origin="siblings",
            weight=(1.0 + 1.8) / 2,  # rated 8 and 1: (8 - 5.5) / 2.5 and (5.5 - 1) / 2.5
            ts="2024-10-27T03:33:23+00:00", model="m", id="f3", source="open_webui",
        ),
        FeedbackRow(
            later, completion="Welcome!", label=True, origin="thumb", weight=1.8, ts="2024-10-27T03:33:24+00:00",
            model="m", id="f4", source="open_webui",
        ),
    ]  # fmt: skip
    assert dropped == {
        1: "there is no snapshot of the chat, so its texts are unknown; export again with the chats",
        5: "a later rating of the same message replaces this one",
        6: "rating is 0; it must be 1 or -1",
    }


def test_csv_columns_are_found_whatever_their_case_delimiter_or_order() -> None:
    rows, dropped = read("pairs.csv")
    assert rows == [
        FeedbackRow(
            user_prompt('Explain "DNS",\r\nplease'), chosen="Short.", rejected="Long, long.", weight=2.0, source="csv"
        )
    ]
    assert dropped == {
        4: "rejected is empty",
        5: "the line does not have the 4 cells of the header",
        6: "weight is 'heavy'; it must be a number",
    }
    rows, dropped = read("labels.csv")
    assert rows == [
        FeedbackRow(user_prompt("Q1"), completion="A", label=True, origin="thumb", source="csv"),
        FeedbackRow(user_prompt("Q2"), completion="B", label=False, origin="thumb", source="csv"),
        FeedbackRow(user_prompt("Q3"), chosen="D", rejected="C", origin="edit", source="csv"),
    ]
    assert dropped == {
        5: "label is empty",
        6: "unknown label 'maybe'; use true/false, 1/0, 1/-1, up/down, good/bad or a thumbs emoji",
    }


@pytest.mark.parametrize("value", [True, 1, 1.0, "1", "true", "TRUE", " up", "Good", "👍", "👍🏿", "👍️"])
def test_every_spelling_of_a_thumb_up_is_known(value: object) -> None:
    assert fields.label(value) is True


@pytest.mark.parametrize("value", [False, 0, -1, 0.0, -1.0, "0", "-1", "false", "down", "BAD", "👎", "👎🏻"])
def test_every_spelling_of_a_thumb_down_is_known(value: object) -> None:
    assert fields.label(value) is False


@pytest.mark.parametrize("value", [2, "maybe", 0.5, None, [], {}, "", "yes!", 10**400, float("nan"), "\ud800"])
def test_any_other_label_is_refused_in_one_line(value: object) -> None:
    with pytest.raises(InputError, match="label") as caught:
        fields.label(value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1730000000, "2024-10-27T03:33:20+00:00"),
        (1730000000000, "2024-10-27T03:33:20+00:00"),
        (1730000000000000000, "2024-10-27T03:33:20+00:00"),
        ("yesterday", "yesterday"),
        (None, None),
    ],
)
def test_numeric_times_become_iso_8601(value: object, expected: str | None) -> None:
    assert fields.timestamp(value, "ts") == expected


@pytest.mark.parametrize(
    ("verdict", "rating", "expected"),
    [(True, None, 1.0), (True, 6, 0.2), (True, 10, 1.8), (False, 5, 0.2), (False, 1, 1.8), (True, 2, 0.2)],
)
def test_the_weight_of_a_verdict_follows_its_one_to_ten_rating(verdict: bool, rating: object, expected: float) -> None:
    assert open_webui.weight(verdict, {"rating": rating}) == pytest.approx(expected)


def test_a_sibling_rated_only_in_the_snapshot_still_makes_a_pair() -> None:
    record = {
        "id": "f", "user_id": "u", "type": "rating", "data": {"rating": 1}, "meta": {"message_id": "b", "chat_id": "c"},
        "updated_at": 1730000000,
        "snapshot": {"chat": {"chat": {"history": {"messages": {
            "a": {"parentId": None, "role": "user", "content": "Hi"},
            "b": {"parentId": "a", "role": "assistant", "content": "Good."},
            "c": {"parentId": "a", "role": "assistant", "content": "Bad.", "annotation": {"rating": -1}},
            "d": {"parentId": "a", "role": "assistant", "content": "Too.", "annotation": {"rating": 1}},
            "e": {"parentId": "a", "role": "assistant", "content": "", "annotation": {"rating": -1}},
        }}}}},
    }  # fmt: skip
    rows = open_webui.read(record)
    assert [(row.chosen, row.rejected, row.origin) for row in rows] == [("Good.", "Bad.", "siblings")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Say hi: hello", "Say hi: hell", ("Say hi:", " hello", " hell")),
        ("ab cd x", "ab cdef", ("ab", " cd x", " cdef")),
        ("ab cdef", "ab cd x", ("ab", " cdef", " cd x")),
        ("Q\nA1", "Q\nB1", ("Q", "\nA1", "\nB1")),
    ],
)
def test_an_implicit_prompt_ends_with_a_whole_word(chosen: str, rejected: str, expected: tuple[str, ...]) -> None:
    from edge_align.feedback.turns import split_common

    assert split_common(chosen, rejected) == expected


def test_chatgpt_answers_written_again_make_pairs_with_the_one_gone_on_from() -> None:
    rows, dropped = read("chatgpt.json")
    assert rows == [
        FeedbackRow(
            user_prompt("Hi"), chosen="Hi!", rejected="Hello, how may I help?", origin="siblings", weight=0.5,
            ts="2025-01-02T03:04:05+00:00", model="m", id="n3:n2", source="chatgpt",
        )
    ]  # fmt: skip
    assert "no preference" in dropped[2]


def test_lm_studio_versions_make_pairs_with_the_selected_one() -> None:
    rows, dropped = read("lm_studio.jsonl")
    assert rows == [
        FeedbackRow(
            user_prompt("Hi", system="Be kind."), chosen="Hi!", rejected="Hello, how may I help?", origin="siblings",
            weight=0.5, source="lm_studio",
        )
    ]  # fmt: skip
    assert "second version" in dropped[2] and "currentlySelected" in dropped[3]
