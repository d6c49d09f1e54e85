"""Files that are damaged, huge, mixed or not feedback at all."""

import io
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_align.errors import InputError
from edge_align.feedback import containers
from edge_align.feedback.read import Item, read_feedback
from edge_align.records import DroppedRow, FeedbackRow, user_prompt

GOOD = b'{"prompt": "Q", "chosen": "A", "rejected": "B"}'
ROW = FeedbackRow(user_prompt("Q"), chosen="A", rejected="B", source="trl")


def read(data: bytes, *, name: str = "f.jsonl", user: str | None = None) -> list[Item]:
    return list(read_feedback(io.BytesIO(data), name=name, user=user))


def reason(line: bytes) -> str:
    """Why `line`, between two good ones, is dropped; the good ones must be read and the line number be right."""
    first, dropped, last = read(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    assert (first, last) == (ROW, ROW)
    assert isinstance(dropped, DroppedRow) and (dropped.file, dropped.line) == ("f.jsonl", 2)
    assert "\n" not in dropped.reason and len(dropped.reason) < 300
    return dropped.reason


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"not json", "not JSON at column 1: Expecting value"),
        (b"[1, 2]", "the row is a list; it must be an object"),
        (b"12", "the row is a number; it must be an object"),
        (b'{"prompt": 3, "chosen": "A", "rejected": "B"}', "prompt is a number; it must be text or a list of messages"),
        (b'{"prompt": "Q", "chosen": "A", "rejected": null}',
         "rejected is missing; it must be text or a list of messages"),
        (b'{"prompt": "Q", "chosen": "A", "rejected": "A"}', "chosen and rejected are the same text"),
        (b'{"chosen": "Q A", "rejected": "Q A"}', "chosen and rejected are the same text"),
        (b'{"chosen": "A", "rejected": "B"}',
         "there is no prompt, and chosen and rejected do not begin alike; add a prompt column"),
        (b'{"prompt": " ", "chosen": "A", "rejected": "B"}', "prompt is empty"),
        (b'{"prompt": "Q", "chosen": "A", "rejected": "\\n"}', "rejected is empty"),
        (b'{"prompt": [], "chosen": "A", "rejected": "B"}', "the prompt is empty or does not end with a question"),
        (b'{"prompt": "Q", "chosen": "A\\u0000", "rejected": "B"}', "chosen holds a NUL character"),
        (b'{"prompt": "Q", "chosen": "A\\ud800", "rejected": "B"}', "chosen holds a lone surrogate"),
        (b'{"prompt": "Q", "chosen": "A", "rejected": "B", "id": "\\ud800"}', "id holds a lone surrogate"),
        (b'{"prompt": "Q", "chosen": "A", "rejected": "B", "weight": NaN}', "NaN is not a JSON number"),
        (b'{"prompt": "Q", "chosen": "A", "rejected": "B", "x": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"prompt": "Q", "chosen": "A", "rejected": "B", "weight": 1e999}', "weight is inf; it must be a number"),
        (b'{"prompt": "Q", "chosen": "A", "rejected": "B", "weight": 0}', "weight 0.0 is not in (0, 100]"),
        (b'{"prompt": "Q", "chosen": "A", "rejected": "B", "weight": true}', "weight is True; it must be a number"),
        (b'{"prompt": "Q", "chosen": "A", "rejected": "B", "ts": 1' + b"0" * 400 + b"}",
         "ts is a huge number; it must be a number"),
        (b'{"prompt": "Q", "chosen": "A", "rejected": "B", "x": ' + b"9" * 5000 + b"}", "a number has too many digits"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"prompt": "caf\xe9", "chosen": "A", "rejected": "B"}', "the line is not UTF-8"),
        (b'{"text": "Once"}',
         "a text alone carries no preference; give prompt, chosen, rejected or prompt, completion, label"),
        (b'{"messages": [{"role": "user", "content": "Q"}]}',
         "a chat alone carries no preference; give prompt, chosen, rejected or prompt, completion, label"),
        (b'{"prompt": "Q", "completions": ["A"], "labels": [true]}',
         "stepwise feedback rates steps, not whole answers; "
         "give prompt, chosen, rejected or prompt, completion, label"),
        (b'{"prompt": "Q", "completion": "A"}',
         "there is no verdict; add a label, or an edited answer as edited; "
         "give prompt, chosen, rejected or prompt, completion, label"),
        (b'{"question": "Q", "better": "A"}',
         "unknown format with keys 'question', 'better'; known formats: chatgpt, csv, gpt4all, hh_rlhf, lm_studio, "
         "native, open_webui, openai, trl, ultrafeedback, ultrafeedback_binarized"),
        (b"{}", "unknown format with keys none; known formats: chatgpt, csv, gpt4all, hh_rlhf, lm_studio, "
         "native, open_webui, openai, trl, ultrafeedback, ultrafeedback_binarized"),
    ],
)  # fmt: skip
def test_a_bad_row_is_dropped_with_its_line_and_reason_and_reading_goes_on(line: bytes, expected: str) -> None:
    assert reason(line) == expected


