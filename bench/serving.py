"""Servers in processes of their own, and clients that put load on them; no script, `server_load.py` uses it.

The clients are threads over http.client. What they do for an event is small beside a token, and the server has a
process of its own, so that little of what is timed is theirs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from itertools import cycle
from typing import Any, IO

import psutil
from common import Bench, ROOT

from edge_align import SPINS
from edge_align.errors import BackendError
from edge_align.home import Home
from edge_align.runtime.llama_native import n_cores
from edge_align.simulation.prompts import prompts

WAIT_SEC = 600.0  # for one answer, and for a server to be ready
THEIRS = """
import runpy
import llama_cpp.llama_cpp as C
from edge_align.runtime.llama_native import model_params
given = model_params()
C.llama_model_default_params = lambda: given  # their crash on AMX is not what is measured
runpy.run_module("llama_cpp.server", run_name="__main__")
"""
CLI = "from edge_align.cli.main import main; main()"
JSON = {"Content-Type": "application/json"}

Body = dict[str, Any]


def questions() -> Iterator[str]:
    """All prompts, none before its turn; from the start again after hundreds."""
    return cycle([*prompts("train"), *prompts("validation"), *prompts("test")])


def chat(question: str, *, tokens: int, system: str | None = None, **more: Any) -> Body:
    """A greedy request to /v1/chat/completions; `more` are further fields. All that servers differ in is set."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    return {
        "messages": [*turns, {"role": "user", "content": question}],
        "max_tokens": tokens,
        "temperature": 0,
        "seed": 1,
        "repeat_penalty": 1.0,  # llama-cpp-python's server penalises by default
        **more,
    }


@dataclass(frozen=True)
class Reply:
    """A streamed answer as its client saw it; times are of time.perf_counter().

    times: of each event that brought text. whole: the server said that the answer had ended.
    """

    status: int
    start: float
    end: float
    text: str = ""
    times: tuple[float, ...] = ()
    whole: bool = False
    id: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)  # `edge_align`: profile, version, strength, seed

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.whole

    @property
    def ttft_sec(self) -> float:
        """From the request to the first text; to the end of an answer without any."""
        return (self.times or (self.end,))[0] - self.start

    @property
    def tokens(self) -> int:
        return int(self.usage.get("completion_tokens", 0))


@dataclass(frozen=True)
class Server:
    """A running server and its process."""

    port: int
    process: subprocess.Popen[str]
    log: IO[str]

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """(status, JSON or text) of one request; a body of bytes is sent as it is. Raises OSError, HTTPException."""
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SEC)) as connection:
            connection.request(method, path, data, JSON if data is not None else {})
            reply = connection.getresponse()
            raw = reply.read()
        return reply.status, json.loads(raw) if "json" in (reply.getheader("content-type") or "") else raw.decode()

    def stream(self, body: Body, *, leave_after: int | None = None) -> Reply:
        """One streamed chat completion. leave_after: hang up after so many events with text.

        A connection that breaks is status 0.
        """
        data = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
        start = time.perf_counter()
        try:
            with closing(HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SEC)) as connection:
                connection.request("POST", "/v1/chat/completions", data, JSON)
                reply = connection.getresponse()
                if reply.status != 200:
                    reply.read()
                    return Reply(reply.status, start, time.perf_counter())
                return _events(reply, start, leave_after)
        except (OSError, HTTPException):
            return Reply(0, start, time.perf_counter())

    def ready(self, path: str = "/health") -> Server:
        """Wait until `path` is answered with 200. Raises BackendError with the log's end where that never happens."""
        deadline = time.monotonic() + WAIT_SEC
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                if self.ask("GET", path)[0] == 200:
                    return self
            except (OSError, HTTPException):
                pass
            time.sleep(0.05)
        raise BackendError(f"the server does not start: {_tail(self.log)}")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def resident_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def gauge(self, name: str) -> float:
        """A value of /metrics."""
        _, text = self.ask("GET", "/metrics")
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"edge_align:{name} "))


