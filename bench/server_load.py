"""`edge-align serve` under load: the same answers whatever else runs, speed, learning on the side, and endurance.

    python bench/server_load.py --part equality --threads 2 --save

Every part starts servers of its own in homes of their own, and speaks HTTP with them as any client does. What is
compared is interleaved in alternating order; ratios are of paired rounds, with a 95 % bootstrap interval.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np
from common import (
    Bench,
    console,
    fresh_home,
    main,
    parser,
    progress,
    random_latent,
    save_latent,
)
from serving import arriving, Body, chat, edge_align, llama_cpp_server, load, questions, Reply, Server
from serving_learning import learning, NAME, person
from serving_soak import soak

from edge_align.home import Home
from edge_align.simulation.prompts import prompts
from edge_align.speed import paired_ratio

SYSTEM_TOKENS = 1000


def run(bench: Bench) -> dict[str, Any]:
    args = bench.args
    if args.quick:
        args.requests, args.rounds, args.clients, args.tokens = 4, 1, 2, 4
        args.repeats, args.refits, args.window, args.streams, args.stream_tokens = 1, 1, 1.0, "1", 24
        args.rates, args.arrivals = "2", 4
        args.soak_requests, args.verdicts, args.prompts, args.max_tokens = 20, 8, 2, 8
    found = {}
    for part in PARTS if args.part == "all" else [args.part]:
        found[part] = PARTS[part](bench)
        console.print(part, found[part])
    return found


def spread(values: Sequence[float], *, to: Sequence[float] = (0.5, 0.95)) -> dict[str, float]:
    return {f"p{round(100 * q)}": float(np.quantile(values, q)) for q in to}


def tastes(bench: Bench, home: Home) -> list[str]:
    """Four profiles in a home, by name."""
    names = [f"taste-{i}" for i in range(4)]
    for i, name in enumerate(names):
        save_latent(bench, home, name, random_latent(bench, i))
    return names


# -- the same answers, with and without profiles ---------------------------------------------------------------------
def equality(bench: Bench) -> dict[str, Any]:
    """Answers of many clients over four profiles against each alone; throughput against the same load on the base."""
    args, asked = bench.args, questions()
    per_round = args.requests // args.rounds
    speeds: dict[str, list[float]] = {"profiles": [], "base": []}
    waits: dict[str, list[float]] = {"profiles": [], "base": []}
    told: list[tuple[Body, Reply]] = []
    errors = 0
    with fresh_home(bench) as home:
        names = tastes(bench, home)
        with edge_align(bench, home, "--no-profile", "--learn", "off") as server:
            server.ready()
            with progress("rounds", args.rounds) as tell:
                for i in range(args.rounds + 1):  # the first is a warm-up
                    steered = [
                        chat(next(asked), tokens=args.tokens, steering={"profile": names[j % len(names)]})
                        for j in range(per_round)
                    ]
                    arms = {"profiles": steered, "base": [body | {"steering": {"enabled": False}} for body in steered]}
                    for arm in list(arms)[:: 1 if i % 2 else -1]:
                        seconds, replies = load(server, arms[arm], args.clients)
                        if not i:
                            continue
                        errors += sum(not reply.ok for reply in replies)
                        speeds[arm].append(sum(reply.tokens for reply in replies) / seconds)
                        waits[arm] += [reply.ttft_sec for reply in replies]
                        if arm == "profiles":
                            told += zip(steered, replies, strict=True)
                    tell(i)
            different = 0
            with progress("alone", len(told)) as tell:
                for i, (body, reply) in enumerate(told):
                    alone = server.stream(body)
                    errors += not alone.ok
                    different += alone.text != reply.text or alone.about != reply.about
                    tell(i)
    return {
        "engine": bench.base.engine,
        "requests": len(told),
        "clients": args.clients,
        "profiles": len(names),
        "tokens": args.tokens,
        "errors": errors,
        "different": different,
        "tokens_per_sec": {arm: median(values) for arm, values in speeds.items()},
        "profiles_over_base": asdict(paired_ratio(speeds["profiles"], speeds["base"])),
        "ttft_sec": {arm: spread(values) for arm, values in waits.items()},
    }


# -- beside llama-cpp-python's server --------------------------------------------------------------------------------
def against(bench: Bench) -> dict[str, Any]:
    """Aggregate tokens per second and time to first token of both servers on the base, for one client and for four."""
    args, asked, rows = bench.args, questions(), []
    with (
        fresh_home(bench) as home,
        edge_align(bench, home, "--no-profile", "--learn", "off") as ours,
        llama_cpp_server(bench) as theirs,
    ):
        servers = {"ours": ours.ready(), "theirs": theirs.ready("/v1/models")}
        for clients in (1, 4):
            speeds: dict[str, list[float]] = {name: [] for name in servers}
            waits: dict[str, list[float]] = {name: [] for name in servers}
            errors = 0
            with progress(f"{clients} clients", args.rounds) as tell:
                for i in range(args.rounds + 1):  # the first is a warm-up
                    bodies = [chat(next(asked), tokens=args.tokens) for _ in range(2 * clients + 2)]
                    for name in list(servers)[:: 1 if i % 2 else -1]:
                        seconds, replies = load(servers[name], bodies, clients)
                        if not i:
                            continue
                        errors += sum(not reply.ok for reply in replies)
                        # theirs does not count tokens in a stream, so both are counted here, from the texts
                        tokens = sum(len(bench.backend.tokenize(reply.text)) for reply in replies)
                        speeds[name].append(tokens / seconds)
                        waits[name].append(median(reply.ttft_sec for reply in replies))
                    tell(i)
            rows.append(
                {
                    "clients": clients,
                    "requests": args.rounds * (2 * clients + 2),
                    "errors": errors,
                    "tokens_per_sec": {name: median(values) for name, values in speeds.items()},
                    "tokens_ours_over_theirs": asdict(paired_ratio(speeds["ours"], speeds["theirs"])),
                    "ttft_sec": {name: median(values) for name, values in waits.items()},
                    "ttft_ours_over_theirs": asdict(paired_ratio(waits["ours"], waits["theirs"])),
                }
            )
    return {"tokens": args.tokens, "rows": rows}


# -- requests that wait for nobody -----------------------------------------------------------------------------------
def arrivals(bench: Bench) -> dict[str, Any]:
    """Open loop: requests come in by chance, so many a second in the mean, ours over four profiles, theirs on the base.

    Both get the same questions at the same moments, --rounds times in alternating order.
    """
    args, asked, rows = bench.args, questions(), []
    with fresh_home(bench) as home:
        names = tastes(bench, home)
        with (
            edge_align(bench, home, "--no-profile", "--learn", "off") as ours,
            llama_cpp_server(bench) as theirs,
        ):
            servers = {"ours": ours.ready(), "theirs": theirs.ready("/v1/models")}
            for server in servers.values():
                load(server, [chat(next(asked), tokens=args.tokens)], 1)
            for rate in [float(rate) for rate in args.rates.split(",")]:
                rows.append(one_rate(bench, servers, rate, names, asked))
    return {"tokens": args.tokens, "profiles": len(names), "rows": rows}


def one_rate(
    bench: Bench, servers: dict[str, Server], rate: float, names: Sequence[str], asked: Iterator[str]
) -> dict[str, Any]:
    """Percentiles of both servers' times to the first token and to the end of an answer."""
    args, rng = bench.args, np.random.default_rng(bench.args.seed)
    replies: dict[str, list[Reply]] = {name: [] for name in servers}
    with progress(f"{rate:g} a second", args.rounds) as tell:
        for i in range(args.rounds):
            moments = np.cumsum(rng.exponential(1.0 / rate, args.arrivals // args.rounds)).tolist()
            bodies = [chat(next(asked), tokens=args.tokens) for _ in moments]
            steered = [body | {"steering": {"profile": names[j % len(names)]}} for j, body in enumerate(bodies)]
            for name in list(servers)[:: -1 if i % 2 else 1]:
                replies[name] += arriving(servers[name], steered if name == "ours" else bodies, moments)
            tell(i + 1)
    percentiles = (0.5, 0.95, 0.99)
    return {
        "per_sec": rate,
        "requests": len(replies["ours"]),
        "errors": sum(not reply.ok for told in replies.values() for reply in told),
        "servers": {
            name: {
                "ttft_sec": spread([reply.ttft_sec for reply in told], to=percentiles),
                "answer_sec": spread([reply.end - reply.start for reply in told], to=percentiles),
            }
            for name, told in replies.items()
        },
    }


# -- a shared system prompt --------------------------------------------------------------------------------------------
def prefix(bench: Bench) -> dict[str, Any]:
    """Time to first token of a profile whose long system prompt another profile's answer has had before."""
    args, asked = bench.args, questions()
    seconds: dict[str, list[float]] = {"cold": [], "second": []}
    cached, sizes = [], []
    with fresh_home(bench) as home:
        for i, name in enumerate(("first", "second")):
            save_latent(bench, home, name, random_latent(bench, i))
        with (
            edge_align(bench, home, "--no-profile", "--learn", "off") as server,
            progress("pairs", args.repeats) as tell,
        ):
            server.ready()
            for i in range(args.repeats + 1):  # the first is a warm-up
                system = system_prompt(bench, i)
                for name, arm in (("first", "cold"), ("second", "second")):
                    body = chat(next(asked), tokens=2, system=system, steering={"profile": name})
                    reply = server.stream(body)
                    assert reply.ok and reply.about["profile"] == name
                    if i:
                        seconds[arm].append(reply.ttft_sec)
                        sizes.append(reply.usage["prompt_tokens"])
                if i:
                    cached.append(reply.usage["prompt_tokens_details"]["cached_tokens"])
                tell(i)
    return {
        "repeats": args.repeats,
        "prompt_tokens": median(sizes),
        "cached_tokens": median(cached),
        "ttft_sec": {arm: median(values) for arm, values in seconds.items()},
        "second_over_cold": asdict(paired_ratio(seconds["second"], seconds["cold"])),
    }


def system_prompt(bench: Bench, seed: int) -> str:
    """At least SYSTEM_TOKENS tokens, which differ from those of another seed from the first sentence on."""
    lines = random.Random(seed).sample(prompts("train"), len(prompts("train")))
    text = f"These are notes number {seed}."
    for line in lines:
        text += " " + line
        if len(bench.backend.tokenize(text)) >= SYSTEM_TOKENS:
            break
    return text


# -- from the start of the process -------------------------------------------------------------------------------------
def start(bench: Bench) -> dict[str, Any]:
    """Seconds from the start of the process to the first token, and to the whole of a first answer of 16 tokens."""
    args = bench.args
    seconds: dict[str, list[tuple[float, float]]] = {"base": [], "profile": []}
    with fresh_home(bench) as home:
        save_latent(bench, home, NAME, random_latent(bench, 0))
        options = {"base": ["--no-profile"], "profile": ["--profile", NAME]}
        with progress("starts", args.repeats) as tell:
            for i in range(args.repeats + 1):  # the first fills the caches
                for arm in seconds:
                    begin = time.perf_counter()
                    with edge_align(bench, home, *options[arm]) as server:
                        while not (reply := server.stream(chat("How do boats float?", tokens=16))).ok:
                            assert server.alive and reply.status in (0, 503)
                            time.sleep(0.02)
                    assert (reply.about["profile"] is None) == (arm == "base")
                    if i:
                        seconds[arm].append((reply.start + reply.ttft_sec - begin, reply.end - begin))
                tell(i)
    return {
        "starts": args.repeats,
        "first_token_sec": {arm: median(first for first, _ in rows) for arm, rows in seconds.items()},
        "first_answer_sec": {arm: median(whole for _, whole in rows) for arm, rows in seconds.items()},
        "first_answer_worst_sec": {arm: max(whole for _, whole in rows) for arm, rows in seconds.items()},
    }


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    part.__name__: part for part in (equality, against, arrivals, prefix, learning, start, soak, person)
}

if __name__ == "__main__":
    p = parser("The server under load: equal answers, speed, prompt cache, learning on the side, start, endurance.")
    p.add_argument("--part", default="all", choices=[*PARTS, "all"])
    p.add_argument("--clients", type=int, default=8, help="at once, in equality, soak and person")
    p.add_argument("--requests", type=int, default=200, help="of equality")
    p.add_argument("--rounds", type=int, default=10, help="interleaved, of equality, against and arrivals")
    p.add_argument("--tokens", type=int, default=48, help="decoded per answer in equality and against")
    p.add_argument("--rates", default="0.5,1", help="of arrivals: requests a second, in the mean")
    p.add_argument("--arrivals", type=int, default=60, help="requests at each of these rates")
    p.add_argument("--repeats", type=int, default=10, help="of prefix and start")
    p.add_argument("--streams", default="1,4", help="running answers in learning")
    p.add_argument("--stream-tokens", type=int, default=96, help="decoded per answer in learning")
    p.add_argument("--refits", type=int, default=2, help="per number of streams")
    p.add_argument("--window", type=float, default=10.0, help="seconds before and after a refit")
    p.add_argument("--soak-requests", type=int, default=10_000)
    p.add_argument("--users", metavar="A,B", default="positive,simple_words,addresses_reader", help="of person")
    p.add_argument("--verdicts", type=int, default=60, help="thumbs of a person")
    p.add_argument("--wrong", type=float, default=0.1, help="share of thumbs given the wrong way round")
    p.add_argument("--clear", type=float, default=0.7, help="of person: rates what differs more than this share does")
    p.add_argument("--prompts", type=int, default=40, help="unseen, on which a person's versions are judged")
    p.add_argument("--max-tokens", type=int, default=96, help="decoded per answer in person")
    main(run, p.parse_args(), __file__)
