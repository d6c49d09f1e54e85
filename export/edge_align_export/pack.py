"""`edge-align export pack`: build the latent pack of a base, once for all who use it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import edge_align
from edge_align.bases import BaseModel, find_base
from edge_align.config import RuntimeConfig, SamplingConfig
from edge_align.errors import BackendUnavailable, CorruptArtefact, InputError
from edge_align.features import open_encoder, prompt_features
from edge_align.files import make_private_dir
from edge_align.fluency import sample_base
from edge_align.gguf_tensors import GGUFTensors
from edge_align.home import Home
from edge_align.pack import LatentPack, load_pack, save_pack
from edge_align.runtime.llamacpp import check_steering, LlamaCppBackend
from edge_align.runtime.torch_ref import fastest, LlamaReference
from edge_align.simulation.prompts import prompts
from edge_align_export.card import card
from edge_align_export.clap import ClapConfig, Corpus, health_of, open_workers, train, Trained
from edge_align_export.curves import save_curves
from edge_align_export.hooked import HookedModel
from edge_align_export.linear import LinearConfig, LinearPack, reopened, retrained, solve
from edge_align_export.measure import closed_loop, measure
from edge_align_export.passes import end_tokens, open_passes, Passes, TorchPasses
from edge_align_export.score import rescored, ScoreConfig
from edge_align_export.texts import Answers, committed_answers, read_answers, sample_answers, States

Progress = Callable[[str, float], None]
Stage = Callable[[str], Callable[[float], None]]
RECIPES = ("linear", "score", "clap")


def build_pack(
    *,
    home: Home,
    model: str | None,
    recipe: str = "linear",
    out: Path | None = None,
    fast: bool = False,
    runtime: RuntimeConfig | None = None,
    progress: Progress | None = None,
    config: LinearConfig | None = None,
    clap: ClapConfig | None = None,
    readout: Path | None = None,
) -> dict[str, Any]:
    """Build and save a pack; resumable: what a stopped run sampled, read and trained is kept in the home's cache.

    readout: the folder of a pack of this base whose latents stay; recipes score and clap give them a new decoder.

    Returns the folder, sizes, seconds per stage and health numbers; nothing in a process that `accelerate launch`
    started beside the main one. Raises InputError, BackendUnavailable, ModelLoadError, StorageError, CorruptArtefact.
    """
    if recipe not in RECIPES:
        raise InputError(f"unknown recipe {recipe!r}; there is: {', '.join(RECIPES)}")
    config = config or LinearConfig()
    clap = (clap or ClapConfig()) if recipe == "clap" else None
    score = ScoreConfig() if recipe != "linear" else None
    if readout is not None and score is None:
        raise InputError("recipe linear makes latents of its own; score and clap take those of another pack")
    runtime = runtime or RuntimeConfig()
    base = find_base(model, home=home)
    read_by = None if readout is None else load_pack(readout, base_hash=base.hash)
    folder = out or home.packs_dir / f"{base.id}-{base.hash.removeprefix('sha256:')[:12]}"
    workers = open_workers() if clap is not None else None
    main = workers is None or workers.is_main_process
    main_first = nullcontext if workers is None else workers.main_process_first
    seconds: dict[str, float] = {}

    def stage(name: str) -> Callable[[float], None]:
        begun = time.perf_counter()

        def tell(done: float) -> None:
            seconds[name] = round(time.perf_counter() - begun, 1)
            if progress is not None and main:
                progress(name, done)

        tell(0.0)
        return tell

    with ExitStack() as stack:
        backend = stack.enter_context(LlamaCppBackend.open(base.path, config=runtime))
        check_steering(backend)
        passes = open_passes(base, backend, runtime=runtime)
        stack.callback(passes.close)
        reference = _differentiable(base, passes, recipe)
        work = make_private_dir(home.cache_dir / f"pack-{_texts_id(base, passes, config, fast=fast)}")
        with main_first():
            answers, states = _collect(base, backend, passes, config, fast=fast, work=work, stage=stage)
        material = _describe(base, backend, answers)
        if read_by is None:
            pack = _solve(base, material, states, config, tell=stage("solve"))
        else:
            pack = reopened(read_by, features=material.features, groups=material.groups)
        layers, history, health = steered_layers(base, score or config), [], {"r2": round(pack.r2, 4)}
        if reference is not None:
            corpus = Corpus(answers, material.features, config.max_tokens, end_tokens(backend)[0])
            if score is not None:
                with main_first():
                    pack, gain = rescored(pack, reference, corpus, layers, score, work=work, tell=stage("scores"))
                health["first_order_gain"] = round(gain, 4)
            if clap is not None:
                kept = make_private_dir(work / f"clap-{_settings_id(clap, pack)}")
                trained = train(reference, corpus, pack, layers, clap, work=kept, workers=workers, tell=stage("train"))
                pack, history = material.retrained(pack, trained), trained.history
        if not main:
            return {}
        rng = np.random.default_rng(config.seed)
        measured = measure(base, backend, answers, pack, config, rng, work, stage)
        health |= measured.health
        own = sample_base(backend, draws=config.base_draws)
        health |= {"base_nll": round(own.nll, 4), "base_collision": round(own.collision, 6)}
        if reference is not None:
            health |= health_of(reference, corpus, pack, layers, tell=stage("health"))
        health |= closed_loop(base, passes, answers, measured.pack, config, rng, tell=stage("closed loop"))

    manifest = {
        "base": base.id,
        "base_hash": base.hash,
        "architecture": base.header.architecture,
        "n_layer": base.n_layer,
        "d_model": base.d_model,
        "k": measured.pack.k,
        "recipe": f"{recipe}-fast" if fast else recipe,
        "config": asdict(config) | {name: asdict(own) for name, own in (("score", score), ("clap", clap)) if own},
        "readout": None if read_by is None else origin(read_by),
        "layers": [layers.start, layers.stop - 1],
        "answers": len(answers),
        "base_answers": own.answers,
        "health": health,
        "seconds": seconds,
        "edge_align": edge_align.__version__,
        "engine": backend.info.version,
        "passes": passes.reason,
        "command": _command(base, recipe, config, clap, fast=fast, readout=read_by is not None),
    }
    tensors = pack.tensors() | {"metric": measured.pack.metric, "kl_curve": measured.pack.kl_curve}
    save_pack(folder, tensors=tensors, manifest=manifest, card=card(manifest))
    load_pack(folder, base_hash=base.hash)
    if history:
        save_curves(folder, history)
    return {
        "pack": str(folder),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "k": measured.pack.k,
        "answers": len(answers),
        "seconds": seconds,
        "health": health,
    }


@dataclass(frozen=True)
class Material:
    """What the encoder reads of the answers, (n, n_feature), and of the prompts, (n_prompt, n_prompt_feature)."""

    features: np.ndarray
    prompts: np.ndarray
    groups: np.ndarray

    def retrained(self, pack: LinearPack, trained: Trained) -> LinearPack:
        """The pack with what training made of its decoder and readout."""
        return retrained(
            pack,
            features=self.features,
            groups=self.groups,
            prompt_features=self.prompts,
            decoder=trained.decoder,
            readout=trained.readout,
            variance=trained.variance,
        )


def origin(pack: LatentPack) -> dict[str, Any]:
    """Where the latents of a pack come from that took them from another, for its card: whoever had them first."""
    first: dict[str, Any] | None = pack.manifest.get("readout")
    return first or {"pack_hash": pack.hash, "answers": pack.manifest["answers"], "command": pack.manifest["command"]}


def steered_layers(base: BaseModel, config: LinearConfig | ScoreConfig) -> range:
    """Blocks that a pack steers; block 0 never, at least one."""
    first = max(1, round(config.first_layer * base.n_layer))
    return range(first, max(first + 1, round(config.last_layer * base.n_layer) + 1))


def _differentiable(base: BaseModel, passes: Passes, recipe: str) -> LlamaReference | HookedModel | None:
    """The base as gradients go through it; None where only transformers computes it and the recipe needs none.

    Raises BackendUnavailable.
    """
    if isinstance(passes, TorchPasses):
        return passes.model
    if recipe == "linear":
        return None
    device, dtype = fastest()
    try:
        return HookedModel.open(base.path, dtype=dtype, device=device)
    except BackendUnavailable as error:
        raise BackendUnavailable(
            f"recipe {recipe} needs gradients from PyTorch, which does not compute {base.id} here; use linear ({error})"
        ) from error


def _collect(
    base: BaseModel,
    backend: LlamaCppBackend,
    passes: Passes,
    config: LinearConfig,
    *,
    fast: bool,
    work: Path,
    stage: Stage,
) -> tuple[Answers, States]:
    """Answers, and their deep activations."""
    layers = steered_layers(base, config)
    if fast:
        answers = committed_answers(backend, prompts=config.prompts, max_tokens=config.max_tokens)
        states = read_answers(
            passes, answers, layers=layers, d_model=base.d_model, work=work, tell=stage("activations")
        )
    else:
        answers, states = sample_answers(
            passes,
            backend,
            prompts("pack")[: config.prompts],
            per_prompt=config.answers,
            sampling=SamplingConfig(max_tokens=config.max_tokens, seed=config.seed),
            layers=layers,
            d_model=base.d_model,
            work=work,
            tell=stage("sample"),
        )
    if not np.isfinite(states.plain).all():
        raise CorruptArtefact(f"{base.path} computes activations that are not finite; the file may be damaged")
    return answers, states


def _describe(base: BaseModel, backend: LlamaCppBackend, answers: Answers) -> Material:
    features = open_encoder(base.path).encode(answers.completions)
    described = prompt_features(GGUFTensors(base.path), [backend.tokenize(text) for text in answers.questions])
    return Material(features, described, answers.groups)


def _solve(
    base: BaseModel, material: Material, states: States, config: LinearConfig, *, tell: Callable[[float], None]
) -> LinearPack:
    pack = solve(
        features=material.features,
        deep=states.plain,
        written=states.centred,
        groups=material.groups,
        prompt_features=material.prompts,
        layers=steered_layers(base, config),
        n_layer=base.n_layer,
        k=min(config.k, len(states.plain) // 4),
        ridge=config.ridge,
        inputs=config.head_inputs,
    )
    tell(1.0)
    return pack


def _command(
    base: BaseModel, recipe: str, config: LinearConfig, clap: ClapConfig | None, *, fast: bool, readout: bool
) -> str:
    """What makes this pack again; the pack whose readout it takes is told by `origin`."""
    words = [f"edge-align export pack --model {base.id} --recipe {recipe}"]
    words += ["--readout PACK"] if readout else []
    words += ["--fast"] if fast else []
    words += [f"--prompts {config.prompts}"] if config.prompts != LinearConfig().prompts and not fast else []
    words += [f"--answers {config.answers}"] if config.answers != LinearConfig().answers and not fast else []
    if clap is not None:
        words += [f"--steps {clap.steps}"] if clap.steps != ClapConfig().steps else []
        words += [f"--batch {clap.prompts}"] if clap.prompts != ClapConfig().prompts else []
    return " ".join(words)


def _texts_id(base: BaseModel, passes: Passes, config: LinearConfig, *, fast: bool) -> str:
    """Names the kept answers and activations: everything one depends on; more prompts add to what is there."""
    settings = [config.answers, config.max_tokens, config.seed, config.first_layer, config.last_layer]
    return hashlib.sha256(json.dumps([base.hash, fast, passes.prompts_at_once, *settings]).encode()).hexdigest()[:12]


def _settings_id(clap: ClapConfig, pack: LinearPack) -> str:
    """Names what a training run kept: everything it depends on beside the answers."""
    told = hashlib.sha256(json.dumps(asdict(clap)).encode())
    for array in (pack.decoder, pack.readout, pack.variance):
        told.update(np.ascontiguousarray(array).tobytes())
    return told.hexdigest()[:12]