def test_a_million_character_row_is_dropped_and_a_line_over_the_limit_is_skipped() -> None:
    body = {"prompt": "Q", "chosen": "A" * ((1 << 20) + 1), "rejected": "B"}
    assert reason(json.dumps(body).encode()) == "the row holds over 1 Mi characters"
    body["chosen"] = "A" * (9 << 20)
    assert reason(json.dumps(body).encode()) == "the line is longer than 8 MiB"


def test_a_cut_off_last_line_is_named_as_such() -> None:
    items = read(GOOD + b"\n" + GOOD[:20])
    assert items == [ROW, DroppedRow("f.jsonl", 2, "the file ends in the middle of this line; it was cut off")]


def test_byte_order_marks_crlf_and_blank_lines_are_not_noticed() -> None:
    assert read(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n  \n" + GOOD + b"\r\n") == [ROW, ROW]


def test_formats_may_be_mixed_row_by_row() -> None:
    other = b'{"input": {"messages": [{"role": "user", "content": "Q"}]}, "preferred_output": [{"role": "assistant", '
    other += b'"content": "A"}], "non_preferred_output": [{"role": "assistant", "content": "B"}]}'
    sources = [item.source for item in read(GOOD + b"\n" + other) if isinstance(item, FeedbackRow)]
    assert sources == ["trl", "openai"]


@pytest.mark.parametrize(
    "data",
    [
        b"[" + GOOD + b"," + GOOD + b"]",
        b" [\n " + GOOD + b" ,\n\n" + GOOD + b"\n]\n",
        b"\n".join([json.dumps(json.loads(GOOD), indent=2).encode()] * 2),
        GOOD + b"\n" + GOOD,
        b"prompt,chosen,rejected\nQ,A,B\nQ,A,B\n",
        b"rejected\tchosen\tprompt\r\nB\tA\tQ\r\nB\tA\tQ",
    ],
)
def test_lines_arrays_objects_over_several_lines_and_csv_are_told_apart(data: bytes) -> None:
    rows = read(data, name="-")
    assert [(r.prompt, r.chosen, r.rejected) for r in rows if isinstance(r, FeedbackRow)] == [
        (ROW.prompt, "A", "B")
    ] * 2


def test_a_damaged_array_gives_the_rows_before_the_damage() -> None:
    assert read(b"[" + GOOD + b"," + GOOD[:20]) == [
        ROW,
        DroppedRow(
            "f.jsonl",
            2,
            "not JSON at line 1 column 66: Unterminated string starting at; the rest of the file was not read",
        ),
    ]
    assert read(b"[" + GOOD + b",") == [ROW, DroppedRow("f.jsonl", 2, "the file ends inside the array; it was cut off")]
    bad = b'{"prompt": "caf\xe9", "chosen": "A", "rejected": "B"}'
    assert read(b"[" + bad + b"," + GOOD + b"]") == [DroppedRow("f.jsonl", 1, "prompt holds a lone surrogate"), ROW]


def test_a_file_of_lines_whose_first_line_is_damaged_is_read_from_the_second() -> None:
    first, second = read(b'{"prompt": "Q",\n' + GOOD + b"\n")
    assert isinstance(first, DroppedRow) and first.line == 1
    assert second == ROW


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "f is empty"),
        (b"\n \n", "f is empty"),
        (b"[]", "f is empty"),
        (b"prompt,chosen,rejected\n", "f is empty"),
        (b"\x1f\x8b\x08\x00rest", "f is gzip; unpack it first"),
        (b"PK\x03\x04rest", "f is a ZIP archive; unpack it first"),
        (b"PAR1rest", "f is a Parquet file; convert it to JSON lines"),
        (b"SQLite format 3\x00rest", "f is a SQLite database; export its feedback as JSON"),
        ("{}".encode("utf-16"), "f is UTF-16; save it as UTF-8"),
        (bytes(range(256)) * 8, "f is a binary file; give JSON lines, a JSON array or CSV in UTF-8"),
        (b"\x00" * 100, "f is a binary file; give JSON lines, a JSON array or CSV in UTF-8"),
    ],
)
def test_a_file_that_is_no_feedback_is_refused_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(data, name="f")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_csv_file_without_the_columns_is_refused() -> None:
    with pytest.raises(InputError, match="the header of f.csv lacks columns; it needs prompt, chosen, rejected or"):
        read(b"question,answer\nQ,A\n", name="f.csv")


