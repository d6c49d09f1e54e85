"""Render docs/benchmarks.md, its plots and the README's table from bench/results.

    python bench/report.py             # write what differs; --check: write nothing, exit code 1 if something differs

Every figure of a row comes from one result: the newest that holds it. A number is typed nowhere else.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext, suppress

from report_cost import contention, latency, scale, serving
from report_parts import earlier, mean, NoResult, OURS, percent, Result, Results, ROOT, source, table
from report_trained import AT_KL, LORA, lora, PTUNING, ptuning, training_time, tried_of

PAGE = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs" / "plots"
README = ROOT / "README.md"
BEGIN, END = "<!-- begin: bench/report.py -->", "<!-- end: bench/report.py -->"

SIZES = (100, 20)  # pairs
FLIP = 0.25  # share of wrong verdicts
PROMPTED = ("written preference", "three pairs in the prompt")  # arms that no pack has a part in


def gate_of(results: Results, pairs: int) -> tuple[Result, Result]:
    """The newest gate result at this number of pairs, and its table of rows as {kind: [rows]}."""
    size = f"pairs_{pairs}"
    result = results.newest("nulls", where=lambda r: size in r.get("gate", {}).get("true", {}))
    rows = [row for row in result["gate"]["rows"] if row["pairs"] == pairs]
    return result, {kind: [row for row in rows if row["kind"] == kind] for kind in ("true", "shuffled")}


# -- sections ------------------------------------------------------------------------------------------------------
def quality_of(
    results: Results, pairs: int, *, flip: float = 0.0, fresh: bool = False, before: Result | None = None
) -> tuple[Result, list[Result]]:
    """The newest quality result at this number of pairs and share of wrong verdicts, and its rows.

    fresh: on prompts that earlier runs have not seen. before: a result it is to be compared with; one
    of the same pack that was measured before it is of the same code, or nearly.
    """

    def asked(result: Result) -> bool:
        options = result["options"]
        return (
            options.get("flip", 0.0) == flip
            and options.get("set", "test") == "test"
            and bool(options.get("skip")) == fresh
            and (before is None or (result["pack_hash"] == before["pack_hash"] and result["date"] < before["date"]))
            and any(row["pairs"] == pairs for row in result["users"])
        )

    result = results.newest("quality", where=asked)
    return result, [row for row in result["users"] if row["pairs"] == pairs]


def quality(results: Results) -> str:
    parts = [
        "A tie counts half; the interval is the 95 % bootstrap interval over prompts. NLL and distinct-2 are relative "
    ]
    parts[0] += "to the base's own answers."
    for size in SIZES:
        result, rows = quality_of(results, size)
        body = [
            [
                row["user"].replace("_", " "),
                f"{percent(row['win_rate'])} ({percent(row['win_ci'][0])} to {percent(row['win_ci'][1])})",
                "" if row.get("second_win_rate") is None else percent(row["second_win_rate"]),
                f"{row['nll_ratio']:.2f} x",
                f"{row['distinct2_ratio']:.2f} x",
                f"{row['mean_tokens']:.0f} ({row['mean_tokens_base']:.0f})",
                f"{row['p']:.3f}",
                ", ".join("-" if kl["factor"] is None else f"{kl['factor']:.2f}" for kl in row["kl"]),
            ]
            for row in rows
        ]
        means = [mean(row[name] for row in rows) for name in ("win_rate", "nll_ratio", "distinct2_ratio")]
        body.append(
            ["**mean**", percent(means[0], 1), "", f"{means[1]:.2f} x", f"{means[2]:.2f} x", "", "", ""],
        )
        head = ["user", "win rate", "by a second judge", "NLL", "distinct-2", "tokens (base)", "gate p"]
        head.append("predicted / measured KL at strength " + ", ".join(str(kl["strength"]) for kl in rows[0]["kl"]))
        parts.append(f"**{size} pairs, {result['prompts']} unseen prompts**\n\n{table(head, body)}\n\n{source(result)}")
    return "\n\n".join([*parts, fresh_prompts(results)])


def fresh_prompts(results: Results) -> str:
    """The figures on prompts that no earlier run had seen, in a sentence for each number of pairs."""
    said = []
    for size in SIZES:
        try:
            result, rows = quality_of(results, size, fresh=True)
        except LookupError:
            continue
        rates = [row["win_rate"] for row in rows]
        said.append(
            f"On {result['prompts']} more prompts, which no run before had seen, with {size} pairs and a KL budget of "
            f"{result['options']['kl_budget']:g}{earlier(result)}: "
            f"win rate {percent(mean(rates), 1)} (lowest {percent(min(rates))}), NLL "
            f"{mean(row['nll_ratio'] for row in rows):.2f} x, distinct-2 "
            f"{mean(row['distinct2_ratio'] for row in rows):.2f} x.\n\n{source(result)}"
        )
    return "\n\n".join(said)


def flipped(results: Results) -> str:
    """What is left of the gain over one half when verdicts are wrong."""
    size = SIZES[0]
    result, rows = quality_of(results, size, flip=FLIP)
    clean = {row["user"]: row for row in quality_of(results, size, before=result)[1]}
    pairs = [(clean[row["user"]], row) for row in rows]
    left = mean(row["win_rate"] - 0.5 for _, row in pairs) / mean(one["win_rate"] - 0.5 for one, _ in pairs)
    body = [
        [
            row["user"].replace("_", " "),
            percent(one["win_rate"]),
            percent(row["win_rate"]),
            f"{row['p']:.3f}",
            f"{row['nll_ratio']:.2f} x",
        ]
        for one, row in pairs
    ]
    said = (
        f"{size} pairs, {percent(FLIP)} of them the wrong way round. Of the gain over one half {percent(left)} is left."
    )
    text = table(["user", "win rate, all verdicts right", "with wrong ones", "gate p", "NLL"], body)
    return f"{said}\n\n{text}\n\n{source(result)}"


def alternatives(results: Results) -> str:
    return "\n\n".join(_alternatives(*arms_of(results, pairs)) for pairs in SIZES)


def arms_of(results: Results, pairs: int) -> tuple[list[Result], dict[str, list[Result]]]:
    """The newest result of `arms.py` at this number of pairs, and its rows per arm in the order they were run.

    Where it left out the arms that write into the prompt, those that have nothing to do with a pack come from an older
    result, the second one; ours was another then, so what is said of it beside them is dropped.
    """
    used = [results.newest("arms", where=lambda r: r["pairs"] == pairs)]
    found: dict[str, list[Result]] = {}
    if used[0]["options"].get("vectors_only"):
        with suppress(LookupError):
            used.append(
                results.newest("arms", where=lambda r: r["pairs"] == pairs and not r["options"].get("vectors_only"))
            )
            for row in used[1]["rows"]:
                if row["arm"] in PROMPTED:
                    found.setdefault(row["arm"], []).append(row | {"ours_over_it": None})
    for row in used[0]["rows"]:
        found.setdefault(row["arm"], []).append(row)
    return used, found


def _alternatives(used: list[Result], found: dict[str, list[Result]]) -> str:
    result = used[0]
    users = list(dict.fromkeys(row["user"] for row in result["rows"]))
    body = []
    for name, rows in found.items():
        won = {row["user"]: row["win_rate"] for row in rows}
        body.append(
            [
                name,
                *(percent(won[who]) for who in users),
                percent(mean(won.values()), 1),
                ""
                if name == OURS or rows[0]["ours_over_it"] is None
                else percent(mean(row["ours_over_it"] for row in rows), 1),
                f"{mean(row['nll_ratio'] for row in rows):.2f} x",
                f"{mean(row['distinct2_ratio'] for row in rows):.2f} x",
                f"{mean(row['prompt_tokens'] for row in rows):+.0f}",
                f"{mean(row['seconds'] for row in rows):.1f} s",
            ]
        )
    head = ["", *(who.replace("_", " ") for who in users), "mean", "ours against it", "NLL", "distinct-2"]
    first, last = result["options"].get("blocks", "8,21").split(",")
    said = (
        f"**{result['pairs']} pairs, {result['prompts']} unseen prompts.** Win rates against the base. The "
        "written preference is the sentence that defines the user, which nobody tells the other arms. The "
        f"other vectors steer the blocks {first} to {last}, at the KL that ours measures."
    )
    sources = "\n\n".join(map(source, used))
    return f"{said}\n\n{table([*head, 'tokens added to a prompt', 'to learn'], body)}\n\n{sources}"


def directions(results: Results) -> str:
    result = results.newest("nulls", where=lambda r: "directions" in r)
    found = result["directions"]
    rows = [
        [
            row["user"].replace("_", " "),
            percent(row["profile"]),
            percent(row["null_mean"]),
            percent(row["null_p95"]),
            "yes" if row["beats_p95"] else "**no**",
        ]
        for row in found["users"]
    ]
    text = table(["user", "profile", "random directions, mean", "their 95th percentile", "profile above it"], rows)
    said = "Random latents at the profile's predicted KL, same prompts and seeds. Pooled mean "
    said += f"{percent(found['pooled_mean'])}."
    return f"{said}\n\n{text}\n\n{source(result)}"


def gate(results: Results) -> str:
    parts = []
    for pairs in SIZES:
        result, rows = gate_of(results, pairs)
        shuffled = {row["user"]: row for row in rows["shuffled"]}
        body = [
            [
                row["user"].replace("_", " "),
                f"{row['passed']} of {row['draws']}",
                f"{shuffled[row['user']]['passed']} of {shuffled[row['user']]['draws']}"
                if row["user"] in shuffled
                else "",
            ]
            for row in rows["true"]
        ]
        sums = [
            f"{sum(row['passed'] for row in rows[kind])} of {sum(row['draws'] for row in rows[kind])}"
            for kind in ("true", "shuffled")
        ]
        text = table([f"{pairs} pairs", "true verdicts pass", "shuffled verdicts pass"], [*body, ["**all**", *sums]])
        parts.append(f"{text}\n\n{source(result)}")
    return "\n\n".join(parts)


def learnt_in(results: Results) -> list[Result]:
    """The newest result on a processor that multiplies bfloat16, and on one that does not."""
    found = []
    for bf16 in (True, False):
        with suppress(NoResult):
            found.append(results.newest("personalize_time", where=lambda r, b=bf16: r["machine"]["bf16"] == b))
    return found


def own_dtype(result: Result) -> Result:
    """The seconds of the dtype that `personalize` takes there."""
    return dict(result["warm_sec"]["bf16" if result["machine"]["bf16"] else "fp32"])


def learning(results: Results) -> str:
    parts = []
    for result in learnt_in(results):
        rows = [
            [
                dtype,
                *(f"{found[stage]:.2f} s" for stage in ("encode", "fit", "sum", "floor")),
                f"{found['sum_over_floor']:.2f} x",
                f"{found['check']:.2f} s",
            ]
            for dtype, found in result["warm_sec"].items()
            if result["machine"]["bf16"] or dtype == "fp32"
        ]
        head = ["dtype", "encode", "fit", "encode + fit + calibrate", "matrix products alone", "over them"]
        said = (
            f"{result['pairs']} pairs, {result['answers']} answers of {result['mean_tokens']:.0f} tokens; the whole "
            f"command from a cold start {result['cold_sec']:.1f} s. A profile takes "
            f"{result['profile_bytes']['constant']} bytes, {result['profile_bytes']['head']} with the prompt-dependent "
            "head."
        )
        parts.append(f"{said}\n\n{table([*head, 'fluency check'], rows)}\n\n{source(result)}")
    return "\n\n".join([*parts, training_time(results)])


SECTIONS = (
    ("Do people prefer the personal answers?", quality),
    ("When verdicts are wrong", flipped),
    ("Beside what people would use instead", alternatives),
    ("Beside a LoRA for every person", lora),
    ("Beside virtual tokens for every person", ptuning),
    ("What chance does", directions),
    ("The gate", gate),
    ("Time to learn a person", learning),
    ("Latency", latency),
    ("Beside other programs", contention),
    ("How cost grows", scale),
    ("The server", serving),
)

UNMEASURED = (lora, ptuning)
"""Sections that are left out while they have no result; any other one must have its own."""


def page(results: Results) -> str:
    head = (
        "# Benchmarks\n\nMade by `bench/report.py` from [bench/results](../bench/results/); what each script measures, "
        "and how, is in [bench/README.md](../bench/README.md). Users are simulated: a judge program stands for a taste."
    )
    parts = []
    for title, section in SECTIONS:
        with suppress(NoResult) if section in UNMEASURED else nullcontext():
            parts.append(f"## {title}\n\n{section(results)}")
    plots = "![Win rates of eight users, with random directions beside](plots/quality.svg)\n\n"
    plots += "![Win rate over NLL of every way that was measured](plots/arms.svg)"
    return "\n\n".join([head, plots, *parts]) + "\n"


def readme_table(results: Results) -> str:
    found, _ = quality_of(results, 100)
    time, lora = (results.newest(name) for name in ("personalize_time", "training_time"))
    speed, onnx = results.newest("latency"), results.newest("onnx_latency")
    drawn = results.newest("nulls", where=lambda r: "directions" in r)
    (other, *_), others = arms_of(results, SIZES[0])
    cost = lora["trained"][LORA]
    times = [
        f"{own_dtype(one)['sum']:.1f} s; {own_dtype(one)['check']:.1f} s "
        f"({'with' if one['machine']['bf16'] else 'without'} bfloat16)"
        for one in learnt_in(results)
    ]

    def won(size: int) -> str:
        result, rows = quality_of(results, size)
        rates = [row["win_rate"] for row in rows]
        return f"{percent(mean(rates))} ({percent(min(rates))}){earlier(result) if result is not found else ''}"

    def passed(pairs: int, kind: str) -> str:
        rows = gate_of(results, pairs)[1][kind]
        return percent(sum(row["passed"] for row in rows) / sum(row["draws"] for row in rows), 1)

    tokens = onnx["tokens_per_sec"]
    arms = [speed["instead"]["arms"][name] for name in ("LoRA adapter, rank 8", PROMPTED[1])]
    slower = [(arm["speed_over_profile"]["median"], arm["first_token_over_profile"]["median"]) for arm in arms]
    users = len({row["user"] for row in found["users"]})
    return table(
        ["", ""],
        [
            [
                f"learning from {time['pairs']} pairs: encode, fit, calibrate; then the check of fluency",
                " or ".join(times),
            ],
            [
                f"ours, check included, over LoRA-DPO on the same {lora['pairs']} pairs (r{cost['rank']}, "
                f"{cost['epochs']} epochs)",
                f"{percent(lora['ours_over_it'][LORA], 1)} of {cost['seconds']:.0f} s"
                + (" (extrapolated)" if cost["extrapolated"] else "")
                + f" ({cost['dtype']})",
            ],
            *beside_lora(results),
            [
                f"{found['prompts']} unseen prompts: the judge prefers the personal answer, 100 pairs, mean (lowest) "
                f"of {users} users{earlier(found)}",
                won(100),
            ],
            ["the same with 20 pairs", won(20)],
            [
                f"other ways, {other['pairs']} pairs, the same users{earlier(other)}: "
                + ", ".join(name for name in others if not name.startswith(OURS)),
                ", ".join(
                    percent(mean(row["win_rate"] for row in rows))
                    for name, rows in others.items()
                    if not name.startswith(OURS)
                ),
            ],
            [
                f"random directions at the same KL, mean over users{earlier(drawn)}",
                percent(drawn["directions"]["pooled_mean"]),
            ],
            ["true verdicts that pass the gate, 20 and 100 pairs", f"{passed(20, 'true')}, {passed(100, 'true')}"],
            ["shuffled ones", f"{passed(20, 'shuffled')}, {passed(100, 'shuffled')}"],
            ["speed of decoding, steered over unsteered", f"{speed['steered_over_base']['median']:.2f}"],
            [
                "speed and first token over a profile's: LoRA adapter in llama.cpp; three pairs in the prompt",
                "; ".join(f"{fast:.2f}, {first:.1f} x" for fast, first in slower),
            ],
            [
                f"tokens per second: llama.cpp, ONNX Runtime {onnx['precision']}, {onnx['batch_rows']} differently "
                "steered rows of it",
                ", ".join(f"{tokens[name]:.0f}" for name in ("llamacpp", "onnx", "onnx_batch_steered")),
            ],
            ["switching profile", f"{speed['switch']['total_ms']:.1f} ms"],
            ["size of a profile", f"{time['profile_bytes']['constant'] / 1024:.1f} KiB"],
            ["memory of `generate`", f"{speed['memory']['peak_rss_mb']:.0f} MB"],
        ],
    )


def beside_lora(results: Results) -> list[list[str]]:
    """The README's row on a LoRA's answers, once there is a result."""
    try:
        result = tried_of(results, LORA)
    except NoResult:
        return []
    pairs = max(row["pairs"] for row in result["rows"])
    found = result["summary"][f"pairs_{pairs}"]
    arms = [found[arm] for arm in (LORA, AT_KL, OURS) if arm in found]
    said = ", ".join(f"{percent(row['win_rate'])} at {row['nll_ratio']:.2f} x" for row in arms)
    names = "a tuned LoRA-DPO, the same at our KL, and ours" if len(arms) == 3 else "a tuned LoRA-DPO and ours"
    return [[f"{names}{earlier(result)} from {pairs} pairs: win rate, NLL times the base's", said]]


def with_table(readme: str, rows: str) -> str:
    """The README with its table between the markers replaced. Raises LookupError without the markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise LookupError(f"{README.name} has no place for the table: {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{rows}\n{END}{after}"


def draw(results: Results) -> None:
    """docs/plots/quality.svg: win rates with intervals, and the random directions' range behind them."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "edge-align", "font.size": 9}
    from matplotlib import pyplot as plt

    rows = [row for size in SIZES for row in quality_of(results, size)[1]]
    nulls = {
        row["user"]: row for row in results.newest("nulls", where=lambda r: "directions" in r)["directions"]["users"]
    }
    users = list(dict.fromkeys(row["user"] for row in rows))
    sizes = sorted({row["pairs"] for row in rows})
    figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    for at, who in enumerate(users):
        if who in nulls:
            axes.fill_between(
                [at - 0.38, at + 0.38], min(nulls[who]["null"]), nulls[who]["null_p95"], color="0.88", lw=0
            )
    for i, size in enumerate(sizes):
        own = {row["user"]: row for row in rows if row["pairs"] == size}
        x = [at + 0.18 * (2 * i - len(sizes) + 1) for at in range(len(users))]
        y = [own[who]["win_rate"] for who in users]
        error = [
            [own[who]["win_rate"] - own[who]["win_ci"][0] for who in users],
            [own[who]["win_ci"][1] - own[who]["win_rate"] for who in users],
        ]
        axes.errorbar(
            x,
            y,
            error,
            fmt="os"[i % 2],
            ms=5,
            capsize=2,
            color=("tab:orange", "tab:blue")[i % 2],
            label=f"{size} pairs",
        )
    axes.axhline(0.5, color="0.4", lw=0.8, ls=":")
    axes.set(ylim=(0, 1), ylabel="win rate against the base", xticks=range(len(users)))
    axes.set_xticklabels([who.replace("_", "\n") for who in users])
    axes.legend(loc="lower right", frameon=False, title="grey: random directions, to the 95th percentile")
    PLOTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOTS / "quality.svg", metadata={"Date": None})
    plt.close(figure)


def draw_arms(results: Results) -> None:
    """docs/plots/arms.svg: of every way that was measured, win rate over NLL, each person and the mean."""
    from matplotlib import pyplot as plt

    _, found = arms_of(results, SIZES[0])
    arms = {name: rows for name, rows in found.items() if name != OURS}
    for method, names in ((LORA, (LORA, AT_KL)), (PTUNING, (PTUNING,))):
        with suppress(NoResult):
            tried = [row for row in tried_of(results, method)["rows"] if row["pairs"] == SIZES[0]]
            arms |= {name: [row for row in tried if row["arm"] == name] for name in names}
    arms = {name: rows for name, rows in arms.items() if rows}
    arms[OURS] = quality_of(results, SIZES[0])[1]
    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    for i, (name, rows) in enumerate(arms.items()):
        color = "tab:blue" if name == OURS else f"C{i + 1}"
        x, y = ([row[key] for row in rows] for key in ("nll_ratio", "win_rate"))
        axes.scatter(x, y, s=9, color=color, alpha=0.4, lw=0)
        axes.scatter([mean(x)], [mean(y)], s=60, color=color, label=name, zorder=3)
    axes.axhline(0.5, color="0.4", lw=0.8, ls=":")
    axes.axvline(1.0, color="0.4", lw=0.8, ls=":")
    axes.set(ylim=(0, 1.02), xlabel="NLL under the base, times the base's own", ylabel="win rate against the base")
    axes.legend(loc="lower right", frameon=False, fontsize=8, title=f"{SIZES[0]} pairs; small: each person")
    figure.savefig(PLOTS / "arms.svg", metadata={"Date": None})
    plt.close(figure)


def run(*, check: bool) -> int:
    """Write, or with `check` only compare; the number of files that differ."""
    results = Results()
    wanted = {PAGE: page(results), README: with_table(README.read_text(), readme_table(results))}
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        print(f"{'differs' if check else 'written'}: {path.relative_to(ROOT)}", file=sys.stderr)
        if not check:
            path.write_text(wanted[path])
    if not check:
        draw(results)
        draw_arms(results)
    return len(stale)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Render the benchmark page and the README's table from bench/results.")
    p.add_argument("--check", action="store_true", help="write nothing; exit code 1 when something differs")
    stale = run(check=p.parse_args().check)
    sys.exit(1 if stale and p.parse_args().check else 0)
