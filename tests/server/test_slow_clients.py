"""Clients that send or read a byte now and then, or none: each is given up, and nobody else waits for it."""

import json
import socket
import time

import pytest
from live_server import fake_engine, MODEL, QUESTION, serving, SlowBackend, until

from edge_align.config import RuntimeConfig, ServerConfig
from edge_align.home import Home

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
DRIP_SEC = 0.02


def drip(live, data, *, first=b"", seconds=20.0):
    """Send `first`, then `data` byte by byte while the server listens; what it said, and whether it ended it."""
    found, deadline = b"", time.monotonic() + seconds
    with socket.create_connection(("127.0.0.1", live.port), timeout=DRIP_SEC) as connection:
        connection.sendall(first)
        while time.monotonic() < deadline:
            try:
                part = connection.recv(65536)
                if not part:
                    return found, True
                found += part
            except TimeoutError:
                pass
            except ConnectionError:
                return found, True
            try:
                connection.sendall(data[:1])
                data = data[1:] or data
            except ConnectionError:
                pass  # what it said comes first
    return found, False


def refusal(reply):
    head, _, body = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


@pytest.fixture
def hasty(tmp_path):
    config = ServerConfig(head_sec=0.3, body_sec=0.3, read_sec=0.3)
    backend = SlowBackend(config=RuntimeConfig(n_ctx=4096))
    with serving(Home(tmp_path / "home"), open_engine=fake_engine(backend), config=config) as live:
        yield live


@pytest.mark.parametrize(
    "first", [b"", b"G", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n", HEAD + b"X-Slow: "], ids=len
)
def test_headers_that_trickle_are_given_up(hasty, first):
    reply, ended = drip(hasty, b"a", first=first)
    assert ended
    status, message = refusal(reply)
    assert status == 408 and "headers" in message


def test_a_connection_that_says_nothing_is_given_up(hasty):
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=20) as connection:
        assert b" 408 " in connection.recv(65536)


def test_headers_that_trickle_on_a_used_connection_are_given_up(hasty):
    reply, ended = drip(hasty, b"GET /health HTTP/1.1\r\nX: aaaaaa", first=b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert ended and reply.startswith(b"HTTP/1.1 200") and b" 408 " in reply


def test_a_body_that_trickles_is_given_up(hasty):
    for length in (b"Content-Length: 100000", b"Transfer-Encoding: chunked"):
        data = b" " if length.startswith(b"Content") else b"1\r\n \r\n" * 1000
        reply, ended = drip(hasty, data, first=HEAD + length + b"\r\n\r\n")
        assert ended
        status, message = refusal(reply)
        assert status == 408 and "body" in message


def test_a_body_that_nobody_asked_for_and_that_never_ends_is_given_up(hasty):
    head = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n"
    reply, ended = drip(hasty, b" ", first=head)
    assert ended and reply.startswith(b"HTTP/1.1 200")


def test_who_does_not_read_his_answer_is_given_up_and_its_decoding_ends(tmp_path):
    config = ServerConfig(read_sec=0.3)
    engine = fake_engine(SlowBackend(config=RuntimeConfig(n_ctx=8192)))
    with serving(Home(tmp_path / "home"), open_engine=engine, config=config, send_buffer=4096) as live:
        body = {"model": MODEL, "messages": QUESTION, "stream": True, "max_tokens": 4096, "logprobs": True}
        data = json.dumps({**body, "top_logprobs": 20}).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", live.port))
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data)
            until(lambda: "edge_align:answers_cancelled_total 1" in live.ask("GET", "/metrics").data.decode())
        assert live.chat(max_tokens=3).status == 200


def test_waiting_for_a_long_answer_is_no_slowness(hasty):
    assert hasty.chat(max_tokens=150).json["usage"]["completion_tokens"] == 150  # 0.6 s, twice the limits


def test_one_connection_too_many_is_a_503_that_says_when_to_come_back(tmp_path):
    with serving(Home(tmp_path / "home"), open_engine=fake_engine(), config=ServerConfig(connections=2)) as live:
        held = [socket.create_connection(("127.0.0.1", live.port)) for _ in range(2)]
        try:
            until(lambda: live.ask("GET", "/health").status == 503)
            reply = live.chat()
            assert reply.status == 503 and reply.headers["retry-after"] == "1"
            assert reply.json["error"]["code"] == "crowded"
        finally:
            for connection in held:
                connection.close()
        until(lambda: live.ask("GET", "/health").status == 200)
        assert live.chat().status == 200


def test_what_is_not_http_is_refused_in_json(fake):
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
    ):
        reply, ended = drip(fake, b"\n", first=data)
        assert ended and refusal(reply)[0] == 400
