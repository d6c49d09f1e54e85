"""`edge-align models`: the bases on this machine, whether each can be personalised, and how to add one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TYPE_CHECKING

import click

from edge_align.cli.options import App, confirm, json_option, threads_option
from edge_align.cli.output import emit_json, say, show_facts, show_table, size, stages, write
from edge_align.config import RuntimeConfig
from edge_align.errors import PackMissing

if TYPE_CHECKING:
    from edge_align.bases import BaseModel
    from edge_align.home import Home


@click.group("models")
def command() -> None:
    """Show, add and remove the base models that can be personalised.

    A base is one of the known ids or a GGUF file. Personalising it takes a latent pack, made once per base.
    """


@command.command("list")
@json_option
@click.pass_obj
def list_(app: App) -> None:
    """List the known bases, installed or not, and those that were added, with their packs."""
    from edge_align.bases import DEFAULT_BASE
    from edge_align.registry import known_models

    models = known_models(app.home)
    if app.json:
        emit_json({"default": DEFAULT_BASE, "models": models})
        return
    rows = []
    for model in models:
        installed = "installed" if model["path"] else "not installed"
        default = "default" if model["id"] == DEFAULT_BASE else ""
        rows.append((model["id"], default, installed, _pack(model["pack"]), model["title"]))
    show_table(("id", "", "file", "pack", "title"), rows)
    for model in models:
        if "error" in model:
            say(f"Note: {model['error']}")


@command.command("show")
@click.argument("model", required=False)
@json_option
@click.pass_obj
def show(app: App, model: str | None) -> None:
    """Show a base: its file, its sizes and its latent pack. MODEL is an id or a GGUF file, else the default base."""
    from edge_align.bases import find_base

    base = find_base(model, home=app.home)
    document = _describe(base, app.home)
    if app.json:
        emit_json(document)
        return
    pack = document["pack"]
    facts = [
        ("Model", document["id"]),
        ("File", f"{document['path']} ({size(document['size_bytes'])})"),
        ("Hash", document["hash"]),
        ("Architecture", f"{base.header.architecture}, {base.n_layer} blocks of width {base.d_model}"),
        ("Pack", document["pack_error"] if pack is None else f"{_pack(pack)}, {pack['hash']}"),
    ]
    if pack is not None:
        facts += [(f"  {key}", f"{value:.4g}") for key, value in pack["health"].items() if isinstance(value, float)]
    show_facts(facts)


@command.command("add")
@click.argument("path")
@click.option("--name", metavar="ID", help="Id to give it.  [default: the bundle's, or the file's name]")
@threads_option
@json_option
@click.pass_obj
def add(app: App, path: str, name: str | None, runtime: RuntimeConfig) -> None:
    """Install a base: PATH is a bundle (folder or tar) or a GGUF file. It is copied into the home folder.

    A bundle is refused when any file of it is not what was bundled, or its parts are of different bases.
    """
    from edge_align.installed import add_model

    with stages(lines=True) as progress:
        document = add_model(Path(path).absolute(), home=app.home, name=name, runtime=runtime, progress=progress)
    if app.json:
        emit_json(document)
        return
    pack = "with its pack" if document["pack"] else "without a pack"
    write(f"{document['id']} is installed ({size(document['size_bytes'])}), {pack}.\n")
    if document["pack"]:
        say(f"Next: edge-align personalize --model {document['id']} --feedback FILE")
    else:
        say(f"Next: edge-align export pack --model {document['id']}")


@command.command("rm")
@click.argument("model")
@click.option("--yes", "-y", is_flag=True, show_default=False, help="Do not ask.")
@json_option
@click.pass_obj
def rm(app: App, model: str, yes: bool) -> None:
    """Delete a base that was added, with the pack it came with; profiles made for it are kept."""
    from edge_align.bases import added_bases
    from edge_align.installed import remove_model

    if model in added_bases(app.home):
        confirm(f"Delete the model {model} for good?", yes=yes)
    freed = remove_model(model, home=app.home)
    if app.json:
        emit_json({"id": model, "freed_bytes": freed})
    else:
        write(f"{model} is gone ({size(freed)}).\n")


def _describe(base: BaseModel, home: Home) -> dict[str, Any]:
    """A base and its pack, for people and programs."""
    from edge_align.registry import estimate_minutes, find_pack

    described, missing, minutes = None, None, None
    try:
        pack = find_pack(base, home)
        described = {
            "k": pack.k,
            "recipe": pack.manifest.get("recipe"),
            "hash": pack.hash,
            "health": pack.manifest.get("health", {}),
        }
    except PackMissing as error:
        missing, minutes = str(error), estimate_minutes(base)
    return {
        "id": base.id,
        "path": str(base.path),
        "size_bytes": base.size_bytes,
        "hash": base.hash,
        "architecture": base.header.architecture,
        "n_layer": base.n_layer,
        "d_model": base.d_model,
        "pack": described,
        "pack_error": missing,
        "estimate_minutes": minutes,
    }


def _pack(pack: dict[str, Any] | None) -> str:
    if pack is None:
        return "none"
    return f"{pack['k']} latents, recipe {pack['recipe']}"
