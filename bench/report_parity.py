"""The section of `report.py` on engines: do they compute the same, steered and not?"""

from __future__ import annotations

from report_parts import percent, Result, Results, source, table, with_bf16

PARTS = ("logits", "preferences")


def parity(results: Results) -> str:
    """Floating point engines by logits, rounded ones by what a profile does to pairs, batches by their single runs."""
    logits, preferences = (results.newest("parity", where=lambda r, part=part: part in r) for part in PARTS)
    batches = results.by_processor("parity", where=lambda r: "batch" in r)
    used = {result["file"]: result for result in (logits, preferences, *batches)}
    parts = [_logits(logits), _preferences(preferences), *map(_batch, batches), *map(source, used.values())]
    return "\n\n".join(parts)


def _logits(result: Result) -> str:
    said = "Engines in floating point on one set of weights, teacher-forced, against PyTorch in float32:"
    rows = [
        [
            row["engine"],
            row["vectors"],
            f"{row['positions']:,}",
            f"{row['max_difference']:.2g}",
            percent(row["agreement"], 2),
            f"{row['widest_gap']:.2g}",
            f"{percent(row['same_greedy_text'])} of {row['prompts']}" if "prompts" in row else "",
        ]
        for row in result["logits"]
    ]
    head = ["engine", "vectors", "positions", "largest difference of logits", "same likeliest token"]
    return f"{said}\n\n{table([*head, 'widest gap where not', 'same greedy texts'], rows)}"


def _preferences(result: Result) -> str:
    rows = [row for row in result["preferences"] if row["user"] == "all"]
    figures = "; ".join(f"{row['engine']} {row['ratio']:.2f} ({row['pairs']} pairs)" for row in rows)
    said = "Rounded engines: what a profile adds to log p(chosen) - log p(rejected) of held-out pairs, over float32's: "
    return f"{said}{figures}."


def _batch(result: Result) -> str:
    figures = "; ".join(
        f"{row['precision']}, {row['rows']} rows: {percent(row['same_text'])} the same greedy text"
        for row in result["batch"]
    )
    processor = f"a processor {with_bf16(result)} instructions"
    said = "A batch in ONNX Runtime whose rows have different profiles, against its rows alone"
    return f"{said}, on {processor}: {figures}."
