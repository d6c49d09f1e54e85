"""Sections of `report.py` on what things cost: latency, growth, the server."""

from __future__ import annotations

from collections.abc import Callable

from report_parts import percent, ratio, Result, Results, source, table

OTHER_RUNTIMES = {"genai": "onnxruntime-genai", "optimum": "optimum-onnx"}
"""Arm of onnx_latency.py -> package."""


def latency(results: Results) -> str:
    parts = [*map(_llama, results.by_processor("latency")), *map(_onnx, results.by_processor("onnx_latency"))]
    return "\n\n".join(parts)


def _llama(result: Result) -> str:
    rows = [
        ["steered over unsteered decoding", ratio(result["steered_over_base"], 4)],
        ["our loop over a bare `llama_decode` loop", ratio(result["ours_over_bare"], 4)],
        [
            "switching profile: setting it and what the next token then costs more",
            f"{result['switch']['total_ms']:.1f} ms",
        ],
        *(
            [
                f"the same among {row['profiles']} resident profiles, whose vectors take {row['bytes'] / 1e6:.1f} MB",
                f"{row['total_ms']:.1f} ms",
            ]
            for row in result.get("resident", ())
        ),
        ["memory of `generate`, 2,048 tokens of context", f"{result['memory']['peak_rss_mb']:.0f} MB"],
    ]
    if result.get("joules_per_token"):
        said = ", ".join(f"{name} {value:.2f} J" for name, value in result["joules_per_token"].items())
        rows.append(["energy per token, whole package", said])
    speed = result["tokens_per_sec"]
    said = f"llama.cpp, {result['runs']} interleaved runs of {result['tokens']} tokens, medians with 95 % intervals; "
    said += ", ".join(f"{name} {value:.0f}" for name, value in speed.items()) + " tokens per second."
    return "\n\n".join(
        [
            said,
            table(["", "median (95 % interval)"], rows),
            _by_length(result["ttft"]),
            *([f"ONNX Runtime:\n\n{_by_length(result['ttft_onnx'])}"] if "ttft_onnx" in result else []),
            *([instead(result["instead"])] if "instead" in result else []),
            source(result),
        ]
    )


def _by_length(rows: list[Result]) -> str:
    """Time to the first token, and per token after it where that was measured, by the length of the prompt."""
    head = ["prompt tokens", "first token, base", "personal", "ratio"]
    body = [[str(row["prompt_tokens"]), *_both(row["base_sec"], row["personal_sec"], row["ratio"])] for row in rows]
    later = [row.get("per_token") for row in rows]
    if all(later):
        head += ["each after it, base", "personal", "ratio"]
        for cells, row in zip(body, later, strict=True):
            cells += _both(row["base_sec"], row["personal_sec"], row["ratio"], digits=1)
    return table(head, body)


def _both(base: float, personal: float, over: Result, *, digits: int = 0) -> list[str]:
    return [f"{1000 * base:.{digits}f} ms", f"{1000 * personal:.{digits}f} ms", ratio(over)]


def _onnx(onnx: Result) -> str:
    rows = [
        ["ONNX Runtime over llama.cpp", ratio(onnx["onnx_over_llamacpp"])],
        ["steered over unsteered", ratio(onnx["steered_over_base"])],
        [
            f"{onnx['batch_rows']} rows with {onnx['batch_rows']} vectors over the same rows unsteered",
            ratio(onnx["batch_steered_over_base"]),
        ],
    ]
    others = set()
    for key, package in OTHER_RUNTIMES.items():
        found = onnx.get(f"onnx_over_{key}", {})
        named = f"{package} {onnx.get(f'{key}_version')}, "
        rows += [[f"ONNX Runtime over {name.replace(f'{key} ', named)}", ratio(one)] for name, one in found.items()]
        others |= found.keys()
    rows += [
        [
            f"KL from float32, {name}, nats a token; same likeliest token",
            f"{round(row['kl'], 4) + 0.0:.4f}; {percent(row['same_likeliest'])}",
        ]
        for name, row in onnx["against_fp32"].items()
    ]
    more = f"ONNX Runtime, {onnx['precision']}, {onnx['runs']} interleaved runs of {onnx['tokens']} tokens; "
    speeds = onnx["tokens_per_sec"].items()
    more += ", ".join(f"{name if name in others else name.replace('_', ' ')} {value:.0f}" for name, value in speeds)
    more += " tokens per second."
    return "\n\n".join([more, table(["", "median (95 % interval)"], rows), source(onnx)])


