"""Render docs/benchmarks.md, its plots and the README's table from bench/results.

    python bench/report.py             # write what differs; --check: write nothing, exit code 1 if something differs

Every figure of a row comes from one result: the newest that holds it. A number is typed nowhere else.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext, suppress

from beside import at_our_kl, OURS
from report_arms import alternatives, arms_of, PROMPTED
from report_cost import contention, latency, scale, serving
from report_packs import packs
from report_parity import parity
from report_parts import earlier, mean, NoResult, percent, Result, Results, ROOT, source, table, with_bf16
from report_plots import draw_all
from report_quality import combined, curves, flipped, other_base, quality, quality_of, SIZES
from report_trained import bipo, LORA, lora, ptuning, timed_whole, training_time, tried_of

PAGE = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs" / "plots"
README = ROOT / "README.md"
BEGIN, END = "<!-- begin: bench/report.py -->", "<!-- end: bench/report.py -->"


def gate_of(results: Results, pairs: int) -> tuple[Result, Result]:
    """The newest gate result at this number of pairs, no verdict wrong, and its rows as {kind: [rows]}."""
    size = f"pairs_{pairs}"
    result = results.newest(
        "nulls", where=lambda r: size in r.get("gate", {}).get("true", {}) and not r["options"].get("flip")
    )
    rows = [row for row in result["gate"]["rows"] if row["pairs"] == pairs]
    return result, {kind: [row for row in rows if row["kind"] == kind] for kind in ("true", "shuffled")}


# -- sections ------------------------------------------------------------------------------------------------------
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


def own_dtype(result: Result) -> Result:
    """The seconds of the dtype that `personalize` takes there."""
    return dict(result["warm_sec"]["bf16" if result["machine"]["bf16"] else "fp32"])


def learning(results: Results) -> str:
    parts = []
    for result in results.by_processor("personalize_time"):
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
    ("With more pairs, and fewer", curves),
    ("Tastes of three parts", combined),
    ("When verdicts are wrong", flipped),
    ("Another base", other_base),
    ("Packs by recipe", packs),
    ("Beside what people would use instead", alternatives),
    ("Beside a LoRA for every person", lora),
    ("Beside virtual tokens for every person", ptuning),
    ("Beside vectors trained through the base", bipo),
    ("What chance does", directions),
    ("The gate", gate),
    ("Do engines agree?", parity),
    ("Time to learn a person", learning),
    ("Latency", latency),
    ("Beside other programs", contention),
    ("How cost grows", scale),
    ("The server", serving),
)

UNMEASURED = (bipo, combined, curves, lora, other_base, packs, ptuning)
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
    time, lora = results.newest("personalize_time"), timed_whole(results)
    speed = results.by_processor("latency")[0]
    drawn = results.newest("nulls", where=lambda r: "directions" in r)
    (other, *_), others = arms_of(results, SIZES[0])
    cost = lora["trained"][LORA]
    times = [
        f"{own_dtype(one)['sum']:.1f} s; {own_dtype(one)['check']:.1f} s ({with_bf16(one)})"
        for one in results.by_processor("personalize_time")
    ]

    def won(size: int) -> str:
        result, rows = quality_of(results, size)
        rates = [row["win_rate"] for row in rows]
        return f"{percent(mean(rates))} ({percent(min(rates))}){earlier(result) if result is not found else ''}"

    def passed(pairs: int, kind: str) -> str:
        rows = gate_of(results, pairs)[1][kind]
        return percent(sum(row["passed"] for row in rows) / sum(row["draws"] for row in rows), 1)

    decoded = [
        ", ".join(f"{one['tokens_per_sec'][name]:.0f}" for name in ("llamacpp", "onnx", "onnx_batch_steered"))
        + f" ({with_bf16(one)})"
        for one in results.by_processor(
            "onnx_latency", where=lambda r: (r["precision"], r["batch_rows"]) == ("int4", 8)
        )
    ]
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
                f"{percent(lora['ours_over_it'][LORA], 1)} of {cost['seconds']:.0f} s ({cost['dtype']})",
            ],
            *one_user(lora),
            *beside_lora(results),
            [
                f"{found['prompts']} unseen prompts: the judge prefers the personal answer, 100 pairs, mean (lowest) "
                f"of {users} users{earlier(found)}",
                won(100),
            ],
            ["the same with 20 pairs", won(20)],
            [
                f"other ways, {other['pairs']} pairs, the same users, {other['prompts']} prompts{earlier(other)}: "
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
                "tokens per second: llama.cpp, ONNX Runtime int4, 8 differently steered rows of it",
                "; ".join(decoded),
            ],
            ["switching profile", f"{speed['switch']['total_ms']:.1f} ms"],
            ["size of a profile", f"{time['profile_bytes']['constant'] / 1024:.1f} KiB"],
            ["memory of `generate`", f"{speed['memory']['peak_rss_mb']:.0f} MB"],
        ],
    )


def one_user(result: Result) -> list[list[str]]:
    """The README's row on what was written after the trainings that were timed."""
    answers = result["answers"]
    cells = [
        f"{percent(found['win_rate'])} ({percent(found['win_ci'][0])} to {percent(found['win_ci'][1])}) at "
        f"{found['nll_ratio']:.2f} x"
        for found in (answers[OURS], answers[LORA])
    ]
    return [[f"of that user ({result['user']}), ours and the LoRA: win rate, NLL times the base's", "; ".join(cells)]]


def beside_lora(results: Results) -> list[list[str]]:
    """The README's row on a LoRA's answers, once there is a result."""
    try:
        result = tried_of(results, LORA)
    except NoResult:
        return []
    pairs = max(row["pairs"] for row in result["rows"])
    found = result["summary"][f"pairs_{pairs}"]
    arms = [found[arm] for arm in (LORA, at_our_kl(LORA), OURS) if arm in found]
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
        draw_all(results, PLOTS)
    return len(stale)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Render the benchmark page and the README's table from bench/results.")
    p.add_argument("--check", action="store_true", help="write nothing; exit code 1 when something differs")
    stale = run(check=p.parse_args().check)
    sys.exit(1 if stale and p.parse_args().check else 0)
