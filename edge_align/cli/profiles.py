"""`edge-align profiles`: list, choose, go back, rename, remove and share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edge_align.cli.control_vector import show_written, write_vector
from edge_align.cli.options import (
    App,
    confirm,
    FULL_STRENGTH,
    json_option,
    model_option,
    strength_option,
    threads_option,
)
from edge_align.cli.output import emit_json, plural, say, show_facts, show_table, size, stages, write
from edge_align.cli.report import manifest_accuracy, value_in_words
from edge_align.config import default, PersonalizeConfig, RuntimeConfig
from edge_align.errors import EdgeAlignError, InputError
from edge_align.profiles import ProfileStore, Version
from edge_align.server.answers import AnswerStore
from edge_align.store import FeedbackLog


@click.group("profiles")
def command() -> None:
    """List, choose, undo, share and remove profiles.

    A profile has numbered versions, of which one is active; one profile is in use.
    """


@command.command("list")
@json_option
@click.pass_obj
def list_(app: App) -> None:
    """List the profiles, and what was logged for them."""
    found = ProfileStore(app.home).list()
    with FeedbackLog(app.home) as log:
        logged = {name: log.count(name) for name in {*log.profiles(), *(one.name for one in found)}}
    documents = [
        {
            "name": one.name,
            "current": one.current,
            "active": one.active,
            "versions": one.versions,
            "size_bytes": one.size_bytes,
            "feedback_rows": logged[one.name],
            "damage": one.damage,
        }
        for one in found
    ]
    known = {one.name for one in found}
    documents += [
        {
            "name": name,
            "current": False,
            "active": None,
            "versions": 0,
            "size_bytes": 0,
            "feedback_rows": logged[name],
            "damage": None,
        }
        for name in sorted(logged)
        if name not in known
    ]
    if app.json:
        emit_json({"profiles": documents})
        return
    if not documents:
        say("No profiles yet; `edge-align personalize --feedback FILE` or `edge-align compare` makes one.")
        return
    rows = [
        (
            str(one["name"]),
            "in use" if one["current"] else "",
            "damaged" if one["damage"] else str(one["active"] or "none"),
            str(one["versions"]),
            size(int(str(one["size_bytes"]))),
            f"{one['feedback_rows']:,}",
        )
        for one in documents
    ]
    show_table(
        ("name", "", "active", "versions", "size", "feedback"), rows, right=("active", "versions", "size", "feedback")
    )
    for one in documents:
        if one["damage"]:
            say(f"Warning: {one['damage']}")


@command.command("show")
@click.argument("name", required=False)
@click.option("--version", type=int, metavar="N", help="Version to show.  [default: the active one]")
@json_option
@click.pass_obj
def show(app: App, name: str | None, version: int | None) -> None:
    """Show a version of a profile; NAME is by default the profile in use."""
    store = ProfileStore(app.home)
    name = name or store.current()
    if name is None:
        raise InputError("no profile is in use; give a name from `edge-align profiles list`")
    number = version if version is not None else store.active_version(name)
    manifest: dict[str, Any] = {}
    if number is not None:
        _, manifest = store.load(name, number)
    with FeedbackLog(app.home) as log:
        rows = log.count(name)
    active = store.active_version(name)
    document = {
        "name": name,
        "current": store.current() == name,
        "active": active,
        "version": number,
        "versions": [*store.versions(name)],
        "size_bytes": store.size_bytes(name, number) if number is not None else 0,
        "feedback_rows": rows,
        "manifest": manifest,
    }
    if app.json:
        emit_json(document)
        return
    facts = [
        ("Profile", f"{name}{' (in use)' if document['current'] else ''}"),
        ("Version", "none active" if number is None else f"{number}{' (active)' if number == active else ''}"),
        ("Versions", ", ".join(map(str, store.versions(name))) or "none"),
        ("Feedback", plural(rows, "row")),
    ]
    if number is not None:
        facts.append(("Size", size(store.size_bytes(name, number))))
    hidden = ("schema", "kind", "checksum", "tensors", "tensors_sha256")
    facts += [(key, value_in_words(value)) for key, value in manifest.items() if key not in hidden]
    show_facts(facts)


@command.command("use")
@click.argument("name", required=False)
@click.option("--none", "nothing", is_flag=True, show_default=False, help="Use no profile: the base.")
@click.option("--version", type=int, metavar="N", help="Make this version the active one as well.")
@json_option
@click.pass_obj
def use(app: App, name: str | None, nothing: bool, version: int | None) -> None:
    """Choose the profile in use, or none."""
    if (name is None) != nothing:
        raise InputError("give the name of a profile, or --none")
    if nothing and version is not None:
        raise InputError("--version needs the name of a profile")
    store = ProfileStore(app.home)
    if name is not None and version is not None:
        store.activate(name, version)
    active = store.active_version(name) if name is not None else None
    store.use(name)
    if app.json:
        emit_json({"current": name, "active": active})
    elif name is None:
        write("No profile is in use.\n")
    else:
        write(f"{name} is in use, {'without an active version' if active is None else f'version {active}'}.\n")


@command.command("history")
@click.argument("name", required=False)
@json_option
@click.pass_obj
def history(app: App, name: str | None) -> None:
    """List the versions of a profile, the oldest first."""
    store = ProfileStore(app.home)
    name = name or store.current()
    if name is None:
        raise InputError("no profile is in use; give a name from `edge-align profiles list`")
    versions = store.history(name)
    if app.json:
        emit_json({"name": name, "versions": [_version(version) for version in versions]})
        return
    rows = [
        (
            str(one.number),
            "active" if one.active else "",
            str(one.manifest.get("created", "")),
            size(one.size_bytes),
            one.damage or manifest_accuracy(one.manifest),
        )
        for one in versions
    ]
    show_table(("version", "", "made", "size", "held-out accuracy"), rows, right=("version", "size"))


@command.command("undo")
@click.argument("name", required=False)
@json_option
@click.pass_obj
def undo(app: App, name: str | None) -> None:
    """Go back to the version that was active before."""
    store = ProfileStore(app.home)
    name = name or store.current()
    if name is None:
        raise InputError("no profile is in use; give a name from `edge-align profiles list`")
    active = store.undo(name)
    if app.json:
        emit_json({"name": name, "active": active})
    else:
        write(f"{name} is at version {active} again.\n")


@command.command("rename")
@click.argument("name")
@click.argument("new")
@json_option
@click.pass_obj
def rename(app: App, name: str, new: str) -> None:
    """Give a profile and its feedback another name."""
    store = ProfileStore(app.home)
    with FeedbackLog(app.home) as log:
        rows = log.count(name)
        if rows and log.count(new):
            raise InputError(f"there is feedback for a profile {new} already; choose another name")
        learnt = store.has(name)
        if learnt or not rows:
            store.rename(name, new)
        elif store.has(new):
            raise InputError(f"there is a profile {new} already; choose another name")
        try:
            log.rename(name, new)
        except EdgeAlignError:
            if learnt:
                store.rename(new, name)
            raise
    if app.json:
        emit_json({"name": new, "before": name, "feedback_rows": rows})
    else:
        write(f"{name} is called {new} now.\n")


@command.command("rm")
@click.argument("name")
@click.option("--with-feedback", is_flag=True, show_default=False, help="Forget its feedback as well.")
@click.option("--yes", "-y", is_flag=True, show_default=False, help="Do not ask.")
@json_option
@click.pass_obj
def rm(app: App, name: str, with_feedback: bool, yes: bool) -> None:
    """Delete a profile with all its versions; its feedback is kept unless you say otherwise."""
    store = ProfileStore(app.home)
    with FeedbackLog(app.home) as log:
        rows = log.count(name)
        learnt = store.has(name)
        if not learnt and not (with_feedback and rows):
            store.versions(name)  # an error that names the known profiles
        forgets = f" and {plural(rows, 'row')} of its feedback" if with_feedback else ""
        confirm(f"Delete profile {name}{forgets} for good?", yes=yes)
        if learnt:
            store.remove(name)
        forgotten = log.forget(name, everything=True) if with_feedback else 0
    if with_feedback:
        with AnswerStore(app.home, keep_days=0) as answers:
            answers.forget(profile=name)
    if app.json:
        emit_json({"name": name, "removed": learnt, "forgotten": forgotten, "feedback_rows": rows - forgotten})
        return
    write(f"{name} is gone" + (f", and {plural(forgotten, 'row')} of feedback.\n" if with_feedback else ".\n"))
    if rows - forgotten:
        left = plural(rows, "row")
        say(f"Its feedback ({left}) is kept; `edge-align feedback forget --all --profile {name}` deletes it.")


FORMATS = click.Choice(["edge-align", "gguf"])


@command.command("export")
@click.argument("name")
@click.argument("file")
@click.option("--version", type=int, metavar="N", help="Version to export.  [default: the active one]")
@click.option("--format", "form", type=FORMATS, default="edge-align", help="gguf: a control vector for llama.cpp.")
@strength_option
@model_option
@click.option("--force", is_flag=True, show_default=False, help="Replace FILE if it exists.")
@json_option
@click.pass_obj
def export(
    app: App, name: str, file: str, version: int | None, form: str, strength: float, model: str | None, force: bool
) -> None:
    """Write a profile to one FILE. It holds no feedback.

    For edge-align on another machine with the same base, or, with --format gguf, for programs that load llama.cpp's
    control vectors; only there do --strength and --model (the profile's base) count.
    """
    path = Path(file).absolute()
    if form == "gguf":
        show_written(
            app,
            write_vector(app, path, profile=name, version=version, model=model, strength=strength, overwrite=force),
        )
        return
    if strength != FULL_STRENGTH or model is not None:
        raise InputError("--strength and --model go with --format gguf; a profile of edge-align is written as it is")
    store = ProfileStore(app.home)
    number = version if version is not None else store.active_version(name)
    store.export(name, number, path, overwrite=force)
    n_bytes = path.stat().st_size
    if app.json:
        emit_json({"name": name, "version": number, "file": file, "size_bytes": n_bytes})
    else:
        write(f"{name} version {number} is in {file} ({size(n_bytes)}).\n")


@command.command("import")
@click.argument("file")
@click.argument("name", required=False)
@click.option("--no-activate", is_flag=True, show_default=False, help="Keep it as a version, but do not switch to it.")
@click.option("--format", "form", type=FORMATS, help="What FILE is.  [default: as its first bytes say]")
@model_option
@click.option(
    "--shift", type=int, default=0, help="Added to the block numbers of a GGUF; -1 for files of cvector-generator."
)
@click.option(
    "--kl-budget",
    type=float,
    default=default(PersonalizeConfig, "kl_budget"),
    help="A GGUF that takes answers further from the base (KL, nats per token) is scaled down to this.",
)
@threads_option
@json_option
@click.pass_obj
def import_(
    app: App,
    file: str,
    name: str | None,
    no_activate: bool,
    form: str | None,
    model: str | None,
    shift: int,
    kl_budget: float,
    runtime: RuntimeConfig,
) -> None:
    """Keep FILE as a new version of the profile NAME (by default FILE's own name).

    FILE is a profile exported here, or a control vector (GGUF) of llama.cpp or repeng; --model, --shift, --kl-budget
    and --threads are for the latter.
    """
    path = Path(file).absolute()
    name = name or path.stem
    store = ProfileStore(app.home)
    document: dict[str, Any] = {}
    if (form or _form(path)) == "gguf":
        from edge_align.exchange import import_control_vector

        with stages(lines=True) as progress:
            progress("measure", 0.0)
            document = import_control_vector(
                path, name, home=app.home, model=model, shift=shift, kl_budget=kl_budget, runtime=runtime
            )
        number = int(document["version"])
    else:
        number = store.import_(path, name).number
    if not no_activate:
        store.activate(name, number)
    if app.json:
        emit_json({"name": name, "version": number, "activated": not no_activate} | document)
        return
    for note in document.get("notes", ()):
        say(f"Note: {note}")
    if document:
        write(
            f"{name} holds vectors of KL {document['predicted_kl']:.3g} nats per token from the base, measured here.\n"
        )
    write(f"{name} version {number} is {'kept' if no_activate else 'active'}.\n")
    if store.current() != name:
        say(f"`edge-align profiles use {name}` puts it in use.")


def _form(path: Path) -> str:
    """What a file is, by its first bytes; what cannot be read fails later, with its reason."""
    try:
        with path.open("rb") as file:
            return "gguf" if file.read(4) == b"GGUF" else "edge-align"
    except OSError:
        return "edge-align"


def _version(version: Version) -> dict[str, Any]:
    return {
        "version": version.number,
        "active": version.active,
        "size_bytes": version.size_bytes,
        "damage": version.damage,
        "manifest": version.manifest,
    }
