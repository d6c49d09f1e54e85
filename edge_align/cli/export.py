"""`edge-align export`: what a base needs before anyone can personalise it."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from edge_align.cli.options import (
    App,
    json_option,
    model_option,
    profile_option,
    runtime_options,
    strength_option,
    threads_option,
)
from edge_align.cli.output import emit_json, say, show_facts, show_table, size, stages
from edge_align.cli.report import time_in_words
from edge_align.config import RuntimeConfig
from edge_align.errors import InputError

MEASURING = 0.35  # of the minutes that a pack takes: what does not grow with its answers
INT4_HOLDS = 5.1  # bits of a weight that four bits and a block's step and offset can repeat, as Q4_1's and Q4_K's


@click.group("export")
def command() -> None:
    """Prepare a base model for personalisation: once per base, for everyone who uses it."""


@command.command("pack")
@click.option("--model", metavar="ID|GGUF", required=True, help="The base: a known id or a GGUF file.")
@click.option(
    "--recipe",
    type=click.Choice(["linear", "score", "clap"]),
    default="linear",
    help="linear: forward passes only. score: the decoder solved from one backward pass an answer; better, for bases "
    "that PyTorch computes. clap: score, and then the decoder trained through the frozen base.",
)
@click.option("--out", metavar="DIR", help="Where to put it.  [default: the home folder, where it is found]")
@click.option(
    "--fast", is_flag=True, show_default=False, help="Use ready-made texts instead of sampling: quicker, less exact."
)
@click.option("--prompts", type=int, help="Prompts to sample answers to; more make a better pack.  [default: 304]")
@click.option("--answers", type=int, help="Answers to each prompt.  [default: 8]")
@click.option(
    "--readout", metavar="PACK", help="score, clap: keep the latents of this pack, and make their decoder anew."
)
@click.option("--steps", type=int, help="clap: training steps.  [default: 60]")
@click.option("--batch", type=int, help="clap: prompts in a step, with 8 answers each.  [default: 2]")
@runtime_options
@json_option
@click.pass_obj
def pack(
    app: App,
    model: str,
    recipe: str,
    out: str | None,
    fast: bool,
    prompts: int | None,
    answers: int | None,
    readout: str | None,
    steps: int | None,
    batch: int | None,
    runtime: RuntimeConfig,
) -> None:
    """Build the latent pack of a base.

    Samples answers of the base and finds the directions in which they differ. Takes minutes to hours, most of it for
    sampling; a stopped run goes on where it was when the command is repeated. PyTorch uses a GPU where there is one;
    recipe clap trains on several when Hugging Face Accelerate's `accelerate launch` starts the command.
    """
    from edge_align.bases import find_base
    from edge_align.registry import estimate_minutes

    if recipe != "clap" and (steps is not None or batch is not None):
        raise InputError("--steps and --batch belong to --recipe clap")
    if recipe == "linear" and readout is not None:
        raise InputError("--readout belongs to --recipe score and clap")
    from edge_align_export.clap import ClapConfig
    from edge_align_export.linear import LinearConfig
    from edge_align_export.pack import build_pack

    home = app.home
    sizes = LinearConfig(**{name: n for name, n in (("prompts", prompts), ("answers", answers)) if n is not None})
    usual = LinearConfig()
    training = {"steps": steps, "prompts": batch}
    base = find_base(model, home=home)
    share = sizes.prompts * sizes.answers / (usual.prompts * usual.answers)
    minutes = estimate_minutes(base) * (MEASURING + (1 - MEASURING) * share)
    time = "minutes" if fast else f"up to about {max(1, round(minutes)):,} minutes on this machine"
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
            config=sizes,
            readout=None if readout is None else Path(readout).absolute(),
            clap=ClapConfig(**{name: n for name, n in training.items() if n is not None}),
        )
    if not report:  # another process of the same run writes the pack
        return
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


@command.command("gguf")
@click.option("--from", "source", metavar="DIR|GGUF", required=True, help="A Hugging Face folder, or a GGUF file.")
@click.option(
    "--quant",
    "quants",
    metavar="TYPE",
    multiple=True,
    default=["Q4_K_M"],
    show_default=True,
    help="F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0, ...; repeat for several files.",
)
@click.option("--out", metavar="DIR", required=True, help="A new or empty folder.")
@threads_option
@json_option
@click.pass_obj
def gguf(app: App, source: str, quants: tuple[str, ...], out: str, runtime: RuntimeConfig) -> None:
    """Convert a checkpoint to GGUF, or a GGUF to another type, with llama.cpp's own quantiser.

    Folders of the Llama family, SmolLM3, Granite, Qwen 2 and 3 are converted here (config.json, tokenizer.json,
    safetensors); others by llama.cpp's convert_hf_to_gguf.py. A stopped run leaves nothing that loads; repeat the
    command.
    """
    from edge_align_export.gguf_file import export_gguf

    folder = Path(out).absolute()
    with stages(lines=True) as progress:
        report = export_gguf(
            Path(source).absolute(),
            folder,
            quants=[quant.upper() for quant in quants],
            threads=runtime.n_threads,
            progress=progress,
        )
    if app.json:
        emit_json(report)
        return
    files = [(folder / made["file"], made["size_bytes"]) for made in report["files"]]
    for note in report["notes"]:
        say(f"Note: {note}")
    show_facts(
        [
            *(("File", f"{file} ({size(n_bytes)})") for file, n_bytes in files),
            ("Model", f"{report['architecture']}, {report['n_layer']} blocks of width {report['d_model']}"),
            ("Time", f"{report['seconds']:.1f} s"),
            ("Next", f"edge-align export pack --model {shlex.quote(str(files[-1][0]))}"),
        ]
    )


@command.command("bundle")
@click.option("--model", metavar="ID|GGUF", required=True, help="The base: an id or a GGUF file. It needs its pack.")
@click.option("--onnx", metavar="DIR", help="The same base for ONNX Runtime, as `export onnx` made it.")
@click.option("--name", metavar="ID", help="Id to install it under.  [default: the base's own]")
@click.option("--out", metavar="DIR|FILE.tar", required=True, help="A new or empty folder, or a new tar file.")
@threads_option
@json_option
@click.pass_obj
def bundle(app: App, model: str, onnx: str | None, name: str | None, out: str, runtime: RuntimeConfig) -> None:
    """Put a base and its latent pack into one folder or tar file.

    `edge-align models add` installs it on another machine.
    """
    from edge_align_export.bundle import build_bundle

    path = Path(out).absolute()
    with stages(lines=True) as progress:
        report = build_bundle(
            path,
            home=app.home,
            model=model,
            onnx=None if onnx is None else Path(onnx).absolute(),
            name=name,
            runtime=runtime,
            progress=progress,
        )
    if app.json:
        emit_json(report)
        return
    show_facts(
        [
            ("Bundle", f"{report['bundle']} ({size(report['size_bytes'])}, {report['files']} files)"),
            ("Base", f"{report['id']}, {report['base_hash']}"),
            ("Next", f"edge-align models add {shlex.quote(out)}"),
        ]
    )


@command.command("verify")
@click.argument("folder", metavar="DIR")
@click.option("--reference", metavar="GGUF|DIR", help="What to compare with.  [default: the least rounded GGUF in DIR]")
@click.option("--answers", type=int, default=8, help="Sampled answers to compare on.")
@click.option("--tokens", type=int, default=32, help="Most tokens of each.")
@click.option("--seed", type=int, default=0, help="Seed of the answers and of the random vectors.")
@threads_option
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    folder: str,
    reference: str | None,
    answers: int,
    tokens: int,
    seed: int,
    runtime: RuntimeConfig,
) -> None:
    """Compare every artefact in DIR, in every engine that is here, with PyTorch in float32.

    Takes GGUF files, Hugging Face folders and ONNX exports. Logits are teacher-forced on answers that the base
    samples, unsteered and steered; "preference off" is by how much steering moves the answers' odds otherwise than in
    the reference. Exits with code 1 when an artefact in floating point, or the reference itself, disagrees in another
    engine.
    """
    from edge_align_export.verify import verify as run

    app = ctx.find_object(App) or App()
    with stages(lines=True) as progress:
        report = run(
            Path(folder).absolute(),
            reference=None if reference is None else Path(reference).absolute(),
            answers=answers,
            tokens=tokens,
            seed=seed,
            runtime=runtime,
            progress=progress,
        )
    if app.json:
        emit_json(report)
    else:
        headers = (
            "artefact",
            "engine",
            "vectors",
            "largest difference",
            "same top token",
            "widest gap",
            "preference off",
            "",
        )
        words = {True: "ok", False: "DIFFERS", None: "rounded"}
        rows = [
            (
                row["artefact"],
                row["engine"],
                row["vectors"],
                f"{row['max_difference']:.2g}",
                f"{100 * row['agreement']:.2f} % of {row['positions']:,}",
                f"{row['widest_gap']:.2g}",
                "" if row["preference_error"] is None else f"{100 * row['preference_error']:.1f} %",
                words[row["passes"]],
            )
            for row in report["rows"]
        ]
        show_table(headers, rows, right=headers[3:7])
        say(f"Reference: {report['reference']} in {report['reference_engine']}.")
        for note in report["notes"]:
            say(f"Note: {note}")
    if not report["ok"]:
        say("Error: artefacts that should compute the same do not; see the rows that differ")
        ctx.exit(1)


@command.command("control-vector")
@click.option("--out", metavar="FILE", required=True, help="The GGUF to write.")
@profile_option("Profile to write.  [default: the one in use]", fallback=None)
@click.option("--version", type=int, metavar="N", help="Its version.  [default: the active one]")
@strength_option
@model_option
@click.option("--force", is_flag=True, show_default=False, help="Replace FILE if it exists.")
@json_option
@click.pass_obj
def control_vector(
    app: App, out: str, profile: str | None, version: int | None, strength: float, model: str | None, force: bool
) -> None:
    """Write a profile as a control vector for llama.cpp.

    The same as `edge-align profiles export --format gguf`. Load it with llama.cpp's --control-vector.
    """
    from edge_align.cli.control_vector import show_written, write_vector

    path = Path(out).absolute()
    show_written(
        app,
        write_vector(app, path, profile=profile, version=version, model=model, strength=strength, overwrite=force),
    )


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
    facts = [
        ("Export", f"{report.folder} ({size(report.size_bytes)})"),
        ("Model", f"{report.architecture}, {report.n_layer} blocks of width {report.d_model}, {report.precision}"),
    ]
    if report.precision == "int4" and report.source_bits > INT4_HOLDS:
        lost = f"weights of {report.source_bits:.1f} bits became four, which loses some of what they say"
        facts.append(("Note", f"{lost}; --precision int8 keeps it"))
    facts.append(("Next", f"edge-align generate PROMPT --model {shlex.quote(report.folder)}"))
    show_facts(facts)
