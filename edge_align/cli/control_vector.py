"""Writing a control vector: what `profiles export --format gguf` and `export control-vector` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_align.cli.options import App
from edge_align.cli.output import emit_json, say, size, write


def write_vector(
    app: App,
    path: Path,
    *,
    profile: str | None,
    version: int | None,
    model: str | None,
    strength: float,
    overwrite: bool,
) -> dict[str, Any]:
    """`exchange.export_control_vector` of the home that is in force."""
    from edge_align.exchange import export_control_vector

    return export_control_vector(
        path, home=app.home, profile=profile, version=version, model=model, strength=strength, overwrite=overwrite
    )


def show_written(app: App, document: dict[str, Any]) -> None:
    """What was written, and what a user of llama.cpp should know about it."""
    if app.json:
        emit_json(document)
        return
    first, last = document["layers"]
    steered = f"blocks {first} to {last} of {document['base']}, strength {document['strength']:g}"
    write(
        f"{document['profile']} version {document['version']} is in {document['file']} "
        f"({size(document['size_bytes'])}): {steered}.\n"
    )
    if document["mean_over_prompts"]:
        say("Note: this profile depends on the prompt; a control vector cannot, and holds its mean over prompts.")
    say("Note: llama.cpp steers the prompt with it as well, edge-align only from the prompt's last token on.")