def test_missing_files_directories_and_odd_paths_are_refused(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "no.jsonl", "x does not exist"),
        (tmp_path, "x is a directory"),
        (Path("a\0b"), "x cannot be opened"),
    ):
        with pytest.raises(InputError, match=message):
            list(read_feedback(path, name="x"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.jsonl"
    path.write_bytes(GOOD)
    path.chmod(0)
    with pytest.raises(InputError, match="may not be read"):
        list(read_feedback(path, name="x"))


def test_a_stream_that_fails_is_refused() -> None:
    class Failing(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(InputError, match="x cannot be read: Input/output error"):
        list(read_feedback(Failing(), name="x"))  # type: ignore[arg-type]


def test_an_array_over_the_size_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "FILE_LIMIT", 1 << 20)
    with pytest.raises(InputError, match="f.json is over 1 MiB in one piece; convert it to JSON lines"):
        read(b"[" + b",".join([GOOD] * 25_000) + b"]", name="f.json")


def test_an_unbalanced_quote_in_a_csv_file_is_reported() -> None:
    items = read(b'prompt,chosen,rejected\nQ,A,B\nQ,"A,B\n' + b"Q,A,B\n" * 40_000, name="f.csv")
    assert isinstance(items[0], FeedbackRow)
    assert items[1] == DroppedRow("f.csv", 3, "not CSV: field larger than field limit (131072)")
    assert len(items) > 10_000  # reading went on


class Repeated(io.RawIOBase):
    """`piece` over and over up to `size` bytes, made as it is read."""

    def __init__(self, piece: bytes, size: int) -> None:
        self.piece, self.left = piece * (1 + 65536 // len(piece)), size
        self.at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        start = self.at % len(self.piece)
        data = self.piece[start : start + min(len(buffer), self.left)]
        buffer[: len(data)] = data
        self.left -= len(data)
        self.at += len(data)
        return len(data)


def peak(items: Iterator[Item]) -> tuple[int, int]:
    """(items, peak of traced memory in bytes)."""
    tracemalloc.start()
    try:
        return sum(1 for _ in items), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_stays_flat_however_many_rows_there_are() -> None:
    row = b'{"prompt": "' + b"Q" * 900 + b'", "chosen": "A", "rejected": "B"}\n'
    count, used = peak(read_feedback(io.BufferedReader(Repeated(row, len(row) * 20_000)), name="f"))
    assert count == 20_000
    assert used < 2 << 20  # of 19 MB


def test_a_hundred_megabyte_line_is_skipped_without_being_held() -> None:
    count, used = peak(read_feedback(io.BufferedReader(Repeated(b"[x", 100_000_000)), name="f"))
    assert count == 1
    assert used < 3 * containers.LINE_LIMIT


def export_of(*users: str) -> bytes:
    messages = {
        "a": {"parentId": None, "role": "user", "content": "Q"},
        "b": {"parentId": "a", "role": "assistant", "content": "A"},
    }
    return json.dumps(
        [
            {
                "id": user,
                "user_id": user,
                "type": "rating",
                "data": {"rating": 1},
                "meta": {"message_id": "b", "chat_id": user},
                "snapshot": {"chat": {"chat": {"history": {"messages": messages}}}},
            }
            for user in users
        ]
    ).encode()


def test_an_export_of_several_users_asks_whose_feedback_is_meant() -> None:
    with pytest.raises(InputError, match=r"f.jsonl holds the feedback of 2 users \(u1, u2\); choose one with --user"):
        read(export_of("u1", "u2", "u1"))
    with pytest.raises(InputError, match=r"f.jsonl holds no feedback of user 'u9'; it has u1, u2"):
        read(export_of("u1", "u2"), user="u9")
    items = read(export_of("u1", "u2"), user="u2")
    assert [item.id for item in items if isinstance(item, FeedbackRow)] == ["u2"]
    assert DroppedRow("f.jsonl", 1, "the verdict of another user") in items
    assert len(read(export_of("u1"))) == 1
