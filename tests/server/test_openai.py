"""OpenAI's protocol, on the fake backend."""

import math
import threading

import pytest
from live_server import fake_engine, FixedProfiles, MODEL, QUESTION, serving, SlowBackend, until

from edge_align.config import RuntimeConfig, SamplingConfig, ServerConfig
from edge_align.home import Home
from edge_align.records import join_chunks, Message
from edge_align.runtime.fake import FakeBackend


def alone(content="How do boats float?", *, vectors=None, seed=1, max_tokens=24, **sampling):
    """The answer by the backend itself, without a server."""
    backend = FakeBackend(config=RuntimeConfig(n_ctx=2048))
    tokens = backend.render((Message("user", content),))
    config = SamplingConfig(seed=seed, max_tokens=max_tokens, **sampling)
    return join_chunks(list(backend.generate(tokens, vectors=vectors, sampling=config)))


def test_an_answer_is_the_backends_own_with_its_counts(fake):
    reply = fake.chat()
    expected, prompt = alone(), len(FakeBackend().render((Message("user", "How do boats float?"),)))
    assert reply.status == 200
    body = reply.json
    assert body["object"] == "chat.completion" and body["model"] == MODEL
    assert body["choices"][0]["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert body["choices"][0]["finish_reason"] == expected.finish_reason
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt, len(expected.tokens))
    assert usage["total_tokens"] == prompt + len(expected.tokens)
    assert body["timings"]["predicted_n"] == len(expected.tokens)
    assert body["timings"]["prompt_n"] + body["timings"]["cache_n"] == prompt


def test_a_stream_says_the_same_in_the_order_of_the_protocol_and_the_usage_only_when_asked(fake):
    plain = fake.chat(stream=True)
    assert plain.headers["content-type"].startswith("text/event-stream")
    events = plain.events
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == fake.text()
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert not any("usage" in e for e in events)
    counted = fake.chat(stream=True, stream_options={"include_usage": True}).events
    assert counted[-1]["choices"] == []
    assert counted[-1]["usage"]["completion_tokens"] == fake.chat().json["usage"]["completion_tokens"]


def test_choice_i_of_n_is_the_answer_with_the_seed_plus_i(fake):
    choices = fake.chat(n=3, seed=5).json["choices"]
    assert [c["message"]["content"] for c in choices] == [fake.text(seed=5 + i) for i in range(3)]
    streamed = fake.chat(n=3, seed=5, stream=True).events
    for i in range(3):
        parts = [c["delta"].get("content", "") for e in streamed for c in e["choices"] if c["index"] == i]
        assert "".join(parts) == choices[i]["message"]["content"]


def test_without_a_seed_answers_differ_and_the_seed_that_was_drawn_repeats_one(fake):
    first, second = (fake.chat(seed=None).json for _ in range(2))
    assert first["edge_align"]["seed"] != second["edge_align"]["seed"]
    again = fake.text(seed=first["edge_align"]["seed"])
    assert again == first["choices"][0]["message"]["content"]


