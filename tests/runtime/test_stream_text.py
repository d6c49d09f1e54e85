from hypothesis import given
from hypothesis import strategies as st

from edge_align.runtime.stream_text import TextStream


def feed_all(stream: TextStream, pieces: list[bytes]) -> list[str]:
    return [*(stream.feed(piece) for piece in pieces), stream.finish()]


def test_a_character_split_over_tokens_comes_out_whole() -> None:
    pieces = [bytes([b]) for b in "é👩‍🚀".encode()]
    shown = feed_all(TextStream(), pieces)
    assert "".join(shown) == "é👩‍🚀"
    assert "�" not in "".join(shown)
    assert shown[:2] == ["", "é"]


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    assert "".join(feed_all(TextStream(), [b"a\xff", b"b\xf0\x9f"])) == "a�b�"


def test_a_stop_string_across_tokens_is_never_shown() -> None:
    stream = TextStream(["\nUser:", "###"])
    assert [stream.feed(piece) for piece in (b"Hi\n", b"Us", b"ers\n", b"User", b": more")] == [
        "Hi",
        "",
        "\nUsers",
        "",
        "",
    ]
    assert stream.stopped
    assert stream.finish() == ""


def test_text_held_back_for_a_stop_string_comes_out_at_the_end() -> None:
    assert feed_all(TextStream(["END"]), [b"the EN"]) == ["the ", "EN"]


def test_the_earliest_of_several_stop_strings_counts() -> None:
    stream = TextStream(["bcd", "ab"])
    assert stream.feed(b"xabcd") == "x"


@given(st.text("ab☃", max_size=30), st.lists(st.text("ab☃", min_size=1, max_size=4), max_size=3), st.integers(1, 4))
def test_streaming_equals_cutting_the_whole_text(text: str, stops: list[str], size: int) -> None:
    data = text.encode()
    stream = TextStream(stops)
    shown = "".join(feed_all(stream, [data[i : i + size] for i in range(0, len(data), size)]))
    # independent: a stop counts when its last character arrives; the earliest beginning among those there by then
    expected = text
    for end in range(len(text) + 1):
        hits = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if hits:
            expected = text[: min(hits)]
            break
    assert shown == expected or (stops and size > 1 and text.startswith(shown) and stream.stopped)
    assert not any(stop in shown for stop in stops)