def serving(results: Results) -> str:
    """What `server_load.py` measured, of the parts that have a result."""
    parts = []
    for part, engine, rows_of in SERVER_PARTS:
        try:
            result = results.newest(
                "server_load",
                where=lambda r, p=part, e=engine: p in r and (not e or r[p].get("engine", "llamacpp") == e),
            )
        except LookupError:
            continue
        parts.append(f"{table(['', ''], rows_of(result[part]))}\n\n{source(result)}")
    return "\n\n".join(parts)


def _equality(found: Result) -> list[list[str]]:
    engine = {"onnx": "ONNX Runtime", "llamacpp": "llama.cpp"}[found.get("engine", "llamacpp")]
    who = f"{engine}, {found['clients']} clients over {found['profiles']} profiles"
    wait = found["ttft_sec"]["profiles"]
    return [
        [f"{who}: answers that differ from the same request alone", f"{found['different']} of {found['requests']}"],
        [f"{who}: tokens per second, profiles over the same load on the base", ratio(found["profiles_over_base"], 2)],
        [f"{who}: tokens per second", f"{found['tokens_per_sec']['profiles']:.0f}"],
        [
            f"{who}: time to first token, median, 95th percentile",
            f"{wait['p50']:.2f} s, {wait['p95']:.2f} s",
        ],
    ]


def _learning(found: Result) -> list[list[str]]:
    return [
        [
            f"gap between tokens during a refit over before, 99th percentile, {row['streams']} running",
            f"{row['p99_during_over_before']['ratio']:.2f}",
        ]
        for row in found["rows"]
    ]


def _start(found: Result) -> list[list[str]]:
    worst = found["first_answer_worst_sec"]
    return [
        [
            f"process start to first answer, {name}, {found['starts']} starts",
            f"{median:.2f} s, worst {worst[name]:.2f} s",
        ]
        for name, median in found["first_answer_sec"].items()
    ]


def _against(found: Result) -> list[list[str]]:
    rows = []
    for row in found["rows"]:
        who = f"{row['clients']} client{'s' if row['clients'] > 1 else ''}"
        rows.append(
            [f"tokens per second over llama-cpp-python's server, {who}", ratio(row["tokens_ours_over_theirs"], 2)]
        )
        rows.append([f"time to first token over its, {who}", ratio(row["ttft_ours_over_theirs"], 2)])
    return rows


def _arrivals(found: Result) -> list[list[str]]:
    names = {"ours": f"edge-align, {found['profiles']} profiles", "theirs": "llama-cpp-python's server, base"}
    return [
        [
            f"{row['per_sec']:g} requests a second come in, {row['requests']} in all; {names[name]}: first token, and "
            "whole answer, median, 95th and 99th percentile",
            ", ".join(f"{seconds:.2f}" for seconds in spread["ttft_sec"].values())
            + " s; "
            + ", ".join(f"{seconds:.2f}" for seconds in spread["answer_sec"].values())
            + " s",
        ]
        for row in found["rows"]
        for name, spread in row["servers"].items()
    ]


def _prefix(found: Result) -> list[list[str]]:
    name = (
        f"first token of a second profile on a system prompt of {found['prompt_tokens']:.0f} tokens, over the first's"
    )
    return [[name, ratio(found["second_over_cold"])]]


def _person(found: Result) -> list[list[str]]:
    rows = [
        [
            f"win rate after {row['verdicts']} thumbs over HTTP, {row['wrong']} wrong: {row['user'].replace('_', ' ')}",
            percent(row["win_rate"]),
        ]
        for row in found["people"]
    ]
    return [*rows, ["the lowest of any version of theirs", percent(found["lowest_of_any_version"])]]


