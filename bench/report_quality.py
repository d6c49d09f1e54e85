"""Sections of `report.py` on what people say of personal answers."""

from __future__ import annotations

from contextlib import suppress

from report_parts import earlier, mean, NoResult, percent, Result, Results, source, table

from edge_align.simulation.users import USERS

SIZES = (100, 20)  # pairs
FLIPS = (0.25, 0.1)  # shares of wrong verdicts
COMBINED = "combined"  # the group of people whose tastes have three parts
EVERY = ",".join(user.name for user in USERS)  # the eight attributes, as a run may name them
CURVE = 4  # sizes at least that make a learning curve


def quality_of(
    results: Results,
    pairs: int,
    *,
    users: str | None = None,
    flip: float = 0.0,
    fresh: bool = False,
    before: Result | None = None,
) -> tuple[Result, list[Result]]:
    """The newest quality result at this number of pairs and share of wrong verdicts, and its rows.

    users: a group; None: the eight attributes. fresh: on prompts that earlier runs have not seen. before: a result it
    is to be compared with; one of the same pack that was measured before it is of the same code, or nearly.
    """

    def asked(result: Result) -> bool:
        options = result["options"]
        return (
            options.get("flip", 0.0) == flip
            and (options.get("users") or EVERY) == (users or EVERY)
            and options.get("set", "test") == "test"
            and bool(options.get("skip")) == fresh
            and (before is None or (result["pack_hash"] == before["pack_hash"] and result["date"] < before["date"]))
            and any(row["pairs"] == pairs for row in result["users"])
        )

    result = results.newest("quality", where=asked)
    return result, [row for row in result["users"] if row["pairs"] == pairs]


def quality(results: Results) -> str:
    said = (
        "A tie counts half; the interval is the 95 % bootstrap interval over prompts. NLL and distinct-2 are relative "
    )
    said += "to the base's own answers."
    parts = [judged(*quality_of(results, size)) for size in SIZES]
    return "\n\n".join([said, *parts, fresh_prompts(results)])


def combined(results: Results) -> str:
    """People whose tastes have three parts; NoResult while they were not measured."""
    said = (
        "The eight people of Personalized Soups (arXiv 2310.11564): each likes easy or expert, brief or long, friendly "
        "or unfriendly answers, and judges by the sum of the three."
    )
    return f"{said}\n\n{judged(*quality_of(results, SIZES[0], users=COMBINED))}"


def other_base(results: Results) -> str:
    """Attributes on a base of another architecture; NoResult while none was measured."""
    result = results.newest("quality", shipped=False)
    sizes = sorted({row["pairs"] for row in result["users"]}, reverse=True)
    said = f"{result['base']}: {result['base_about']}. Nothing was tuned for it."
    tables = [judged(result, [row for row in result["users"] if row["pairs"] == size]) for size in sizes]
    return "\n\n".join([said, *tables])


def judged(result: Result, rows: list[Result]) -> str:
    """A table of people at one number of pairs, their mean, and where it is from."""
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
    if all("score_median" in row for row in rows):
        head.append("judge's median score over the base's, in its spread (half of 16 to 84 %)")
        gains = [(row["score_median"] - row["score_median_base"], row["score_spread_base"]) for row in rows]
        for cells, (gain, sd) in zip(body, [*gains, (0.0, 0.0)], strict=True):  # the mean has none
            cells.append(f"{gain / sd:+.2f}" if sd else "")
    title = f"**{rows[0]['pairs']} pairs, {result['prompts']} unseen prompts**"
    return f"{title}\n\n{table(head, body)}\n\n{source(result)}"


def curve_of(results: Results) -> tuple[Result, list[int], dict[str, list[float]]]:
    """The newest result at CURVE or more numbers of pairs: those numbers, and each person's win rates."""

    def asked(result: Result) -> bool:
        options = result["options"]
        plain = not options.get("flip") and not options.get("users") and options.get("set", "test") == "test"
        return plain and len({row["pairs"] for row in result["users"]}) >= CURVE

    result = results.newest("quality", where=asked)
    sizes = sorted({row["pairs"] for row in result["users"]})
    won = {(row["user"], row["pairs"]): row["win_rate"] for row in result["users"]}
    people = dict.fromkeys(row["user"] for row in result["users"])
    return result, sizes, {who: [won[who, size] for size in sizes] for who in people}


def curves(results: Results) -> str:
    """Win rates by number of pairs; NoResult while they were not measured."""
    result, sizes, found = curve_of(results)
    body = [[who.replace("_", " "), *map(percent, rates)] for who, rates in found.items()]
    body.append(["**mean**", *(percent(mean(rates), 1) for rates in zip(*found.values(), strict=True))])
    for title, name in (("NLL", "nll_ratio"), ("distinct-2", "distinct2_ratio")):
        means = [mean(row[name] for row in result["users"] if row["pairs"] == size) for size in sizes]
        body.append([f"{title}, mean", *(f"{value:.2f} x" for value in means)])
    passed = [[row["passes"] for row in result["users"] if row["pairs"] == size] for size in sizes]
    body.append(["pass the gate", *(f"{sum(each)} of {len(each)}" for each in passed)])
    text = table(["win rate by pairs", *map(str, sizes)], body)
    return f"![Win rate by number of pairs](plots/curves.svg)\n\n{text}\n\n{source(result)}"


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
    """What is left of the gain over one half when verdicts are wrong, for each share of them that was measured."""
    parts = [_flipped(results, FLIPS[0])]
    for flip in FLIPS[1:]:
        with suppress(NoResult):
            parts.append(_flipped(results, flip))
    return "\n\n".join(parts)


def _flipped(results: Results, flip: float) -> str:
    size = SIZES[0]
    result, rows = quality_of(results, size, flip=flip)
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
    said = f"**{size} pairs, {percent(flip)} of them the wrong way round.** "
    said += f"Of the gain over one half {percent(left)} is left."
    files = [source(result)]
    with suppress(NoResult):
        gate = results.newest("nulls", where=lambda r: "gate" in r and r["options"].get("flip") == flip)
        drawn = [row for row in gate["gate"]["rows"] if (row["kind"], row["pairs"]) == ("true", size)]
        passed = {row["user"].replace("_", " "): row["passed"] for row in drawn}
        said += f" Over {sum(row['draws'] for row in drawn)} draws of the pairs, {sum(passed.values())} pass the gate: "
        said += ", ".join(f"{name} {n} of {drawn[0]['draws']}" for name, n in passed.items()) + "."
        files.append(source(gate))
    text = table(["user", "win rate, all verdicts right", "with wrong ones", "gate p", "NLL"], body)
    return "\n\n".join([said, text, *files])
