"""Who may call, with what, and how much of it; each line of the list in docs/server.md."""

import http.client
import inspect
import json
import logging
import os
import re
import select
import socket
import stat
import time
from pathlib import Path

import openai
import psutil
import pytest
from click.testing import CliRunner
from live_server import bearer, fake_engine, keys_of, Live, MODEL, QUESTION, serving

from edge_align.cli.main import cli
from edge_align.config import ServerConfig
from edge_align.errors import InputError
from edge_align.home import Home
from edge_align.server.app import create_app
from edge_align.server.guard import OPEN_PATHS
from edge_align.server.keys import Keys

DOCUMENT = create_app(home=Home(Path("unused")), open_engine=fake_engine())._app.openapi()
ROUTES = [
    *((method.upper(), re.sub("{.*}", "ann", path)) for path, found in DOCUMENT["paths"].items() for method in found),
    ("GET", "/openapi.json"),
    ("GET", "/nothing"),
    ("OPTIONS", "/v1/chat/completions"),
]
TAKING = [route for route in ROUTES if route[0] in ("POST", "DELETE")]


def raw(live: Live, data: bytes, *, seconds: float = 10.0) -> bytes:
    """What the server answers to these bytes, until it closes or goes quiet."""
    found = b""
    with socket.create_connection(("127.0.0.1", live.port), timeout=seconds) as connection:
        connection.sendall(data)
        try:
            while part := connection.recv(65536):
                found += part
        except (TimeoutError, ConnectionResetError):
            pass
    return found


# -- where from --------------------------------------------------------------------------------------------------------
def test_the_default_address_is_this_machine_and_another_needs_keys(tmp_path):
    assert ServerConfig().host == "127.0.0.1"
    for host in ("0.0.0.0", "::", "192.168.1.5"):
        with pytest.raises(InputError, match="api-key-file"):
            create_app(home=Home(tmp_path), config=ServerConfig(host=host), open_engine=fake_engine())
    assert create_app(
        home=Home(tmp_path), config=ServerConfig(host="0.0.0.0"), keys=keys_of(ann=()), open_engine=fake_engine()
    )


def test_the_command_refuses_such_an_address_in_one_line():
    result = CliRunner().invoke(cli, ["serve", "--host", "0.0.0.0", "--port", "0"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "--api-key-file" in result.stderr


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_foreign_host_name_is_refused_on_every_route(fake, method, path):
    for host in ("evil.example", "evil.example:8377", "127.0.0.1.evil.example", "localhost.", ""):
        reply = fake.ask(method, path, {} if method in ("POST", "DELETE") else None, {"Host": host})
        assert reply.status == 403, host
        assert "error" in reply.json


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]", "[::1]:8377", "LOCALHOST:8377"])
def test_this_machines_own_names_are_served(fake, host):
    assert fake.ask("GET", "/health", headers={"Host": host}).status == 200


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_foreign_origin_is_refused_on_every_route(fake, method, path):
    for origin in ("https://evil.example", "null", "http://localhost.evil.example", "http://127.0.0.1@evil.example"):
        reply = fake.ask(method, path, {} if method in ("POST", "DELETE") else None, {"Origin": origin})
        assert reply.status == 403, origin
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    "origin",
    ["http://localhost:3000", "http://127.0.0.1", "https://[::1]:1", "app://obsidian.md", "tauri://localhost",
     "vscode-webview://1a2b"],
)  # fmt: skip
def test_local_pages_and_desktop_programs_may_call_and_are_named_back_without_credentials(fake, origin):
    reply = fake.ask("GET", "/v1/models", headers={"Origin": origin})
    assert reply.status == 200 and reply.headers["access-control-allow-origin"] == origin
    assert "access-control-allow-credentials" not in reply.headers
    assert "Origin" in reply.headers["vary"]


def test_a_preflight_echoes_the_headers_that_sdks_send_and_needs_no_key(tmp_path):
    asked = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-retry-count,x-stainless-timeout"
    headers = {
        "Origin": "http://localhost:5173",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": asked,
    }
    with serving(Home(tmp_path / "home"), open_engine=fake_engine(), keys=keys_of(ann=())) as live:
        reply = live.ask("OPTIONS", "/v1/chat/completions", headers=headers)
        assert reply.status == 204
        assert reply.headers["access-control-allow-headers"] == asked
        assert "POST" in reply.headers["access-control-allow-methods"]
        refused = live.ask("GET", "/v1/models", headers={"Origin": "http://localhost:5173"})
        assert refused.status == 401 and refused.headers["access-control-allow-origin"] == "http://localhost:5173"


