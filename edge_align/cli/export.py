"""`edge-align export`: what a base needs before anyone can personalise it."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from edge_align.cli.options import App, json_option, runtime_options
from edge_align.cli.output import emit_json, say, show_facts, size, stages
from edge_align.cli.report import time_in_words
from edge_align.config import RuntimeConfig


@click.group("export")
def command() -> None:
    """Prepare a base model for personalisation: once per base, for everyone who uses it."""


@command.command("pack")
@click.option("--model", metavar="ID|GGUF", required=True, help="The base: a known id or a GGUF file.")
@click.option("--recipe", type=click.Choice(["linear"]), default="linear", help="How the pack is made.")
@click.option("--out", metavar="DIR", help="Where to put it.  [default: the home folder, where it is found]")
@click.option(
    "--fast", is_flag=True, show_default=False, help="Use ready-made texts instead of sampling: quicker, less exact."
)
@runtime_options
@json_option
@click.pass_obj
def pack(app: App, model: str, recipe: str, out: str | None, fast: bool, runtime: RuntimeConfig) -> None:
    """Build the latent pack of a base.

    Samples answers of the base and finds the directions in which they differ. Takes minutes to hours, most of it for
    sampling; a stopped run goes on where it was when the command is repeated.
    """
    from edge_align.bases import find_base
    from edge_align.registry import estimate_minutes
    from edge_align_export.pack import build_pack

    home = app.home
    base = find_base(model, hash_cache=home.hash_cache)
    time = "minutes" if fast else f"about {max(1, round(estimate_minutes(base))):,} minutes on this machine"
    say(f"Building the latent pack of {base.id}; this takes {time}. If it is stopped, repeat the command to go on.")
    with stages(lines=True) as progress:
        report = build_pack(
            home=home,
            model=model,
            recipe=recipe,
            out=None if out is None else Path(out).absolute(),
            fast=fast,
            runtime=runtime,
            progress=progress,
        )
    if app.json:
        emit_json(report)
        return
    facts = [
        ("Pack", f"{report['pack']} ({size(report['bytes'])})"),
        ("Latents", f"{report['k']}, from {report['answers']:,} answers"),
        ("Time", time_in_words(report["seconds"])),
        ("Health", ", ".join(f"{name} {value:.3g}" for name, value in report["health"].items())),
    ]
    if out is None:
        facts.append(("Next", f"edge-align personalize --model {shlex.quote(model)} --feedback FILE"))
    show_facts(facts)


@command.command("onnx")
@click.option(
    "--from", "source", metavar="HF_DIR|GGUF", required=True, help="The checkpoint: a folder, a file or an id."
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8", "int4"]),
    default="int4",
    help="Of the weights; fp16 also of the computation (for CUDA).",
)
@click.option("--out", metavar="DIR", required=True, help="A new folder to put it in.")
@json_option
@click.pass_obj
def onnx(app: App, source: str, precision: str, out: str) -> None:
    """Export a base for ONNX Runtime, with a steering input.

    From a Hugging Face folder or a GGUF, which is dequantised first; nothing is downloaded. Packs and profiles made
    for a GGUF fit its exports. Needs the extras export and onnx.
    """
    from edge_align.bases import find_base, KNOWN

    path = find_base(source).path if source in KNOWN else Path(source).expanduser()
    from edge_align_export.onnx_export import export_onnx

    with stages() as progress:
        report = export_onnx(
            path,
            Path(out).expanduser().absolute(),
            precision=precision,
            base_id=source if source in KNOWN else None,
            progress=progress,
        )
    if app.json:
        emit_json(report.to_dict())
        return
    show_facts(
        [
            ("Export", f"{report.folder} ({size(report.size_bytes)})"),
            ("Model", f"{report.architecture}, {report.n_layer} blocks of width {report.d_model}, {report.precision}"),
            ("Next", f"edge-align generate PROMPT --model {shlex.quote(report.folder)}"),
        ]
    )
