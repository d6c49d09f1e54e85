"""The part of `server_load.py` that lasts: thousands of requests, many broken off, wrong, or to be learnt from."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from statistics import median
from typing import Any

import numpy as np
from common import Bench, fresh_home, progress, random_latent, save_latent
from serving import chat, edge_align, Server

from edge_align.simulation.prompts import prompts
from edge_align.store import FeedbackLog

BAD: tuple[tuple[str, Any], ...] = (
    ("/v1/chat/completions", b"{"),
    ("/v1/chat/completions", b"[" * 100_000),
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/chat/completions", chat("x", tokens=4) | {"max_tokens": -1}),
    ("/v1/chat/completions", chat("x", tokens=4) | {"temperature": 1e300}),
    ("/v1/chat/completions", chat("x " * 5000, tokens=4)),
    ("/v1/chat/completions", chat("x", tokens=4, steering={"profile": "nobody"})),
    ("/v1/feedback", {"id": "chatcmpl-none", "rating": "up"}),
    ("/v1/feedback", {"id": "x", "rating": 11}),
    ("/v1/nothing", {}),
)


Verdict = tuple[str, str, str, bool]  # profile, question, answer, up


@dataclass(frozen=True)
class Outcome:
    """kind: of the request; wanted: did it end as such a request should; verdict: one that the server took."""

    kind: str
    wanted: bool
    status: int
    verdict: Verdict | None = None


def soak(bench: Bench) -> dict[str, Any]:
    """Thousands of short answers with clients that hang up, bodies that are wrong, verdicts and refits in between."""
    args, total = bench.args, bench.args.soak_requests
    names, blocks = [f"taste-{i}" for i in range(4)], 10 if args.quick else 50
    outcomes: list[Outcome] = []
    resident: list[int] = []
    with fresh_home(bench) as home:
        for i, name in enumerate(names):
            save_latent(bench, home, name, random_latent(bench, i))
        with edge_align(bench, home, "--no-profile", "--learn", "manual") as server:
            server.ready()
            with ThreadPoolExecutor(args.clients) as pool, progress("requests", total) as tell:
                for block, numbers in enumerate(np.array_split(np.arange(total), blocks)):
                    if block % 5 == 4:  # under way while the block's requests are answered
                        server.ask("POST", f"/v1/profiles/{names[block % 4]}/learn", {})
                    outcomes += pool.map(lambda number: one_request(server, names, int(number), args.seed), numbers)
                    resident.append(server.resident_bytes)
                    tell(int(numbers[-1]) + 1)
            stuck = drained(server)
            refits = server.gauge("refits_total")
            after = server.stream(chat("How do boats float?", tokens=8))
            survived = server.alive and after.ok
        with FeedbackLog(home) as log:
            rows = [(name, row) for name in names for row in log.rows(name)]
    logged = {(name, row.prompt[-1].content, row.completion, row.label) for name, row in rows}
    taken = {one.verdict for one in outcomes if one.verdict is not None}  # one that is given twice is logged once
    warm, last = resident[blocks // 5 : 2 * blocks // 5], resident[-blocks // 5 :]
    return {
        "requests": len(outcomes),
        "kinds": Counter(one.kind for one in outcomes),
        "statuses": {str(status): n for status, n in sorted(Counter(one.status for one in outcomes).items())},
        "unwanted": Counter(f"{one.kind} {one.status}" for one in outcomes if not one.wanted),
        "survived": survived,
        "unfinished_at_the_end": stuck,
        "refits": refits,
        "verdicts": {"taken": len(taken), "missing": len(taken - logged), "never_given": len(logged - taken)},
        "resident_mb": {"warm": median(warm) / 1e6, "end": median(last) / 1e6, "peak": max(resident) / 1e6},
        "resident_growth": median(last) / median(warm) - 1,
    }


def one_request(server: Server, names: Sequence[str], number: int, seed: int) -> Outcome:
    """Request `number` of the soak; what it is depends on its number alone."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choices(("answer", "verdict", "leaves", "bad", "long"), weights=(60, 20, 10, 5, 5))[0]
    name = rng.choice(names)
    if kind == "bad":
        path, body = rng.choice(BAD)
        try:
            status, _ = server.ask("POST", path, body)
        except (OSError, HTTPException):
            status = 0
        return Outcome(kind, 400 <= status < 500, status)
    question = rng.choice(prompts("train"))
    if kind == "long":  # no two alike, so that the prompt cache is filled and has to let go
        question = " ".join([str(number), *rng.sample(prompts("train"), 12)])
    body = chat(question, tokens=rng.randint(1, 8), temperature=1.0, seed=number, steering={"profile": name})
    if kind == "leaves":
        reply = server.stream(body | {"max_tokens": 64}, leave_after=rng.randint(0, 3))
        return Outcome(kind, reply.status == 200, reply.status)
    reply = server.stream(body)
    if kind != "verdict" or not reply.ok or not reply.text.strip():
        return Outcome(kind, reply.ok, reply.status)
    up = rng.random() < 0.5
    status, _ = server.ask("POST", "/v1/feedback", {"id": reply.id, "rating": "up" if up else "down"})
    return Outcome(kind, status == 200, status, (name, question, reply.text, up) if status == 200 else None)


def drained(server: Server) -> float:
    """Answers that are still unfinished a while after the last request; 0 as it should be."""
    for _ in range(100):
        left = server.gauge("requests_processing") + server.gauge("requests_deferred")
        if not left:
            break
        time.sleep(0.1)
    return left