def test_names_and_origins_can_be_added(tmp_path):
    config = ServerConfig(hosts=("box.lan",), origins=("https://chat.example",))
    with serving(Home(tmp_path / "home"), open_engine=fake_engine(), config=config) as live:
        headers = {"Host": "box.lan:8377", "Origin": "https://chat.example"}
        assert live.ask("GET", "/health", headers=headers).status == 200


def test_only_json_is_taken_so_no_page_can_post_without_a_preflight(fake):
    body = json.dumps({"messages": QUESTION}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        reply = fake.ask("POST", "/v1/chat/completions", body, {"Content-Type": kind})
        assert reply.status == 415 and "application/json" in reply.json["error"]["message"]


# -- keys --------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """A server with the keys of ann and bob, bound to their profiles, and of root, bound to none."""
    home = Home(tmp_path_factory.mktemp("locked") / "home")
    for name in ("ann", "bob", "cat"):
        (home.profiles_dir / name).mkdir(parents=True)
    keys = keys_of(ann=("ann",), bob=("bob", "cat"), root=())
    with serving(home, open_engine=fake_engine(), keys=keys) as live:
        yield live


@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if route[0] != "OPTIONS"])
def test_every_route_but_the_signs_of_life_needs_a_key(locked, method, path):
    body = {} if method in ("POST", "DELETE") else None
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic YTpi"}, {"X-Api-Key": "é"}):
        status = locked.ask(method, path, body, headers).status
        assert (status == 401) == (path not in OPEN_PATHS)


def test_a_key_is_taken_as_bearer_or_as_x_api_key(locked):
    assert locked.ask("GET", "/v1/models", headers=bearer("root")).status == 200
    assert locked.ask("GET", "/v1/models", headers={"X-Api-Key": "root-root-root-root-root"}).status == 200


def test_a_bound_key_answers_with_its_profile_and_can_use_and_see_no_other(locked):
    ann = locked.chat(headers=bearer("ann")).json["edge_align"]["profile"]
    assert ann == "ann"
    for named in ({"steering": {"profile": "bob"}}, {"model": f"{MODEL}@bob"}, {"steering": {"profile": "nobody"}}):
        reply = locked.chat(headers=bearer("ann"), **named)
        assert reply.status == 403 and "bob" not in reply.json["error"]["message"]
    assert locked.chat(headers=bearer("bob"), steering={"profile": "cat"}).json["edge_align"]["profile"] == "cat"
    ids = [one["id"] for one in locked.ask("GET", "/v1/models", headers=bearer("ann")).json["data"]]
    assert ids == [MODEL, f"{MODEL}@ann"]
    assert [one["name"] for one in locked.ask("GET", "/cvectors", headers=bearer("ann")).json] == ["ann"]
    assert locked.ask("POST", "/cvectors", {"cvectors": []}, bearer("ann")).status == 403
    for method, path in (
        ("GET", "/v1/profiles/bob"),
        ("POST", "/v1/profiles/bob/undo"),
        ("GET", "/v1/feedback?profile=bob"),
    ):
        assert locked.ask(method, path, {} if method == "POST" else None, bearer("ann")).status == 403


