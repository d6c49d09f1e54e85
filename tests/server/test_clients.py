"""The programs people use, against a live server with the default base. Which of them proves what:

| | openai | Node | langchain | litellm | ollama | llm | curl |
| --- | --- | --- | --- | --- | --- | --- | --- |
| chat, stream | x | x | x | x | x | x | x |
| usage of a stream, when asked | x | x | x | x | always | | |
| 400, 401, 404 as its own errors | x | x | x | x | 404 | | 400 |
| 413 | x | x | x | x | | | |
| 415 | x | x | | | | | x |
| 429, 503; a retry waits as Retry-After says | x | x | x | x | | | |
| embeddings | base64 | base64 | base64 | x | x | | |
| models listed, one retrieved | x | x | | | x | | |
| answers in the shape of a schema | x | x | x | x | x | x | |
| decoding ends when it goes away | x | x | x | x | | | |
| CORS preflight of the headers it sends | | x | | | | | x |

openai, ollama and llm are of the environment; scripts/clients.py installs Node's, langchain-openai and litellm.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ollama
import openai
import pytest
from live_server import bearer, fake_engine, key_of, keys_of, Live, MODEL, QUESTION, serving, SlowBackend, until

from edge_align.config import RuntimeConfig, ServerConfig
from edge_align.home import Home
from edge_align.server.refusal import busy, loading


@pytest.fixture(scope="module")
def real(base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    home = Home(tmp_path_factory.mktemp("real") / "home")
    config = ServerConfig(body_bytes=1 << 20)
    with serving(home, config=config, runtime=RuntimeConfig(n_threads=1, n_ctx=512), keys=keys_of(ann=())) as live:
        yield live


@pytest.fixture
def client(real: Live):
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key=key_of("ann"), max_retries=0) as client:
        yield client


def ask(client, **more):
    return client.chat.completions.create(
        **{"model": MODEL, "messages": QUESTION, "max_tokens": 6, "temperature": 0, **more}
    )


# -- openai ------------------------------------------------------------------------------------------------------------
def test_openai_chats_streams_and_gets_the_usage_when_it_asks(client):
    whole = ask(client)
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 6
    chunks = list(ask(client, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert all(chunk.usage is None for chunk in chunks)
    counted = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert counted[-1].usage.total_tokens == whole.usage.total_tokens and counted[-1].choices == []


def test_openai_gets_logprobs_choices_and_completions(client):
    found = ask(client, logprobs=True, top_logprobs=2, n=2, temperature=1, seed=3)
    assert len(found.choices) == 2
    content = found.choices[0].logprobs.content
    assert "".join(one.token for one in content) == found.choices[0].message.content
    assert all(one.logprob <= 0 and len(one.top_logprobs) == 2 for one in content)
    text = client.completions.create(model=MODEL, prompt="One, two, three,", max_tokens=4, temperature=0)
    assert text.choices[0].text.strip()


def test_openai_lists_and_retrieves_models(client):
    assert [one.id for one in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "edge-align"


def test_openai_parses_structured_output(client):
    from pydantic import BaseModel

    class Bird(BaseModel):
        sings: bool
        legs: int

    found = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "Describe a bird."}],
        response_format=Bird,
        max_tokens=60,
        seed=1,
    )
    assert isinstance(found.choices[0].message.parsed, Bird)
    anything = ask(client, response_format={"type": "json_object"}, max_tokens=100, temperature=1, seed=2)
    assert anything.choices[0].message.content.lstrip().startswith("{")


def test_openai_gets_embeddings_which_it_asks_for_in_base64(client):
    found = client.embeddings.create(model=MODEL, input=["The cat sat.", "A cat was sitting.", "Tax law of 1931."])
    first, second, other = (one.embedding for one in found.data)
    assert len(first) == 576 and sum(x * x for x in first) == pytest.approx(1, abs=1e-4)
    assert sum(map(float.__mul__, first, second)) > sum(map(float.__mul__, first, other))
    plain = client.embeddings.create(model=MODEL, input="The cat sat.", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(first, abs=1e-6)


def test_openai_uses_responses(client):
    found = client.responses.create(model=MODEL, input="How do boats float?", max_output_tokens=6, temperature=0)
    assert found.output_text == ask(client).choices[0].message.content
    events = list(client.responses.create(model=MODEL, input="Hi", max_output_tokens=4, temperature=0, stream=True))
    assert events[0].type == "response.created" and events[-1].response.output_text


def test_openai_raises_the_class_of_each_error(real, client):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(client, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="tools"):
        ask(client, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    with pytest.raises(openai.BadRequestError, match="512"):
        ask(client, messages=[{"role": "user", "content": "word " * 2000}])
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, model="gpt-5")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.APIStatusError) as large:
        ask(client, messages=[{"role": "user", "content": "x" * (1 << 20)}])
    assert large.value.status_code == 413
    with pytest.raises(openai.APIStatusError) as form:
        ask(client, extra_headers={"Content-Type": "text/plain"})
    assert form.value.status_code == 415
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            ask(stranger)


def test_openai_waits_as_long_as_retry_after_says_and_then_succeeds(tmp_path):
    gate, engine = threading.Event(), fake_engine()

    def late():
        gate.wait(30)
        return engine()

    with serving(Home(tmp_path / "home"), open_engine=late, wait=False) as live:
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError) as loading:
                ask(client)
            assert loading.value.status_code == 503 and loading.value.response.headers["retry-after"] == "1"
        check = live.service.decoder.check

        def refuse_once() -> None:
            try:
                check()
            finally:
                gate.set()

        live.service.decoder.check = refuse_once
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=5) as client:
            started = time.monotonic()
            assert ask(client).choices
            assert time.monotonic() - started >= 1.0  # as told, not the SDK's own half second


def test_openai_learns_of_a_full_queue_and_its_disconnect_ends_the_decoding(tmp_path):
    slow = fake_engine(SlowBackend(config=RuntimeConfig(n_ctx=4096)))
    with serving(Home(tmp_path / "home"), open_engine=slow, config=ServerConfig(slots=1, queue=1)) as live:
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            streams = [ask(client, stream=True, max_tokens=3000)]
            waiting = threading.Thread(target=live.chat, kwargs={"max_tokens": 5})
            waiting.start()
            until(lambda: live.service.decoder.load == (1, 1))
            with pytest.raises(openai.RateLimitError):
                ask(client)
            next(iter(streams[0]))
            streams[0].close()
            waiting.join(10)
            until(lambda: live.service.decoder.load == (0, 0), seconds=5)
            assert live.chat().status == 200


def test_openai_selects_profiles_through_extra_body_and_headers(fake):
    with openai.OpenAI(base_url=f"{fake.url}/v1", api_key="none", max_retries=0) as client:
        more = {"seed": 1, "temperature": 1, "max_tokens": 24}
        body = ask(client, extra_body={"steering": {"profile": "ann"}}, **more)
        header = ask(client, extra_headers={"X-Edge-Align-Profile": "ann"}, **more)
        named = ask(client, **{**more, "model": f"{MODEL}@ann"})
        texts = {one.choices[0].message.content for one in (body, header, named)}
        assert texts == {fake.text(steering={"profile": "ann"})}
        assert body.edge_align["profile"] == "ann"


# -- ollama ------------------------------------------------------------------------------------------------------------
def test_ollamas_client_lists_shows_chats_generates_and_embeds(real):
    with ollama.Client(host=real.url, headers=bearer("ann")) as client:
        assert [one.model for one in client.list().models] == [f"{MODEL}:latest"]
        assert client.show(MODEL).capabilities == ["completion"]
        options = {"temperature": 0, "num_predict": 6}
        whole = client.chat(model=MODEL, messages=QUESTION, options=options)
        assert whole.done and whole.eval_count == 6
        parts = list(client.chat(model=MODEL, messages=QUESTION, options=options, stream=True))
        assert "".join(part.message.content for part in parts) == whole.message.content
        text = client.generate(model=MODEL, prompt=QUESTION[0]["content"], options=options).response
        assert text == whole.message.content
        assert len(client.embed(model=MODEL, input=["a cat"]).embeddings[0]) == 576
        shaped = client.chat(
            model=MODEL,
            messages=QUESTION,
            format={"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]},
            options={"seed": 1, "num_predict": 40},
        )
        assert isinstance(json.loads(shaped.message.content)["ok"], bool)
        with pytest.raises(ollama.ResponseError) as missing:
            client.chat(model="llama3", messages=QUESTION)
        assert missing.value.status_code == 404


# -- llm ---------------------------------------------------------------------------------------------------------------
def test_llm_answers_streams_and_fits_a_schema(real, tmp_path):
    program = Path(sys.executable).parent / "llm"
    assert program.exists(), "llm comes with the extra default-base"
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: edge\n  model_name: {MODEL}\n  api_base: {real.url}/v1\n"
        "  api_key_name: edge\n  supports_schema: true\n"
    )
    env = {**os.environ, "LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": "", "OPENAI_API_KEY": key_of("ann")}

    def run(*arguments: str) -> str:
        command = [program, "-m", "edge", "--key", key_of("ann"), "-n", *arguments]
        result = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=200, check=False, stdin=subprocess.DEVNULL
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    options = ("-o", "temperature", "0", "-o", "max_tokens", "6")
    streamed = run(QUESTION[0]["content"], *options)
    assert streamed == run(QUESTION[0]["content"], "--no-stream", *options) != ""
    assert isinstance(json.loads(run("A dog", "--schema", "legs int", "-o", "max_tokens", "60"))["legs"], int)


# -- curl --------------------------------------------------------------------------------------------------------------
def test_curl_streams_and_meets_the_door(real):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")

    def curl(*arguments: str) -> tuple[int, str]:
        command = ["curl", "-sN", "-w", "\n%{http_code}", "-H", f"Authorization: Bearer {key_of('ann')}", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
        text, code = result.stdout.rsplit("\n", 1)
        return int(code), text

    url = f"{real.url}/v1/chat/completions"
    body = json.dumps({"messages": QUESTION, "max_tokens": 3, "stream": True})
    kind = ("-H", "Content-Type: application/json")
    code, text = curl(url, *kind, "-d", body)
    assert code == 200 and text.strip().endswith("data: [DONE]")
    assert curl(url, *kind, "-d", "{")[0] == 400
    assert curl(url, "-d", body)[0] == 415  # curl's own content type is a form's
    assert curl(url, *kind, "-H", "Host: evil.example", "-d", body)[0] == 403
    assert curl(f"{real.url}/health", "-I", "-X", "GET")[0] == 200
    asked = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: x-stainless-os,authorization")
    code, text = curl(url, "-i", "-X", "OPTIONS", "-H", "Origin: http://localhost", "-H", asked[0], "-H", asked[1])
    assert code == 204 and "access-control-allow-headers: x-stainless-os,authorization" in text.lower()


# -- programs in processes of their own --------------------------------------------------------------------------------
PROGRAMS = Path(__file__).parent / "programs"
CLIENTS = Path(__file__).parents[2] / ".cache" / "clients"  # scripts/clients.py makes it
NAMES = ["node", "langchain", "litellm"]


def program(name: str, live: Live, mode: str, folder: Path):
    """What the script of that name found."""
    if name == "node":
        if shutil.which("node") is None:
            pytest.skip("there is no node")
        command = ["node", "ask.mjs"]
        assert (CLIENTS / "node" / "node_modules").is_dir(), "run: python scripts/clients.py"
        (folder / "node_modules").symlink_to(CLIENTS / "node" / "node_modules")
        shutil.copy(PROGRAMS / "node" / "ask.mjs", folder)
    else:
        (python,) = [*(CLIENTS / "python").glob("bin/python"), *(CLIENTS / "python").glob("Scripts/python.exe")] or [
            pytest.fail("run: python scripts/clients.py")
        ]
        command = [str(python), str(PROGRAMS / f"ask_{name}.py")]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false", "NO_PROXY": "*"}
    result = subprocess.run(
        [*command, live.url, key_of("ann"), MODEL, mode],
        cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_openai_for_node_does_all_that_a_client_does(real, tmp_path):
    said = program("node", real, "everything", tmp_path)
    assert said["whole"] == said["streamed"] != "" and said["usage"]["completion_tokens"] == 4
    assert said["statuses"] == [400, 401, 404, 413, 415]
    assert isinstance(said["shaped"]["ok"], bool)
    assert (said["models"], said["retrieved"], said["embedded"]) == ([MODEL], MODEL, 576)
    stainless = {name for name in said["sent"] if name.startswith("x-stainless-")}
    status, allowed = said["preflight"]
    assert status == 204 and len(stainless) >= 5 and stainless <= set(allowed.split(","))


def test_langchain_does_all_that_a_client_does(real, tmp_path):
    said = program("langchain", real, "everything", tmp_path)
    assert said["whole"] == said["streamed"] != "" and said["usage"]["output_tokens"] == 4
    assert said["uncounted"] == [] and isinstance(said["shaped"]["ok"], bool) and said["embedded"] == 576
    assert said["errors"] == [
        ["BadRequestError", 400],
        ["AuthenticationError", 401],
        ["NotFoundError", 404],
        ["APIStatusError", 413],
    ]


def test_litellm_does_all_that_a_client_does(real, tmp_path):
    said = program("litellm", real, "everything", tmp_path)
    assert said["whole"] == said["streamed"] != "" and said["usage"] == 4
    assert isinstance(said["shaped"]["ok"], bool) and said["embedded"] == 576
    assert said["errors"][:3] == [["BadRequestError", 400], ["AuthenticationError", 401], ["NotFoundError", 404]]
    assert said["errors"][3][1] == 413


@pytest.mark.parametrize("name", NAMES)
def test_programs_tell_a_full_queue_from_a_loading_model_and_come_back_when_told(tmp_path, monkeypatch, name):
    with serving(Home(tmp_path / "home"), open_engine=fake_engine()) as live:
        left, check = [busy(), loading(), loading()], live.service.decoder.check

        def first():
            if left:
                raise left.pop(0)
            check()

        monkeypatch.setattr(live.service.decoder, "check", first)
        said = program(name, live, "refused", tmp_path)
    assert (
        said["statuses" if name == "node" else "errors"]
        == {
            "node": [429, 503],
            "langchain": [["RateLimitError", 429], ["InternalServerError", 503]],
            "litellm": [["RateLimitError", 429], ["ServiceUnavailableError", 503]],
        }[name]
    )
    assert said["waited"] >= 1.0  # as Retry-After says, not the SDK's own half second


@pytest.mark.parametrize("name", NAMES)
def test_decoding_ends_when_a_program_has_heard_enough(tmp_path, name):
    slow = fake_engine(SlowBackend(config=RuntimeConfig(n_ctx=4096)))
    with serving(Home(tmp_path / "home"), open_engine=slow) as live:
        program(name, live, "gone", tmp_path)
        until(lambda: "edge_align:answers_cancelled_total 1" in live.ask("GET", "/metrics").data.decode())
