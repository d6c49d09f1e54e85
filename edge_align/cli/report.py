"""What `personalize` found, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge_align.cli.options import DEFAULT_PROFILE
from edge_align.cli.output import one_line, plural, show_facts, size

DROPPED_SHOWN = 10

Report = Mapping[str, Any]
"""`PersonalizeReport.to_dict()`."""


def show_report(report: Report) -> None:
    """The report and the next command to type, on stdout."""
    rows = report["rows"]
    facts = [("Rows", rows_in_words(rows))] if rows["read"] else []
    facts += [("", line) for line in dropped_lines(rows["dropped"], more=rows["dropped_more"])]
    facts.append(("Log", log_in_words(rows)))
    facts.append(("Pairs", pairs_in_words(report["pairs"], report["ratings"])))
    if report["outside_support"] is not None:
        facts.append(("Answers", f"{100 * report['outside_support']:.0f} % lie outside what the latent pack covers"))
    facts.append(("Accuracy", accuracy_in_words(report["heldout"])))
    if report["scale"] is not None:
        kl = report["predicted_kl"]
        text = f"scale {report['scale']:.3g}, predicted KL {kl or 0.0:.3g} nats per token"
        if report["nll_ratio"] is not None:
            text += f"; its answers have {report['nll_ratio']:.2f} x the base's NLL"
        if report["collision_ratio"] is not None:
            text += f", the same words {report['collision_ratio']:.2f} x as often"
        facts.append(("Strength", text))
    facts.append(("Time", time_in_words(report["stages_sec"])))
    facts.append(("Profile", profile_in_words(report)))
    facts.append(("Next", next_command(report)))
    show_facts(facts)


def rows_in_words(rows: Mapping[str, Any]) -> str:
    dropped = len(rows["dropped"]) + rows["dropped_more"]
    return f"{rows['read']:,} read, {rows['used']:,} used, {dropped:,} dropped"


def log_in_words(rows: Mapping[str, Any]) -> str:
    """How many rows the profile has in all, and how many of them were trained on."""
    text = plural(rows["logged"], "row")
    if rows["duplicates"]:
        text += f", {rows['duplicates']:,} of those read were there already"
    return text if rows["trained_on"] == rows["logged"] else f"{text}; the newest {rows['trained_on']:,} are used"


def dropped_lines(dropped: Sequence[Mapping[str, Any]], *, more: int = 0) -> list[str]:
    """The first dropped rows as `file:line: reason`, and how many there are besides. more: dropped but not listed."""
    lines = [f"{one_line(row['file'])}:{row['line']}: {one_line(row['reason'])}" for row in dropped[:DROPPED_SHOWN]]
    left = len(dropped) - len(lines) + more
    return lines if not left else [*lines, f"and {left:,} more"]


def pairs_in_words(origins: Mapping[str, int], ratings: int) -> str:
    parts = [f"{count:,} {origin}" for origin, count in origins.items()]
    text = f"{sum(origins.values()):,}" + (f" ({', '.join(parts)})" if parts else "")
    return text if not ratings else f"{text}, and {plural(ratings, 'single rating')}"


def accuracy_in_words(heldout: Mapping[str, Any] | None) -> str:
    """Accuracy on held-out verdicts with its interval, and the permutation p where there is one."""
    if heldout is None:
        return "not tested yet"
    low, high = 100 * heldout["ci_low"], 100 * heldout["ci_high"]
    text = f"predicts {100 * heldout['accuracy']:.0f} % of {heldout['n']:,} held-out preferences "
    text += f"(95 % interval {low:.0f}-{high:.0f} %)"
    return f"{text}, chance p = {_p(heldout['p'])}" if "p" in heldout else text


def _p(p: float) -> str:
    return f"{p:.3f}".removeprefix("0")


def time_in_words(stages_sec: Mapping[str, float]) -> str:
    parts = [f"{stage} {seconds:.1f} s" for stage, seconds in stages_sec.items()]
    return ", ".join([*parts, f"together {sum(stages_sec.values()):.1f} s"])


def profile_in_words(report: Report) -> str:
    if report["version"] is None:
        return f"{report['profile']}: nothing learnt yet; {report['reason']}"
    text = f"{report['profile']} version {report['version']}, {size(report['profile_bytes'])}, "
    text += "active" if report["activated"] else "not active"
    return f"{text}: {report['reason']}" if report["reason"] else text


def next_command(report: Report) -> str:
    """What to type now."""
    name = report["profile"]
    option = "" if name == DEFAULT_PROFILE else f" --profile {name}"
    if report["activated"]:
        return f'edge-align generate "How do I get better at cooking?" --compare{option}'
    if report["state"] == "learnt":
        return f"edge-align profiles use {name} --version {report['version']}"
    return f"edge-align compare{option}"


def summary(report: Report) -> str:
    """The outcome in one line, for a chat."""
    if report["activated"]:
        return f"Learnt {profile_in_words(report)}; it {accuracy_in_words(report['heldout'])}."
    return f"Not switched on: {report['reason'] or profile_in_words(report)}."


def manifest_accuracy(manifest: Mapping[str, Any]) -> str:
    """Held-out accuracy as a version's manifest has it."""
    heldout = manifest.get("heldout")
    if not isinstance(heldout, dict) or "accuracy" not in heldout:
        return ""
    return f"{100 * heldout['accuracy']:.0f} % of {heldout.get('n', 0):,}"


def value_in_words(value: object) -> str:
    """A value of a manifest."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {value_in_words(item)}" for key, item in value.items()) or "none"
    return str(value)
