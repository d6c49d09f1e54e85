"""What is exported comes back as it was; what is broken never raises anything but InputError."""

import io
import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_align.errors import InputError
from edge_align.feedback.detect import detect, FORMATS
from edge_align.feedback.export import to_line, to_trl
from edge_align.feedback.formats import csv
from edge_align.feedback.read import read_feedback
from edge_align.records import FeedbackRow, Message, Origin, user_prompt

FIXTURES = sorted((Path(__file__).parent / "fixtures").iterdir())

characters = st.characters(exclude_characters="\x00", exclude_categories=["Cs"])
strings = st.text(characters, max_size=20)
texts = strings.filter(lambda text: bool(text.strip()))
prompts = st.lists(st.builds(Message, st.sampled_from(("system", "user", "assistant")), texts), max_size=3).flatmap(
    lambda head: texts.map(lambda text: (*head, Message("user", text)))
)
metadata = {
    "origin": st.sampled_from(get_args(Origin)),
    "weight": st.floats(0, 100, exclude_min=True),
    "reason": st.none() | strings,
    "tags": st.lists(strings, max_size=3).map(tuple),
    "ts": st.none() | strings,
    "model": st.none() | strings,
    "id": st.none() | strings,
    "source": strings,
}
answers = st.lists(texts, min_size=2, max_size=2, unique=True)
pairs = answers.flatmap(
    lambda two: st.builds(FeedbackRow, prompts, chosen=st.just(two[0]), rejected=st.just(two[1]), **metadata)
)
ratings = st.builds(FeedbackRow, prompts, completion=texts, label=st.booleans(), **metadata)
rows = pairs | ratings


@given(st.lists(rows, min_size=1, max_size=5))
@example([FeedbackRow(user_prompt("\ufeff"), completion="a\u2028b", label=False, weight=5e-324)])
def test_exported_rows_come_back_field_for_field(wanted: list[FeedbackRow]) -> None:
    data = "".join(to_line(row) for row in wanted).encode()
    assert list(read_feedback(io.BytesIO(data), name="f")) == wanted


@given(rows)
def test_rows_survive_escaped_json_and_arrays_too(row: FeedbackRow) -> None:
    data = json.dumps([to_trl(row)], indent=1).encode()
    assert list(read_feedback(io.BytesIO(data), name="f")) == [row]


def test_the_export_has_the_columns_trl_trains_on() -> None:
    pair = to_trl(FeedbackRow(user_prompt("Q", system="S"), chosen="A", rejected="B"))
    assert list(pair)[:3] == ["prompt", "chosen", "rejected"]
    assert pair["prompt"] == [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    assert pair["chosen"] == [{"role": "assistant", "content": "A"}]
    rating = to_trl(FeedbackRow(user_prompt("Q"), completion="A", label=False))
    assert list(rating)[:3] == ["prompt", "completion", "label"]
    assert rating["label"] is False


def test_the_widest_row_that_is_read_can_be_written_and_read_again() -> None:
    row = FeedbackRow(user_prompt("Q"), chosen="A" + "\x01" * ((1 << 20) - 9), rejected="B")  # six bytes each in JSON
    assert list(read_feedback(io.BytesIO(to_line(row).encode()), name="f")) == [row]


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_rows_of_every_format_survive_an_export(path: Path) -> None:
    first = [item for item in read_feedback(path, name="f") if isinstance(item, FeedbackRow)]
    assert first
    data = "".join(to_line(row) for row in first).encode()
    assert list(read_feedback(io.BytesIO(data), name="g")) == first


# Keys that the readers look at, so that arbitrary values get past `matches`.
KEYS = (
    "prompt chosen rejected completion label edited origin weight reason tags ts model id source role content rating "
    "edited_content conversation messages input preferred_output non_preferred_output instruction completions response "
    "overall_score annotations Rating score_chosen score_rejected data meta snapshot chat history message_id parentId "
    "type user_id updated_at details a b"
).split()
STRINGS = ("a", "b", "user", "assistant", "system", "tool", "text", "rating", "1", "-1", "\n\nHuman: a\n\nAssistant: b")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(STRINGS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=25,
)
SHAPES = (
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected", "weight", "tags"),
    ("chosen", "rejected", "score_chosen", "score_rejected"),
    ("prompt", "completion", "label", "ts"),
    ("prompt", "completion", "edited", "label"),
    ("input", "preferred_output", "non_preferred_output"),
    ("instruction", "completions"),
    ("conversation",),
    ("data", "meta", "snapshot", "updated_at"),
)
shaped = st.sampled_from(SHAPES).flatmap(lambda keys: st.fixed_dictionaries({key: json_values for key in keys}))


def fixture_records() -> list[Any]:
    """Every record of the JSON fixtures."""
    found: list[Any] = []
    for path in FIXTURES:
        if path.suffix == ".json":
            found += json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            found += [json.loads(line) for line in path.read_text().splitlines()]
    return found


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside `value`."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in ((value, key), *places(value[key]))]


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    """A record that a reader knows, with one or two values inside it replaced."""
    record = json.loads(json.dumps(draw(st.sampled_from(fixture_records()))))
    for _ in range(draw(st.integers(1, 2))):
        container, key = draw(st.sampled_from(places(record)))
        container[key] = draw(json_values)
    return record


@given(json_values | shaped | damaged())
@settings(max_examples=300)
def test_no_reader_raises_anything_but_input_error_on_any_json_value(value: Any) -> None:
    try:
        detect(value)
    except InputError as error:
        assert "\n" not in str(error)
    if not isinstance(value, dict):
        return
    for reader in (*FORMATS, csv.FORMAT):
        if reader.matches(value):
            try:
                made = reader.read(value)
            except InputError as error:
                assert "\n" not in str(error)
            else:
                assert made and all(isinstance(row, FeedbackRow) for row in made)


def survives(data: bytes, name: str) -> None:
    """Reading `data` gives items or an InputError; both are one line each."""
    try:
        for item in read_feedback(io.BytesIO(data), name=name):
            assert isinstance(item, FeedbackRow) or (item.line >= 1 and "\n" not in item.reason)
    except InputError as error:
        assert "\n" not in str(error)


@given(st.binary(max_size=200), st.sampled_from(("f.jsonl", "f.csv")))
def test_random_bytes_never_raise_anything_but_input_error(data: bytes, name: str) -> None:
    survives(data, name)


@given(st.sampled_from(FIXTURES), st.data())
@settings(max_examples=300)
def test_truncated_and_damaged_files_never_raise_anything_but_input_error(path: Path, draw: st.DataObject) -> None:
    data = path.read_bytes()
    cut = draw.draw(st.integers(0, len(data)))
    survives(data[:cut], path.name)
    patch = draw.draw(st.binary(min_size=1, max_size=4))
    survives(data[:cut] + patch + data[cut + len(patch) :], path.name)