def test_a_stop_string_ends_the_answer_and_is_not_in_it(fake):
    text = fake.text(max_tokens=60)
    stop = text[10:12]
    cut = fake.chat(max_tokens=60, stop=[stop]).json["choices"][0]
    assert cut["message"]["content"] == text[: text.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_logprobs_are_the_log_softmax_of_the_backends_logits(fake):
    found = fake.chat(logprobs=True, top_logprobs=3, temperature=0, max_tokens=4).json["choices"][0]["logprobs"]
    backend = FakeBackend()
    tokens = backend.render((Message("user", "How do boats float?"),))
    answer = alone(temperature=0.0, max_tokens=4).tokens
    (logits,) = backend.score(tokens, [answer], vectors=None)
    for entry, token, row in zip(found["content"], answer, logits, strict=True):
        total = math.log(sum(math.exp(x) for x in row.astype(float)))
        assert entry["bytes"] == [token] and entry["token"] == chr(token)
        assert entry["logprob"] == pytest.approx(float(row[token]) - total, abs=1e-5)
        best = sorted(row, reverse=True)[:3]
        assert [t["logprob"] for t in entry["top_logprobs"]] == pytest.approx(
            [float(x) - total for x in best], abs=1e-5
        )


def test_a_bias_of_a_hundred_forces_a_token(fake):
    assert fake.text(logit_bias={str(ord("x")): 100}, max_tokens=7) == "x" * 7


def test_fields_nobody_knows_are_ignored(fake):
    more = {"store": True, "service_tier": "auto", "metadata": {"a": "b"}, "user": "u", "reasoning_effort": "low"}
    assert fake.text(**more, brand_new_field=[1]) == fake.text()


def test_messages_may_come_as_parts_and_developer_is_system(fake):
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    plain = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert fake.text(messages=messages) == fake.text(messages=plain)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": "hi"}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "text"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "empty"),
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, 400, "surrogate"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "x"}]}, 400, "last message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "text"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
        ({"modalities": ["audio"]}, 400, "text"),
        ({"top_logprobs": 2}, 400, "logprobs"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": 1e300}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 1.5}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": -5}, 400, "max_tokens"),
        ({"max_tokens": 10**30}, 400, "max_tokens"),
        ({"n": 0}, 400, "n is"),
        ({"n": 1000}, 400, "n is"),
        ({"seed": 2**70}, 400, "seed"),
        ({"seed": True}, 400, "seed"),
        ({"stop": ["x"] * 17}, 400, "stop"),
        ({"stop": ["x" * 300]}, 400, "stop"),
        ({"logit_bias": {"a": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"1": 1e300}}, 400, "bias"),
        ({"presence_penalty": 1}, 400, "penalties"),  # the fake cannot
        ({"response_format": {"type": "xml"}}, 400, "type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"maxItems": 10**9}}}}, 400, "repeats"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": "x" * 20000}}}}, 400, "larger"),
        ({"steering": {"strength": 99}}, 400, "strength"),
        ({"steering": {"profile": "../../etc"}}, 400, "name"),
        ({"steering": {"profile": "nobody"}}, 404, "profile"),
        ({"steering": []}, 400, "steering"),
        ({"model": "gpt-5"}, 404, "model"),
        ({"model": f"{MODEL}@nobody"}, 404, "profile"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, 400, "tokens"),
        ({"messages": [{"role": "user", "content": "x"}] * 600}, 400, "entries"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_in_openais_shape_with_a_sentence(fake, body, status, says):
    reply = fake.chat(**body)
    assert reply.status == status, reply.data
    error = reply.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"]
    assert error["type"] == {400: "invalid_request_error", 404: "not_found_error"}[status]


def test_an_unknown_route_or_method_is_refused_in_the_same_shape(fake):
    assert fake.ask("GET", "/v1/nothing").json["error"]["type"] == "not_found_error"
    assert fake.ask("GET", "/v1/chat/completions").status == 405


def test_models_are_the_base_and_the_base_with_each_profile(fake):
    ids = [one["id"] for one in fake.ask("GET", "/v1/models").json["data"]]
    assert ids == [MODEL, f"{MODEL}@ann", f"{MODEL}@bob", f"{MODEL}@cat"]
    assert fake.ask("GET", f"/v1/models/{MODEL}@ann").json["id"] == f"{MODEL}@ann"
    assert fake.ask("GET", "/v1/models/gpt-5").json["error"]["code"] == "model_not_found"


def test_completions_take_texts_and_tokens_without_a_template(fake):
    backend = FakeBackend()
    tokens = backend.tokenize("Once upon")
    expected = join_chunks(
        list(backend.generate(tokens, vectors=None, sampling=SamplingConfig(seed=1, max_tokens=9)))
    ).text
    body = {"model": MODEL, "max_tokens": 9, "seed": 1}
    for prompt in ("Once upon", tokens, ["Once upon"]):
        reply = fake.ask("POST", "/v1/completions", {**body, "prompt": prompt})
        assert reply.json["choices"][0]["text"] == expected
    streamed = fake.ask("POST", "/v1/completions", {**body, "prompt": "Once upon", "stream": True}).events
    assert "".join(e["choices"][0]["text"] for e in streamed) == expected
    outside = fake.ask("POST", "/v1/completions", {**body, "prompt": [1, 999999]})
    assert outside.status == 400 and "vocabulary" in outside.json["error"]["message"]


# -- profiles ----------------------------------------------------------------------------------------------------------
def personal(name, **more):
    return alone(vectors=FixedProfiles().vectors(name, 1), **more).text


def test_the_body_names_the_profile_before_the_header_before_the_model(fake):
    header = {"X-Edge-Align-Profile": "bob"}
    ann, bob, cat, base = personal("ann"), personal("bob"), personal("cat"), alone().text
    assert len({ann, bob, cat, base}) == 4
    assert fake.text() == base
    assert fake.text(model=f"{MODEL}@cat") == cat
    assert fake.text(model=f"{MODEL}@cat", headers=header) == bob
    assert fake.text(model=f"{MODEL}@cat", headers=header, steering={"profile": "ann"}) == ann
    assert fake.chat(steering={"profile": "ann"}).json["edge_align"] == {
        "profile": "ann",
        "version": 1,
        "strength": 1.0,
        "seed": 1,
    }


def test_strength_zero_disabled_and_utility_calls_are_the_base(fake):
    base = alone().text
    assert fake.text(steering={"profile": "ann", "strength": 0}) == base
    assert fake.text(steering={"profile": "ann", "enabled": False}) == base
    assert fake.text(steering={"profile": "ann"}, headers={"X-Edge-Align-Task": "title"}) == base
    assert fake.text(steering={"profile": "ann"}, headers={"X-OpenWebUI-Task": "tags_generation"}) == base


def test_cvectors_set_what_requests_without_a_profile_get(tmp_path):
    home = Home(tmp_path / "home")
    for name in ("ann", "bob"):
        (home.profiles_dir / name).mkdir(parents=True)
    with serving(home, open_engine=fake_engine()) as live:
        assert live.ask("GET", "/cvectors").json == [
            {"id": 0, "name": "ann", "scale": 0.0},
            {"id": 1, "name": "bob", "scale": 0.0},
        ]
        reply = live.ask("POST", "/cvectors", {"cvectors": [{"id": 1, "scale": 0.5}]})
        assert [one["scale"] for one in reply.json] == [0.0, 0.5]
        half = FixedProfiles().vectors("bob", 1).scaled(0.5)
        assert live.text() == alone(vectors=half).text
        two = live.ask("POST", "/cvectors", {"cvectors": [{"id": 0, "scale": 1}, {"id": 1, "scale": 1}]})
        assert two.status == 400 and "one profile" in two.json["error"]["message"]
        live.ask("POST", "/cvectors", {"cvectors": []})
        assert live.text() == alone().text


# -- many at once ------------------------------------------------------------------------------------------------------
def test_answers_of_eight_clients_over_four_profiles_are_their_single_runs(fake):
    names = [None, "ann", "bob", "cat"]
    jobs = [(names[i % 4], f"question number {i % 6}", i) for i in range(40)]
    expected = [personal(n, content=q, seed=s) if n else alone(q, seed=s).text for n, q, s in jobs]
    found = [None] * len(jobs)

    def client(part):
        for i in range(part, len(jobs), 8):
            name, question, seed = jobs[i]
            steering = {"profile": name} if name else {}
            reply = fake.chat(question, seed=seed, steering=steering, stream=True)
            found[i] = "".join(c["delta"].get("content", "") for e in reply.events for c in e["choices"])

    threads = [threading.Thread(target=client, args=(part,)) for part in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def slow_server(tmp_path, **config):
    return serving(
        Home(tmp_path / "home"),
        open_engine=fake_engine(SlowBackend(config=RuntimeConfig(n_ctx=4096))),
        config=ServerConfig(**config),
    )


def test_a_full_queue_is_a_429_that_says_when_to_come_back(tmp_path):
    with slow_server(tmp_path, slots=1, queue=1) as live:
        threads = [threading.Thread(target=live.chat, kwargs={"max_tokens": 200}) for _ in range(2)]
        threads[0].start()
        until(lambda: live.service.decoder.load == (1, 0))
        threads[1].start()
        until(lambda: live.service.decoder.load == (1, 1))
        refused = live.chat()
        assert refused.status == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json["error"]["type"] == "rate_limit_error"
        for thread in threads:
            thread.join()
        assert live.chat().status == 200


def test_while_the_model_loads_answers_are_503_with_retry_after_and_models_are_listed(tmp_path):
    gate, engine = threading.Event(), fake_engine()

    def late():
        gate.wait(30)
        return engine()

    with serving(Home(tmp_path / "home"), open_engine=late, wait=False) as live:
        for reply in (live.chat(), live.ask("GET", "/health"), live.chat(stream=True)):
            assert reply.status == 503 and reply.headers["retry-after"] == "1"
            assert reply.json["error"]["code"] == "loading"
        assert live.ask("GET", "/v1/models").json["data"][0]["id"] == MODEL
        gate.set()
        until(lambda: live.service.decoder.state == "ready")
        assert live.ask("GET", "/health").json == {"status": "ok"}
        assert live.chat().status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_decoding_stops_when_the_client_goes_away(tmp_path, stream):
    import http.client
    import json

    with slow_server(tmp_path) as live:
        connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=30)
        body = {"model": MODEL, "messages": QUESTION, "max_tokens": 3000, "stream": stream}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        until(lambda: live.service.decoder.load == (1, 0))
        connection.close()
        before = SlowBackend.decoded
        until(lambda: live.service.decoder.load == (0, 0), seconds=4)
        assert SlowBackend.decoded - before < 1500  # not all 3000
        until(lambda: "edge_align:answers_cancelled_total 1" in live.ask("GET", "/metrics").data.decode(), seconds=4)


def test_an_answer_is_cut_off_by_the_clock(tmp_path):
    with slow_server(tmp_path, wall_sec=0.3) as live:
        choice = live.chat(max_tokens=3000).json["choices"][0]
        assert choice["finish_reason"] == "length" and 0 < len(choice["message"]["content"]) < 2000


def test_a_short_answer_overtakes_a_long_one_of_another_profile(tmp_path):
    with slow_server(tmp_path, slots=2) as live:
        long = threading.Thread(target=live.chat, kwargs={"max_tokens": 600})
        long.start()
        until(lambda: live.service.decoder.load == (1, 0))
        assert live.chat(max_tokens=20).status == 200
        assert live.service.decoder.load == (1, 0)  # still at it
        long.join()


def test_metrics_count_tokens_in_prometheus_form(tmp_path):
    with serving(Home(tmp_path / "home"), open_engine=fake_engine()) as live:
        usage = live.chat().json["usage"]
        text = live.ask("GET", "/metrics").data.decode()
        assert f"edge_align:tokens_predicted_total {usage['completion_tokens']}\n" in text
        assert f"edge_align:prompt_tokens_total {usage['prompt_tokens']}\n" in text
        assert "# TYPE edge_align:requests_processing gauge" in text
        assert live.ask("GET", "/props").json["total_slots"] == 4