def test_prompt_caches_are_shared_by_the_profiles_of_a_key_and_never_by_two_keys(locked):
    long = "a question of some length that is asked again " * 4

    def cached(key, **more):
        usage = locked.chat(long, headers=bearer(key), **more).json["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]

    template = 7  # tokens that all prompts of an owner begin with
    assert cached("bob")[0] <= template
    hit, prompt = cached("bob", steering={"profile": "cat"})
    assert hit == prompt - 1  # all but the last token, which is steered
    assert cached("ann")[0] <= template
    assert cached("root")[0] <= template
    assert cached("bob")[0] == prompt - 1  # ann and root have taken its slot meanwhile; the kept copy serves


def test_an_answer_of_one_key_cannot_be_judged_by_another(locked):
    id = locked.chat(headers=bearer("ann")).json["id"]
    reply = locked.ask("POST", "/v1/feedback", {"id": id, "rating": "up"}, bearer("bob"))
    assert reply.status == 404
    assert locked.ask("POST", "/v1/feedback", {"id": id, "rating": "up"}, bearer("ann")).status == 200


def test_a_missing_key_file_is_made_private_with_one_long_random_key(tmp_path):
    path = tmp_path / "keys" / "serve.keys"
    first = Keys.load(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = path.read_text().splitlines()[-1]
    assert len(key) >= 43 and first.caller(key) is not None
    assert Keys.load(path).known == first.known
    assert key not in repr(first)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 keys"),
        (b"short\n", "16 characters"),
        (b"a-long-enough-key ../x\n", "profile name"),
        ("schlüssel-schlüssel\n".encode(), "ASCII"),
    ],
)
def test_a_key_file_that_cannot_be_used_says_why(tmp_path, content, says):
    path = tmp_path / "keys"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(InputError, match=says):
        Keys.load(path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_key_file_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "keys"
    path.write_text("a-long-enough-key-for-anybody\n")
    path.chmod(0o640)
    with pytest.raises(InputError, match="chmod 600"):
        Keys.load(path)


def test_keys_are_compared_by_compare_digest_all_of_them():
    source = inspect.getsource(Keys.caller)
    assert "compare_digest" in source and "break" not in source and "return caller" not in source


# -- how much ----------------------------------------------------------------------------------------------------------
def test_a_body_is_refused_while_it_streams_in_whatever_it_declares(tmp_path):
    with serving(Home(tmp_path / "home"), open_engine=fake_engine(), config=ServerConfig(body_bytes=10_000)) as live:
        declared = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 200000000\r\n\r\n{"
        )
        assert b" 413 " in raw(live, declared, seconds=2).split(b"\r\n")[0]
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunks = b"".join(b"1000\r\n" + b" " * 4096 + b"\r\n" for _ in range(4))  # 16 KiB, and no end
        reply = raw(live, head + chunks, seconds=2)
        assert b" 413 " in reply.split(b"\r\n")[0] and b'"error"' in reply
        assert live.chat("x" * 9000).status in (200, 400)
        assert live.chat().status == 200


@pytest.mark.parametrize("line", [b"Content-Length: 200000000", b"Transfer-Encoding: chunked"], ids=["told", "untold"])
def test_a_body_of_200_megabytes_is_refused_and_kept_nowhere(fake, line):
    before = psutil.Process().memory_info().rss
    piece = b"x" * (1 << 20)
    piece = piece if line.startswith(b"Content") else b"%x\r\n%s\r\n" % (len(piece), piece)
    with socket.create_connection(("127.0.0.1", fake.port), timeout=30) as connection:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection.sendall(head + line + b"\r\n\r\n")
        sent, reply = 0, b""
        try:
            while sent < 200 and not select.select([connection], [], [], 0)[0]:
                connection.sendall(piece)
                sent += 1
            reply = connection.recv(65536)
        except ConnectionError:
            pass  # who sends on past what is read of a refused body may miss the refusal
        assert sent < 200 and (not reply or b" 413 " in reply.split(b"\r\n")[0])
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert fake.chat().status == 200


@pytest.mark.parametrize(("method", "path"), TAKING)
def test_deep_json_is_refused_on_every_route_that_takes_some(fake, method, path):
    for body in (b"[" * 100_000, b'{"messages":' * 40 + b"1" + b"}" * 40, b'{"a":' + b"[" * 2_000_000):
        reply = fake.ask(method, path, body)
        assert reply.status == 400 and "nested" in str(reply.json["error"])


def test_a_body_that_does_not_arrive_is_given_up(tmp_path):
    with serving(Home(tmp_path / "home"), open_engine=fake_engine(), config=ServerConfig(body_sec=0.2)) as live:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        reply = raw(live, head + b"Content-Length: 100\r\n\r\n{", seconds=5)
        assert b" 408 " in reply.split(b"\r\n")[0]


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100 + b"1" + b"}" * 100,
        b'{"messages":' + b"[" * 40 + b"]" * 40 + b"}",
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}',
        b"[]",
        b'"text"',
        b"{",
        b"\xff\xfe{}",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b"",
    ],
)  # fmt: skip
def test_json_that_is_deep_huge_or_none_is_a_400_with_a_sentence(fake, body):
    reply = fake.ask("POST", "/v1/chat/completions", body)
    assert reply.status == 400 and len(reply.json["error"]["message"]) > 10


def test_brackets_inside_texts_are_not_nesting(fake):
    assert fake.chat('[[[[{{"\\' * 20).status == 200


