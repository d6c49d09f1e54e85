"""Ollama's protocol, on the fake backend."""

import json

import pytest
from live_server import MODEL, QUESTION


def lines(reply):
    assert reply.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in reply.data.splitlines()]


def chat(live, **more):
    body = {"model": MODEL, "messages": QUESTION, "options": {"seed": 1, "num_predict": 24}, **more}
    return live.ask("POST", "/api/chat", body)


def test_the_signs_of_life_are_those_of_ollama(fake):
    assert fake.ask("GET", "/").data == b"Ollama is running"
    head = fake.ask("HEAD", "/")
    assert head.status == 200 and head.data == b""
    assert fake.ask("GET", "/api/version").json["version"].count(".") == 2


def test_models_are_listed_and_described(fake):
    names = [one["name"] for one in fake.ask("GET", "/api/tags").json["models"]]
    assert names == [f"{MODEL}:latest", *(f"{MODEL}@{name}:latest" for name in ("ann", "bob", "cat"))]
    assert fake.ask("GET", "/api/ps").json["models"][0]["name"] == f"{MODEL}:latest"
    shown = fake.ask("POST", "/api/show", {"model": f"{MODEL}:latest"}).json
    assert shown["capabilities"] == ["completion"]
    assert shown["model_info"]["fake.block_count"] == 4
    missing = fake.ask("POST", "/api/show", {"model": "llama3"})
    assert missing.status == 404 and isinstance(missing.json["error"], str)


def test_a_chat_streams_lines_by_default_that_say_what_openais_route_says(fake):
    found = lines(chat(fake))
    assert "".join(line["message"]["content"] for line in found) == fake.text()
    assert [line["done"] for line in found] == [False] * (len(found) - 1) + [True]
    usage = fake.chat().json["usage"]
    assert (found[-1]["prompt_eval_count"], found[-1]["eval_count"]) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    assert found[-1]["done_reason"] in ("stop", "length") and found[-1]["total_duration"] > 0


def test_a_chat_without_a_stream_is_one_document_whose_id_can_be_judged(fake):
    body = chat(fake, stream=False).json
    assert body["done"] and body["message"]["content"] == fake.text()
    reply = fake.ask("POST", "/v1/feedback", {"id": body["id"], "rating": "up"})
    assert reply.status == 200 and reply.json["added"] == ["up"]


def test_generate_templates_its_prompt_unless_raw(fake):
    options = {"seed": 1, "num_predict": 24}
    body = {"model": MODEL, "prompt": "How do boats float?", "options": options, "stream": False}
    assert fake.ask("POST", "/api/generate", body).json["response"] == fake.text()
    raw = fake.ask("POST", "/api/generate", body | {"raw": True}).json["response"]
    plain = {"model": MODEL, "prompt": "How do boats float?", "seed": 1, "max_tokens": 24}
    assert raw == fake.ask("POST", "/v1/completions", plain).json["choices"][0]["text"]
    system = fake.ask("POST", "/api/generate", body | {"system": "Be brief."}).json["response"]
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert system == fake.text(messages=messages)


def test_a_request_without_a_prompt_loads_the_model(fake):
    assert fake.ask("POST", "/api/generate", {"model": MODEL}).json["done_reason"] == "load"
    assert fake.ask("POST", "/api/chat", {"model": MODEL, "messages": []}).json["done"] is True


def test_a_profile_is_part_of_the_models_name(fake):
    found = chat(fake, model=f"{MODEL}@ann:latest", stream=False).json
    assert found["edge_align"]["profile"] == "ann"
    assert found["message"]["content"] == fake.text(steering={"profile": "ann"})


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "llama3"}, 404),
        ({"messages": [{"role": "user"}]}, 400),
        ({"options": {"temperature": -1}}, 400),
        ({"options": []}, 400),
        ({"options": {"num_predict": 1.5}}, 400),
        ({"format": 3}, 400),
        ({"tools": [{"type": "function"}]}, 400),
        ({"stream": "yes"}, 400),
    ],
)
def test_refusals_are_in_ollamas_shape(fake, body, status):
    reply = chat(fake, **body)
    assert reply.status == status
    assert set(reply.json) == {"error"} and isinstance(reply.json["error"], str)


def test_embeddings_come_for_one_text_or_several_in_both_forms(fake):
    found = fake.ask("POST", "/api/embed", {"model": MODEL, "input": ["ab", "c"]}).json
    expected = [[0.002, 0.195, 0.097, 0.098], [0.001, 0.099, 0.099, 0.099]]
    for vector, counted in zip(found["embeddings"], expected, strict=True):
        assert vector == pytest.approx(counted)
    assert found["prompt_eval_count"] == 3
    older = fake.ask("POST", "/api/embeddings", {"model": MODEL, "prompt": "c"}).json
    assert older["embedding"] == pytest.approx(expected[1])
