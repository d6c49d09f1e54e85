"""The section of `report.py` on latent packs of one base, made by different recipes."""

from __future__ import annotations

from report_parts import percent, Result, Results, source, table


def packs(results: Results) -> str:
    """Every pack's people by number of pairs, and the packs' own health."""
    result = results.newest("packs")
    first = next(iter(result["packs"]))
    said = (
        f"Win rate and NLL at strength 1 of {len({row['user'] for row in result['users']})} people on "
        f"{result['prompts']} unseen prompts; pairs, prompts and seeds are the same. The last column sets `{first}` at "
        "strength 1 against the best that the other pack does at any strength at no higher an NLL, in points, with "
        "the 95 % bootstrap interval over prompts; an NLL below the base's counts as the base's there."
    )
    rows = []
    for size, found in result["summary"].items():
        for name, row in found.items():
            won = row["win_rates"][row["strengths"].index(1.0)]
            cells = [f"`{name}`", size.removeprefix("pairs_"), percent(won, 1)]
            cells += [f"{row['nll_ratio']:.2f} x", f"{row['distinct2_ratio']:.2f} x", _gain(row)]
            rows.append(cells)
    head = ["recipe", "pairs", "win rate", "NLL", "distinct-2", f"`{first}` less it, at its NLL"]
    return "\n\n".join([said, table(head, rows), _health(result), source(result | {"pack_hash": None})])


def _gain(row: Result) -> str:
    if "ci" not in row:
        return ""
    low, high = row["ci"]
    return f"{100 * row['ours_less_it']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


HEALTH = (
    ("held-out R2 of the deep latents", "r2"),
    ("NLL of held-out answers, nats a token", "nll_none"),
    ("the same, given their own latent", "nll_own_latent"),
    ("the same, given another answer's", "nll_swapped_latent"),
    ("mutual information of latent and answer, nats", "mutual_information"),
    ("share of latents that vary", "active_latents"),
    ("closed loop: what comes back", "loop_gain"),
    ("closed loop: cosine", "loop_cosine"),
)


def _health(result: Result) -> str:
    """What each pack says of itself."""
    about = result["packs"]
    rows = [
        [title, *(str(one["health"][key]) if key in one["health"] else "" for one in about.values())]
        for title, key in HEALTH
    ]
    rows.append(["answers", *(f"{one['answers']:,}" for one in about.values())])
    return table(["", *(f"`{name}`" for name in about)], rows)
