"""OpenAI's /v1/responses and /v1/embeddings, on the fake backend."""

import base64
import json
import struct

import pytest
from live_server import MODEL, QUESTION


def respond(live, **more):
    body = {"model": MODEL, "input": "How do boats float?", "max_output_tokens": 24, "seed": 1, **more}
    return live.ask("POST", "/v1/responses", body)


def test_a_response_says_what_a_chat_says(fake):
    for given in (
        "How do boats float?",
        QUESTION,
        [{"role": "user", "content": [{"type": "input_text", "text": "How do boats float?"}]}],
    ):
        body = respond(fake, input=given).json
        (message,) = body["output"]
        assert message["content"][0]["text"] == fake.text()
    finished = fake.chat().json
    assert body["status"] == ("completed" if finished["choices"][0]["finish_reason"] == "stop" else "incomplete")
    assert body["usage"]["input_tokens"] == finished["usage"]["prompt_tokens"]
    system = respond(fake, instructions="Be brief.").json["output"][0]["content"][0]["text"]
    assert system == fake.text(messages=[{"role": "system", "content": "Be brief."}, *QUESTION])


def test_a_streamed_response_is_a_numbered_row_of_typed_events(fake):
    reply = respond(fake, stream=True)
    blocks = [block.split("\n") for block in reply.data.decode().strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    deltas = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert deltas == fake.text() == events[-1]["response"]["output"][0]["content"][0]["text"]


@pytest.mark.parametrize("body", [{"previous_response_id": "x"}, {"background": True}, {"input": None}, {"input": 3}])
def test_what_needs_a_memory_is_refused(fake, body):
    reply = respond(fake, **body)
    assert reply.status == 400 and reply.json["error"]["type"] == "invalid_request_error"


def test_embeddings_are_floats_or_little_endian_float32_in_base64(fake):
    body = {"model": MODEL, "input": ["ab", [1, 2, 3]]}
    floats = fake.ask("POST", "/v1/embeddings", body).json
    assert floats["data"][1]["embedding"] == pytest.approx([0.003, 0.006, 0.001, 0.003])
    assert floats["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    packed = fake.ask("POST", "/v1/embeddings", body | {"encoding_format": "base64"}).json
    for one, other in zip(floats["data"], packed["data"], strict=True):
        assert list(struct.unpack("<4f", base64.b64decode(other["embedding"]))) == one["embedding"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": []},
        {"input": ""},
        {"input": [1, "a"]},
        {"input": ["a"] * 65},
        {"input": "a", "dimensions": 3},
        {"input": "a", "encoding_format": "hex"},
    ],
)
def test_embeddings_of_nothing_usable_are_refused(fake, body):
    assert fake.ask("POST", "/v1/embeddings", body).status == 400