def _events(lines: Iterator[bytes] | Any, start: float, leave_after: int | None) -> Reply:
    """Read server-sent events to their end, or until enough of them had text."""
    texts, times, seen = [], [], {"whole": False, "id": "", "usage": {}, "about": {}}
    for line in lines:
        now = time.perf_counter()
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            seen["whole"] = True
            break
        event = json.loads(line[6:])
        seen["id"] = event.get("id") or seen["id"]
        seen["usage"] = event.get("usage") or seen["usage"]
        seen["about"] = event.get("edge_align") or seen["about"]
        for choice in event.get("choices", ()):
            if text := choice["delta"].get("content"):
                texts.append(text)
                times.append(now)
        if leave_after is not None and len(times) >= leave_after:
            break
    return Reply(200, start, time.perf_counter(), "".join(texts), tuple(times), **seen)


# -- load ----------------------------------------------------------------------------------------------------------
def load(server: Server, bodies: Sequence[Body], clients: int) -> tuple[float, list[Reply]]:
    """Seconds, and the answers in the order of the bodies; each client asks its next when it has its answer."""
    with ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        replies = list(pool.map(server.stream, bodies))
        return time.perf_counter() - start, replies


def arriving(server: Server, bodies: Sequence[Body], offsets: Sequence[float]) -> list[Reply]:
    """The answers to requests that come in `offsets` seconds from now, whatever has been answered by then."""
    start = time.perf_counter()

    def client(body: Body, offset: float) -> Reply:
        time.sleep(max(0.0, start + offset - time.perf_counter()))
        return server.stream(body)

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(client, bodies, offsets))


@contextmanager
def streaming(server: Server, bodies: Iterator[Body], clients: int) -> Iterator[list[tuple[Body, Reply]]]:
    """Clients that ask without a pause while the block runs; when it has ended, the list holds all they were told."""
    found: list[tuple[Body, Reply]] = []
    over, lock = threading.Event(), threading.Lock()

    def client() -> None:
        while not over.is_set():
            with lock:
                body = next(bodies)
            found.append((body, server.stream(body)))

    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(client) for _ in range(clients)]
        try:
            yield found
        finally:
            over.set()
        for future in futures:
            future.result()


# -- servers -------------------------------------------------------------------------------------------------------
@contextmanager
def edge_align(bench: Bench, home: Home, *options: str) -> Iterator[Server]:
    """`edge-align serve` on a free port, with this home folder; it listens, but may still be loading the base."""
    command = [sys.executable, "-c", CLI, "serve", "--port", "0", "--json", "--threads", str(bench.args.threads)]
    command += ["--model", bench.args.model] if bench.args.model else []
    paths = os.pathsep.join([str(ROOT), str(ROOT / "export")])
    env = os.environ | {"EDGE_ALIGN_HOME": str(home.root), "PYTHONPATH": paths}
    with _running([*command, *options], env, stdout=subprocess.PIPE) as (process, log):
        assert process.stdout is not None
        document = ""
        while not document.endswith("}\n"):
            if not (line := process.stdout.readline()):
                raise BackendError(f"the server does not start: {_tail(log)}")
            document += line
        yield Server(json.loads(document)["port"], process, log)


@contextmanager
def llama_cpp_server(bench: Bench) -> Iterator[Server]:
    """llama-cpp-python's own server on the same file, threads and context; it finishes what it began."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    threads = str(bench.runtime.n_threads or n_cores())
    options = {
        "model": str(bench.base.path),
        "host": "127.0.0.1",
        "port": str(port),
        "n_ctx": str(bench.runtime.n_ctx),
        "n_threads": threads,
        "n_threads_batch": threads,
        "flash_attn": "true",  # as ours
        "interrupt_requests": "false",  # else a new request ends the one before it
        "verbose": "false",
    }
    command = [sys.executable, "-c", THEIRS, *(part for k, v in options.items() for part in (f"--{k}", v))]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    if env.get("GOMP_SPINCOUNT") == str(SPINS):
        del env["GOMP_SPINCOUNT"]  # edge-align's, which it would not have by itself
    with _running(command, env) as (process, log):
        yield Server(port, process, log)


@contextmanager
def _running(
    command: list[str], env: dict[str, str], *, stdout: int | None = None
) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """A process for one block, ended as with Ctrl-C, and the log of what it writes. stdout: where else that goes."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=stdout or log, stderr=log, text=True)
        try:
            yield process, log
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def _tail(log: IO[str]) -> str:
    log.seek(0)
    return log.read()[-2000:].strip()
