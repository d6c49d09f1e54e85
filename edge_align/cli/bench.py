"""`edge-align bench`: how fast this machine answers with a profile, and how fast it learns one."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import click

from edge_align import __version__
from edge_align.cli.options import App, engine_option, json_option, model_option, runtime_options, threads_option
from edge_align.cli.output import emit_json, plural, show_facts, stages
from edge_align.config import bounded, RuntimeConfig

PROMPT_TOKENS = (32, 256)


@click.group("bench")
def command() -> None:
    """Measure this machine: speed with a profile and without, and the time learning takes.

    Nothing is logged, learnt or saved.
    """


@command.command("latency")
@model_option
@engine_option
@click.option("--runs", type=int, default=10, help="Interleaved runs each way.")
@click.option("--tokens", type=int, default=64, help="Tokens decoded per run.")
@runtime_options
@json_option
@click.pass_obj
def latency(app: App, model: str | None, engine: str | None, runs: int, tokens: int, runtime: RuntimeConfig) -> None:
    """Tokens per second and time to the first token, with a profile and without.

    Ratios are medians of paired runs with a 95 % interval.
    """
    bounded(runs, 2, 1000, "--runs")
    bounded(tokens, 2, 4096, "--tokens")
    from edge_align.bases import find_base
    from edge_align.engines import open_backend
    from edge_align.speed import measure_latency

    base = find_base(model, home=app.home)
    backend = open_backend(base, runtime, engine=engine)
    try:
        with stages(lines=not app.json) as tell:
            found = measure_latency(backend, runs=runs, tokens=tokens, prompt_tokens=PROMPT_TOKENS, tell=tell)
        info = backend.info
    finally:
        backend.close()
    document = _machine() | {"model": base.id, "engine": info.name, "engine_version": info.version}
    document |= {"device": info.device, "runs": runs, "tokens": tokens} | asdict(found)
    if app.json:
        emit_json(document)
        return
    facts = [
        ("Base", f"{base.id} on {info.name} {info.version}, {info.device}"),
        ("Decoding", f"{found.base_tps:.1f} tokens per second, with a profile {found.personal_tps:.1f}"),
        ("", f"with a profile over without: {_interval(asdict(found.personal_over_base))}"),
    ]
    for row in found.first_token:
        said = f"{1000 * row.base_sec:.0f} ms after {plural(row.prompt_tokens, 'token')}, with a profile "
        said += f"{1000 * row.personal_sec:.0f} ms; {_interval(asdict(row.ratio))}"
        facts.append(("First token", said))
        if row.per_token is not None:
            said = f"then {1000 * row.per_token.base_sec:.1f} ms a token, with a profile "
            said += f"{1000 * row.per_token.personal_sec:.1f} ms; {_interval(asdict(row.per_token.ratio))}"
            facts.append(("", said))
    show_facts(facts)


@command.command("personalize")
@model_option
@click.option("--pairs", type=int, default=200, help="Preference pairs to learn from; they come with edge-align.")
@click.option("--runs", type=int, default=3, help="Runs after a warm-up.")
@threads_option
@json_option
@click.pass_obj
def personalize(app: App, model: str | None, pairs: int, runs: int, runtime: RuntimeConfig) -> None:
    """Seconds to learn a profile: encode the answers, fit, calibrate, check fluency.

    The pairs are hand-written and come with edge-align.
    """
    bounded(pairs, 8, 2000, "--pairs")
    bounded(runs, 1, 1000, "--runs")
    import numpy as np

    from edge_align.bases import find_base
    from edge_align.config import PersonalizeConfig
    from edge_align.learning import calibrate, encode_dataset, keep_fluent, learn
    from edge_align.pairs import Dataset
    from edge_align.registry import find_pack
    from edge_align.simulation.foreign import foreign_pairs
    from edge_align.speed import stage_seconds

    base = find_base(model, home=app.home)
    pack = find_pack(base, app.home)
    dataset = Dataset(pairs=tuple(foreign_pairs("plain", n=pairs, rng=np.random.default_rng(0))), ratings=())
    feedback = encode_dataset(base, pack, dataset, runtime=runtime)
    learnt = learn(pack, feedback, seed=0)
    config = PersonalizeConfig()
    encoder, _ = calibrate(pack, learnt, kl_budget=config.kl_budget)
    with stages(lines=not app.json) as tell:
        seconds = stage_seconds(
            {
                "encode": lambda: encode_dataset(base, pack, dataset, runtime=runtime),
                "fit": lambda: learn(pack, feedback, seed=0),
                "calibrate": lambda: calibrate(pack, learnt, kl_budget=config.kl_budget),
                "check": lambda: keep_fluent(base, pack, learnt, encoder, config=config, runtime=runtime),
            },
            runs,
            tell=lambda done: tell("learn", done),
        )
    total = sum(seconds.values())
    document = _machine() | {"model": base.id, "pairs": pairs, "runs": runs, "stages_sec": seconds, "total_sec": total}
    if app.json:
        emit_json(document)
        return
    parts = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    show_facts([("Base", base.id), ("Pairs", f"{pairs:,}"), ("Time", f"{total:.2f} s: {parts}")])


def _machine() -> dict[str, Any]:
    return {"edge_align": __version__, "machine": platform.machine(), "system": platform.system()}


def _interval(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} x ({ratio['ci_low']:.3f} to {ratio['ci_high']:.3f})"