def _soak(found: Result) -> list[list[str]]:
    verdicts, unwanted = found["verdicts"], sum(found["unwanted"].values())
    return [
        [
            "requests, some of which hang up or are wrong; refits beside",
            f"{found['requests']:,}; {found['refits']:.0f}",
        ],
        [
            "statuses nobody wanted; unfinished at the end",
            f"{unwanted}; {found['unfinished_at_the_end']}",
        ],
        ["growth of resident memory after warm-up", percent(found["resident_growth"], 1)],
        ["verdicts given; missing in the log", f"{verdicts['taken']}; {verdicts['missing']}"],
    ]


SERVER_PARTS: tuple[tuple[str, str, Callable[[Result], list[list[str]]]], ...] = (
    ("start", "", _start),
    ("against", "", _against),
    ("arrivals", "", _arrivals),
    ("prefix", "", _prefix),
    ("equality", "llamacpp", _equality),
    ("equality", "onnx", _equality),
    ("learning", "", _learning),
    ("person", "", _person),
    ("soak", "", _soak),
)


def instead(found: Result) -> str:
    """Arms of `latency_arms.py`."""
    rows = []
    for name, row in found["arms"].items():
        cells = [f"{1000 * row['first_token_sec']:.0f} ms", f"{row['tokens_per_sec']:.0f}"]
        rows.append([name, *cells, ratio(row["first_token_over_profile"], 2), ratio(row["speed_over_profile"], 3)])
    counts = ", ".join(f"{name} {n}" for name, n in found["prompt_tokens"].items())
    said = (
        f"What people would use instead, {found['runs']} interleaved answers of {found['tokens']} tokens, nothing "
        f"cached; prompt tokens: {counts}; an adapter's file {found['adapter_bytes'] / 1e6:.1f} MB."
    )
    heads = ["", "first token", "tokens per second", "first token / profile's", "speed / profile's"]
    return f"{said}\n\n{table(heads, rows)}"


def contention(results: Results) -> str:
    """Tokens per second beside other processes."""
    result = results.newest("contention")
    spins = sorted({row["spins"] for row in result["rows"]}, reverse=True)
    speeds = {(row["beside"], row["spins"]): row for row in result["rows"]}
    rows = []
    for beside in dict.fromkeys(row["beside"] for row in result["rows"]):
        found = [speeds[beside, n] for n in spins]
        rows.append(
            [
                beside,
                *(f"{one['tokens_per_sec']:.0f} ({min(one['all']):.0f} to {max(one['all']):.0f})" for one in found),
            ]
        )
    said = (
        "Tokens per second of llama.cpp, by how often a thread that waits for the others looks for them before it "
        f"sleeps ([0013](decisions/0013-waiting-threads.md)); edge-align's is {result['default_spins']}, GCC's own "
        "300,000. Of two engines, the mean."
    )
    heads = ["beside", *(f"{n:,} looks" for n in spins)]
    return f"{said}\n\n{table(heads, rows)}\n\n{source(result)}"


def scale(results: Results) -> str:
    result = results.newest("scale")
    parts = []
    for part in ("pairs", "rows", "profiles", "models"):
        found = result[part]
        costs = list(found["exponents"])
        sizes = [name for name in found["rows"][0] if name not in costs and name != "steered_over_base"]
        extra = ["steered_over_base"] if part == "models" else []
        rows = [
            [
                *(f"{row[name]:,}" for name in sizes),
                *(f"{1000 * row[name]:.3g}" for name in costs),
                *(ratio(row[name]) for name in extra),
            ]
            for row in found["rows"]
        ]
        rows.append(["n^b: b", *[""] * (len(sizes) - 1), *(f"{found['exponents'][name]:.2f}" for name in costs)])
        rows[-1] += [""] * len(extra)
        heads = [*sizes, *(name.replace("_sec", ", ms").replace("_", " ") for name in costs)]
        parts.append(table([name.replace("_", " ") for name in [*heads, *extra]], rows))
    return "\n\n".join([*parts, source(result)])
