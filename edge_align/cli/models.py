"""`edge-align models`: the bases on this machine, and whether each can be personalised."""

from __future__ import annotations

from typing import Any, TYPE_CHECKING

import click

from edge_align.cli.options import App, json_option
from edge_align.cli.output import emit_json, say, show_facts, show_table, size
from edge_align.errors import ArtefactError, EdgeAlignError, PackMissing

if TYPE_CHECKING:
    from edge_align.bases import BaseModel
    from edge_align.home import Home


@click.group("models")
def command() -> None:
    """Show the base models that can be personalised.

    A base is one of the known ids or a GGUF file. Personalising it takes a latent pack, made once per base.
    """


@command.command("list")
@json_option
@click.pass_obj
def list_(app: App) -> None:
    """List the known bases, and the packs on this machine."""
    from edge_align.bases import DEFAULT_BASE
    from edge_align.registry import known_models

    models = known_models(app.home)
    if app.json:
        emit_json({"default": DEFAULT_BASE, "models": models})


@command.command("show")
@click.argument("model", required=False)
@json_option
@click.pass_obj
def show(app: App, model: str | None) -> None:
    """Show a base: its file, its sizes and its latent pack. MODEL is an id or a GGUF file, by default our default."""
    from edge_align.bases import find_base

    home = app.home
    base = find_base(model, hash_cache=home.hash_cache)
    document = describe(base, home)
    if app.json:
        emit_json(document)
        return
    pack = document["pack"]
    facts = [
        ("Model", document["id"]),
        ("File", f"{document['path']} ({size(document['size_bytes'])})"),
        ("Hash", document["hash"]),
        ("Architecture", f"{document['architecture']}, {base.n_layer} blocks of width {base.d_model}"),
    ]
    if pack is None:
        facts.append(("Pack", document["pack_error"]))
    else:
        facts.append(("Pack", f"{pack['k']} latents, recipe {pack['recipe']}, {size(pack['size_bytes'])}"))
    show_facts(facts)