@pytest.mark.parametrize("field", ["n", "seed", "max_tokens", "temperature", "top_p", "top_k", "top_logprobs", "stop"])
@pytest.mark.parametrize("value", [-1, -(2**63) - 1, 2**64 + 1, 1e308, "1", [], {}, True])
def test_no_number_out_of_range_reaches_the_engine(fake, field, value):
    reply = fake.chat(**{field: value, "logprobs": True})
    allowed = (field, value) in [("seed", -1), ("stop", []), ("stop", "1")]
    assert reply.status == (200 if allowed else 400), reply.data


def test_headers_without_end_are_cut_off(fake):
    reply = raw(fake, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 200_000, seconds=2)
    assert b" 400 " in reply.split(b"\r\n")[0] or reply == b""


# -- what is told ------------------------------------------------------------------------------------------------------
SECRET = "walrus-moustache"


def test_no_text_of_a_prompt_an_answer_or_a_key_is_logged(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(Home(tmp_path / "home"), open_engine=fake_engine(), keys=keys_of(ann=("ann",))) as live:
        said = [live.chat(f"{SECRET} {i}", headers=bearer("ann"), stream=i % 2 == 0) for i in range(4)]
        answer = live.chat(SECRET, headers=bearer("ann")).json
        live.ask("POST", "/v1/feedback", {"id": answer["id"], "edited": SECRET, "reason": SECRET}, bearer("ann"))
        live.chat(f"{SECRET} {SECRET}" * 300, headers=bearer("ann"))  # too long
        live.ask("POST", "/v1/chat/completions", f'{{"{SECRET}'.encode(), bearer("ann"))
        live.ask("GET", f"/v1/models/{SECRET}", headers=bearer("ann"))
        live.ask("GET", f"/{SECRET}?q={SECRET}", headers=bearer("ann"))
    assert all(reply.status == 200 for reply in said)
    text = caplog.text
    assert "/v1/chat/completions" in text  # something is logged
    assert SECRET not in text and "ann-ann" not in text
    assert answer["choices"][0]["message"]["content"] not in text


def test_no_refusal_tells_a_path_or_a_profile(locked, tmp_path):
    for body in ({"steering": {"profile": "bob"}}, {"model": "/etc/passwd"}, {"model": f"{MODEL}@../../x"}):
        message = locked.chat(headers=bearer("ann"), **body).json["error"]["message"]
        assert "/home" not in message and str(tmp_path.parent) not in message and "bob" not in message


def test_nothing_unexpected_is_told_to_the_client(tmp_path):
    def prepare_fails(*_):
        raise RuntimeError(f"{SECRET} in /secret/place")

    profiles = type("Broken", (), {"steering": prepare_fails})()
    home = Home(tmp_path / "home")
    (home.profiles_dir / "ann").mkdir(parents=True)
    with serving(home, open_engine=fake_engine(profiles=profiles)) as live:
        for stream in (False, True):
            reply = live.chat(steering={"profile": "ann"}, stream=stream)
            assert reply.status == 500 and SECRET.encode() not in reply.data and b"secret" not in reply.data
        assert live.chat().status == 200


def test_who_sends_the_whole_of_a_refused_body_first_still_hears_the_refusal(tmp_path):
    """Closing on bytes that nobody read resets the connection: two clients in five never saw the answer."""
    with serving(Home(tmp_path / "home"), open_engine=fake_engine(), config=ServerConfig(body_bytes=1 << 20)) as live:
        for _ in range(30):
            with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
                with pytest.raises(openai.APIStatusError) as refused:
                    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x" * (3 << 20)}])
            assert refused.value.status_code == 413


def test_no_route_takes_a_path_or_an_address(fake):
    schema = fake.ask("GET", "/openapi.json").json
    names = {
        p["name"] for path in schema["paths"].values() for route in path.values() for p in route.get("parameters", [])
    }
    assert names <= {"id", "name", "profile"}


def test_slow_clients_do_not_keep_others_waiting(fake):
    held = [socket.create_connection(("127.0.0.1", fake.port)) for _ in range(40)]
    try:
        for connection in held:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")
        started = time.monotonic()
        assert fake.chat().status == 200
        assert time.monotonic() - started < 5
    finally:
        for connection in held:
            connection.close()


def test_a_second_request_on_the_same_connection_is_served(fake):
    connection = http.client.HTTPConnection("127.0.0.1", fake.port, timeout=10)
    for _ in range(2):
        connection.request(
            "POST", "/v1/chat/completions", json.dumps({"messages": QUESTION, "max_tokens": 3}),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        reply = connection.getresponse()
        assert reply.status == 200 and json.loads(reply.read())["object"] == "chat.completion"
    connection.close()
