"""Parts of `server_load.py` in which the server learns: what running answers notice of it, and what a person gets."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from common import Bench, chosen_users, console, fresh_home, progress, ROOT
from serving import Body, chat, edge_align, load, questions, Reply, Server, streaming

from edge_align.home import Home
from edge_align.personalize import RowCounts, Source, usable_rows
from edge_align.profiles import ProfileStore
from edge_align.simulation.prompts import prompts
from edge_align.simulation.users import bootstrap_interval, User, wins
from edge_align.store import FeedbackLog

NAME = "person"
NEAR = 40  # answers around a swap that are each compared with their single run
EXAMPLES = ROOT / "examples" / "feedback.jsonl"


def learning(bench: Bench) -> dict[str, Any]:
    """Gaps between the tokens of running answers before and during a refit and the swap; are answers of one version?

    A version that the gate does not activate is activated all the same, as `edge-align profiles` could: the swap is
    what is measured.
    """
    args, rows = bench.args, []
    counts = [int(n) for n in args.streams.split(",")]
    verdicts = [*usable_rows([Source(EXAMPLES.name, EXAMPLES)], RowCounts(), user=None)]
    share = len(verdicts) // (1 + len(counts) * args.refits)
    shares = iter([verdicts[i : i + share] for i in range(0, len(verdicts), share)])
    bodies = (chat(question, tokens=args.stream_tokens) for question in questions())
    with fresh_home(bench) as home, edge_align(bench, home, "--profile", NAME, "--learn", "manual") as server:
        server.ready()
        refit(server, home, next(shares))
        for clients in counts:
            before: list[float] = []
            during: list[float] = []
            told: list[tuple[Body, Reply]] = []
            near: list[tuple[Body, Reply]] = []
            seconds, activated = [], 0
            for _ in range(args.refits):
                with streaming(server, bodies, clients) as found:
                    time.sleep(args.window)
                    start = time.perf_counter()
                    activated += refit(server, home, next(shares))
                    swap = time.perf_counter()
                    time.sleep(args.window)  # the swap is what the next answers begin with
                    end = time.perf_counter()
                before += gaps(found, end=start)
                during += gaps(found, start=start, end=end)
                seconds.append(swap - start)
                told += found
                near += nearest(found, swap)
            rows.append(
                {
                    "streams": clients,
                    "refits": args.refits,
                    "activated_by_the_gate": activated,
                    "refit_sec": median(seconds),
                    "answers": len(told),
                    "errors": sum(not reply.ok for _, reply in told),
                    "versions": sorted({reply.about.get("version") for _, reply in told if reply.ok}),
                    "compared_with_alone": len(near),
                    "mixed": mixed(server, home, near),
                    "gaps": {"before": len(before), "during": len(during)},
                    "p99_ms": {"before": 1e3 * p99(before), "during": 1e3 * p99(during)},
                    "p50_ms": {"before": 1e3 * median(before), "during": 1e3 * median(during)},
                    "p99_during_over_before": tail_ratio(during, before),
                }
            )
    return {"window_sec": args.window, "rows": rows}


def refit(server: Server, home: Home, verdicts: Sequence[Any]) -> bool:
    """Add verdicts, learn from all there are and wait for it; did the gate activate the version?"""
    with FeedbackLog(home) as log:
        log.append(NAME, verdicts)
    status, _ = server.ask("POST", f"/v1/profiles/{NAME}/learn", {})
    assert status == 202
    while (shown := server.ask("GET", f"/v1/profiles/{NAME}")[1])["learning"] != "idle":
        time.sleep(0.2)
    last = shown["last_refit"]
    if last["version"] is not None and not last["activated"]:
        ProfileStore(home).activate(NAME, last["version"])
    return bool(last["activated"])


def gaps(found: Sequence[tuple[Body, Reply]], *, start: float = 0.0, end: float) -> list[float]:
    """Seconds between neighbouring events of an answer, of those that ended between `start` and `end`."""
    return [
        later - earlier
        for _, reply in found
        for earlier, later in zip(reply.times, reply.times[1:], strict=False)
        if start < later <= end
    ]


def nearest(found: Sequence[tuple[Body, Reply]], moment: float) -> list[tuple[Body, Reply]]:
    """Up to NEAR whole answers: those that ran at that moment, then those that ended before or began after it."""

    def distance(one: tuple[Body, Reply]) -> float:
        return max(0.0, one[1].start - moment, moment - one[1].end)

    return sorted((one for one in found if one[1].ok), key=distance)[:NEAR]


def p99(values: Sequence[float]) -> float:
    return float(np.quantile(values, 0.99))


def tail_ratio(a: Sequence[float], b: Sequence[float], *, draws: int = 500) -> dict[str, float]:
    """p99 of a over p99 of b, with its 95 % bootstrap interval (gaps drawn again on both sides)."""
    rng, (x, y) = np.random.default_rng(0), (np.asarray(a), np.asarray(b))
    found = [p99(rng.choice(x, len(x))) / p99(rng.choice(y, len(y))) for _ in range(draws)]
    low, high = np.quantile(found, [0.025, 0.975])
    return {"ratio": p99(a) / p99(b), "ci_low": float(low), "ci_high": float(high)}


def mixed(server: Server, home: Home, told: Sequence[tuple[Body, Reply]]) -> int:
    """How many of these answers, whole ones, are not to the letter what the version they name answers alone."""
    store, different = ProfileStore(home), 0
    last = store.active_version(NAME)
    for version in sorted({reply.about["version"] for _, reply in told}):
        store.activate(NAME, version)
        for body, reply in told:
            if reply.about["version"] == version:
                alone = server.stream(body)
                different += alone.text != reply.text or alone.about["version"] != version
    if last is not None:
        store.activate(NAME, last)
    return different


# -- a person ----------------------------------------------------------------------------------------------------------
def person(bench: Bench) -> dict[str, Any]:
    """Simulated people who give nothing but thumbs, over HTTP alone; their win rates on unseen prompts as it learns."""
    rows = [one_person(bench, who) for who in chosen_users(bench.args.users)]
    return {
        "prompts": bench.args.prompts,
        "wrong_share": bench.args.wrong,
        "clear": bench.args.clear,
        "people": rows,
        "win_rate_min": min(row["win_rate"] for row in rows),
        "lowest_of_any_version": min(row["lowest"] for row in rows),
    }


def one_person(bench: Bench, who: User) -> dict[str, Any]:
    """Two answers to a question: a thumb up for the better one, down for the other, some of them the wrong way round.

    Who sees no difference gives no thumb, and who is asked to rate what is clear (--clear) passes over the answers that
    differ less than that share of those seen so far. The server refits as it does by itself.
    """
    args, rng = bench.args, random.Random(f"{bench.args.seed} {who.name}")
    cap = args.max_tokens if args.quick else max(args.max_tokens, who.max_tokens or 0)
    unseen = prompts("test")[: args.prompts]
    tests = [chat(question, tokens=cap, temperature=1.0, seed=i) for i, question in enumerate(unseen)]
    training = rng.sample(prompts("train"), len(prompts("train")))
    given, wrong, versions = 0, 0, []
    margins: list[float] = []
    with fresh_home(bench) as home, edge_align(bench, home, "--profile", NAME) as server:
        server.ready()

        def answers(**more: Any) -> list[str]:
            _, replies = load(server, [body | more for body in tests], args.clients)
            assert all(reply.ok for reply in replies)
            return [reply.text for reply in replies]

        base = answers(steering={"enabled": False})
        with progress(who.name, args.verdicts) as tell:
            for question in training:
                if given >= args.verdicts:
                    break
                asked = chat(question, tokens=cap, temperature=1.0, seed=given, n=2)
                status, told = server.ask("POST", "/v1/chat/completions", asked)
                assert status == 200
                texts = [choice["message"]["content"] for choice in told["choices"]]
                scores = [who.judge(text) if text.strip() else None for text in texts]
                if None in scores or scores[0] == scores[1]:
                    continue
                margins.append(abs(scores[0] - scores[1]))
                if margins[-1] < np.quantile(margins, args.clear):
                    continue
                for index in (0, 1):
                    up, slip = scores[index] == max(scores), rng.random() < args.wrong
                    verdict = {"id": told["id"], "index": index, "rating": "up" if up != slip else "down"}
                    status, taken = server.ask("POST", "/v1/feedback", verdict)
                    assert status == 200
                    given, wrong = given + 1, wrong + slip
                if taken["learning"] != "idle":
                    shown = learnt(server)
                    version = shown["active_version"]
                    known = versions[-1]["version"] if versions else None
                    if version != known:
                        won = wins(who.judge, answers(), base)
                        low, high = bootstrap_interval(won, rng=np.random.default_rng(0))
                        row = {"verdicts": given, "version": version, "win_rate": won.mean(), "win_ci": [low, high]}
                        versions.append(row)
                        console.print(who.name, row)
                tell(given)
        shown = server.ask("GET", f"/v1/profiles/{NAME}")[1]
    rates = [row["win_rate"] for row in versions] or [0.5]  # no version: every answer is the base's
    return {
        "user": who.name,
        "max_tokens": cap,
        "verdicts": given,
        "wrong": wrong,
        "asked": len(margins),
        "learnt": len(shown["history"]),
        "versions": versions,
        "win_rate": rates[-1],
        "lowest": min(rates),
    }


def learnt(server: Server) -> dict[str, Any]:
    """The profile, once nothing is being learnt."""
    while (shown := server.ask("GET", f"/v1/profiles/{NAME}")[1])["learning"] != "idle":
        time.sleep(0.2)
    return dict(shown)
