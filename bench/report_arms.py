"""Section of `report.py` on what people would use instead: prompts and other vectors, beside ours."""

from __future__ import annotations

from contextlib import suppress

from beside import OURS
from report_parts import mean, percent, Result, Results, source, table
from report_quality import SIZES

PROMPTED = ("written preference", "three pairs in the prompt")  # arms that no pack has a part in


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
