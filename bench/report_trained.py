"""Sections of `report.py` on what trains through the base for every person: LoRA-DPO, P-tuning-DPO, BiPO."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from beside import at_our_kl, OURS, summary
from report_parts import mean, percent, Result, Results, source, table

LORA, PTUNING, BIPO = "LoRA-DPO", "P-tuning-DPO", "BiPO"
RANK, SMALL = 16, 8  # of the LoRA; the other one that was tried


SHORT = {LORA: "LoRA", PTUNING: "P-tuning", BIPO: "BiPO"}
SHORT |= {at_our_kl(method): at_our_kl(name) for method, name in SHORT.items()} | {OURS: "ours"}


def lora(results: Results) -> str:
    """LoRA-DPO, as it was trained and at the KL of ours, beside ours."""
    said = (
        f'The LoRA (r{RANK} on every linear map) has no KL budget as it is trained; in "{SHORT[at_our_kl(LORA)]}" its '
        "change of the weights is scaled to the KL from the base that ours measures on the same base answers."
    )
    parts = [_trained(results, LORA, said)]
    with suppress(LookupError):
        parts.append(
            _trained(results, LORA, f"A LoRA of half the rank (r{SMALL}), at the rate chosen for r{RANK}.", rank=SMALL)
        )
    return "\n\n".join(parts)


def ptuning(results: Results) -> str:
    """P-tuning-DPO beside ours."""
    return _trained(results, PTUNING, "20 virtual tokens before the prompt, the outputs of a small trained network.")


def bipo(results: Results) -> str:
    """Steering vectors trained through the base beside ours."""
    first, last = tried_of(results, BIPO)["settings"]["blocks"]
    said = (
        f"A vector for each of the blocks {first} to {last}, trained through the base as by BiPO (arXiv 2406.00045; "
        f'one block there), as trained and, in "{SHORT[at_our_kl(BIPO)]}", scaled to the KL that ours measures.'
    )
    return _trained(results, BIPO, said)


def _trained(results: Results, method: str, said: str, *, rank: int = RANK) -> str:
    """A method that trains through the base, tuned on validation people, beside ours by user."""
    result = tried_of(results, method, rank=rank)
    tuned = results.newest("lora", where=lambda r: r["method"] == method and r["tuning"])
    rows, settings = result["rows"], result["settings"]
    arms = [arm for arm in (method, at_our_kl(method), OURS) if any(row["arm"] == arm for row in rows)]
    by = {(row["arm"], row["pairs"], row["user"]): row for row in rows}
    body = []
    for pairs in sorted({row["pairs"] for row in rows}, reverse=True):
        users = [user for arm, n, user in by if arm == OURS and n == pairs]
        for name in users:
            body.append(_beside(name.replace("_", " "), pairs, [by.get((arm, pairs, name)) for arm in arms]))
        shared = [name for name in users if all((arm, pairs, name) in by for arm in arms)]
        every = [[by[arm, pairs, name] for name in shared] for arm in arms]
        means = [{key: mean(row[key] for row in of_arm) for key in _COMPARED} for of_arm in every]
        body.append(_beside("**mean**" if shared == users else "**mean of those with all arms**", pairs, means))
    what = ("win rate: ", "NLL: ", "distinct-2: ")
    head = ["user", "pairs", *(f"{name}{SHORT[arm]}" for name in what for arm in arms)]
    tried = ", ".join(
        f"{row['learning_rate']:g}: {percent(row['win_rate'])} at {row['nll_ratio']:.2f} x" for row in tuned["tuning"]
    )
    tuners = tuned["options"]["tuners"].split(",")
    stored = [mean(row["stored_bytes"] for row in rows if row["arm"] == arm) for arm in (method, OURS)]
    said += (
        f" Win rates on {result['prompts']} unseen prompts, the same pairs, one PyTorch engine; beta "
        f"{settings['beta']}, {settings['epochs']} epochs. The learning rate did best on {len(tuners)} validation "
        f"{'person' if len(tuners) == 1 else 'people'} among those within 1.25 x the base's NLL ({tried}): "
        f"{settings['learning_rate']:g}; {tuned['tuning_sec'] / 60:.0f} minutes of training to find it. Trained on "
        f"{', '.join(sorted({row['trained_on'] for row in rows if row['arm'] != OURS}))}. "
        f"Stored: {stored[0]:,.0f} bytes a person, ours {stored[1]:,.0f}."
    )
    gains = "; ".join(
        f"{name}: {100 * found['mean']:+.1f} points ({100 * found['ci'][0]:.1f} to {100 * found['ci'][1]:.1f})"
        for name, found in result["summary"].items()
        if " less " in name
    )
    used = {one["file"]: one for one in (result, *result["with"], tuned)}
    files = "\n\n".join(map(source, used.values()))
    return f"{said}\n\n{table(head, body)}\n\nBy prompt, with the number of pairs: {gains}.\n\n{files}"


_COMPARED = ("win_rate", "nll_ratio", "distinct2_ratio")


def _beside(name: str, pairs: int, arms: Sequence[Result | None]) -> list[str]:
    """A row; an arm that a user has not has empty cells."""
    cells = [name, str(pairs), *("" if row is None else percent(row["win_rate"]) for row in arms)]
    return cells + ["" if row is None else f"{row[key]:.2f} x" for key in _COMPARED[1:] for row in arms]


def tried_of(results: Results, method: str, *, rank: int = RANK) -> Result:
    """The newest comparison of a method (a LoRA: of this rank) with ours, and the people and numbers of pairs that only
    older ones of the same settings have; `with`: those.
    """
    newest, *older = results.newest_first(
        "lora", where=lambda r: r["method"] == method and r["settings"].get("rank", rank) == rank
    )
    rows, used = list(newest["rows"]), []
    for result in older:
        known = {(row["user"], row["pairs"]) for row in rows}
        more = [row for row in result["rows"] if (row["user"], row["pairs"]) not in known]
        if more and all(result[key] == newest[key] for key in ("settings", "prompts")):
            rows += more
            used.append(result)
    return newest | {"rows": rows, "with": used, "summary": summary(rows, method)}


def timed_whole(results: Results) -> Result:
    """The newest timing that ran every training to its end and judged what came of it."""
    return results.newest(
        "training_time",
        where=lambda r: "answers" in r and not any(cost["extrapolated"] for cost in r["trained"].values()),
    )


def training_time(results: Results) -> str:
    """What a new person costs each."""
    result = timed_whole(results)
    answers = result["answers"]
    costs = [
        (OURS, f"{result['edge_align_sec']:.1f} s", "", result["edge_align_bytes"], result["edge_align_peak_rss_mb"])
    ]
    for name, cost in result["trained"].items():
        seconds = f"{cost['seconds']:.0f} s" + (" (extrapolated)" if cost["extrapolated"] else "")
        share = f"{result['ours_over_it'][name]:.4f}"
        costs.append((name, seconds, share, cost["stored_bytes"], cost["peak_rss_mb"]))
    rows = []
    for name, seconds, share, stored, memory in costs:
        cost = result["trained"].get(name)
        title = name if cost is None else f"{name}, {cost['epochs']} epochs, {cost['dtype']}"
        rows.append([title, seconds, share, f"{stored:,}", f"{memory:.0f} MB"])
        if name in answers:
            found = answers[name]
            low, high = found["win_ci"]
            rows[-1].append(f"{percent(found['win_rate'])} ({percent(low)} to {percent(high)})")
            rows[-1] += [f"{found['nll_ratio']:.2f} x", f"{found['distinct2_ratio']:.2f} x"]
    head = ["", "to learn", "ours over it", "bytes stored", "peak memory so far"]
    head += [f"win rate on {result['prompts']} prompts", "NLL", "distinct-2"]
    said = f"Beside what trains through the base, on {result['pairs']} pairs of one user ({result['user']}):"
    parts = [f"{said}\n\n{table(head, rows)}\n\n{source(result)}"]
    with suppress(LookupError):
        parts.append(_cost_by_pairs(results))
    return "\n\n".join(parts)


def _cost_by_pairs(results: Results) -> str:
    """The newest timing by stages at each number of pairs; NoResult while there is none."""
    found = {r["pairs"]: r for r in reversed(results.newest_first("training_time", where=lambda r: "stages_sec" in r))}
    methods = list(dict.fromkeys(name for r in found.values() for name in r["trained"]))
    rows = []
    for pairs, result in sorted(found.items()):
        stages, encoder = result["stages_sec"], result["encoder"]
        cells = [f"{pairs:,}", *(f"{stages[name]:.2f} s" for name in ("encode", "fit", "check"))]
        cells += [f"{result['edge_align_sec']:.1f} s", f"{encoder['gflop']:,.0f}", f"{encoder['products_sec']:.2f} s"]
        for name in methods:
            cost = result["trained"].get(name)
            note = " (extrapolated)" if cost and cost["extrapolated"] else ""
            cells.append(f"{cost['seconds']:,.0f} s{note}: {percent(result['ours_over_it'][name], 1)}" if cost else "")
        rows.append(cells)
    head = ["pairs", "encode", "fit", "check of fluency", "ours", "GFLOP to encode", "these products alone"]
    head += [f"{name}: ours over it" for name in methods]
    said = (
        "By the number of pairs; stages and sums are medians of runs before, between and after theirs. The "
        "check costs as much for any number of pairs."
    )
    return f"{said}\n\n{table(head, rows)}\n\n" + "\n\n".join(source(result) for _, result in sorted(found.items()))
