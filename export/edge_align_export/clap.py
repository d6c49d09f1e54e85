"""Recipe `clap`: from the pack of recipe `score` on, decoder and readout are trained through the frozen base.

CLaP (arXiv 2412.20834) with additive steering for its adapter. Runs on the CPU, on a GPU, and on several of either
through Hugging Face Accelerate (`accelerate launch`); every process needs the same home folder. A stopped run goes on
from its last checkpoint, to the same result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_align.config import bounded
from edge_align.errors import CorruptArtefact, InputError
from edge_align.files import write_json
from edge_align.runtime.torch_ref import LlamaReference
from edge_align.tensors import load_tensors, save_tensors
from edge_align_export.clap_loss import Batch, Clap, freeze, make_batch, mutual_information
from edge_align_export.hooked import HookedModel
from edge_align_export.linear import LinearPack, VARIANCE_FLOOR
from edge_align_export.texts import Answers

TRAINED = ("decoder", "readout", "log_variance")
HEALTH_PROMPTS, HEALTH_ANSWERS = 16, 8
SHARES = (0.01, 0.018, 0.032, 0.056, 0.1, 0.18, 0.32, 0.56, 1.0)
SHARE_PROMPTS = 4
ACTIVE = 0.03  # of its prior variance: a latent whose posterior means vary more is active


@dataclass(frozen=True, slots=True)
class ClapConfig:
    """Sizes are per process. The learning rate by the NLL of held-out answers (docs/decisions/0011)."""

    steps: int = 60  # ten to fifteen minutes of two cores
    prompts: int = 2  # per step
    answers: int = 8  # to each of them
    decoder_lr: float = 0.1  # in units of the decoder's own size at each coordinate
    readout_lr: float = 0.0  # 0: only the decoder is trained
    contrast: float = 1.0
    spread_kl: float = 1.0
    warmup: int = 10
    save_every: int = 20
    seed: int = 7

    def __post_init__(self) -> None:
        bounded(self.steps, 1, 1_000_000, "steps")
        bounded(self.prompts, 1, 4096, "prompts per step")
        bounded(self.answers, 2, 64, "answers per prompt")


@dataclass(frozen=True)
class Trained:
    """decoder (k, n_layer, d_model), readout (n_feature, k), variance (k,); history: losses of every step."""

    decoder: np.ndarray
    readout: np.ndarray
    variance: np.ndarray
    history: list[dict[str, float]]


@dataclass(frozen=True)
class Corpus:
    """What is trained on: rows[g] are the answers (indices) to prompt g; end: the token an answer ended with."""

    answers: Answers
    features: np.ndarray
    max_tokens: int
    end: int

    def rows(self, *, held_out: bool, n: int) -> list[np.ndarray]:
        """The answers to each prompt that has n of them. Every fifth prompt is held out, as in `linear.solve`."""
        found = (np.flatnonzero(self.answers.groups == g) for g in np.unique(self.answers.groups))
        return [rows for rows in found if len(rows) >= n and (self.answers.groups[rows[0]] % 5 == 0) == held_out]

    def batch(self, rows: np.ndarray, *, n: int, device: torch.device, tokens: int | None = None) -> Batch:
        """Those answers, n of each prompt in a row, each with the end of text where it was reached; or their first
        `tokens` tokens.
        """
        said = [self.answers.completions[i] for i in rows]
        return make_batch(
            [self.answers.prompts[i] for i in rows],
            [(answer if len(answer) >= self.max_tokens else [*answer, self.end])[:tokens] for answer in said],
            torch.from_numpy(self.features[rows]).to(device),
            n=n,
        )


def open_workers() -> Any:
    """The Accelerator of this process: alone, or one of several that `accelerate launch` started.

    Raises InputError without the package.
    """
    from datetime import timedelta

    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError:
        raise InputError('recipe clap needs the extra export: pip install "edge-align[export]"') from None
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # the others wait while one process samples
    return Accelerator(kwargs_handlers=[patient])


def train(
    model: LlamaReference | HookedModel,
    corpus: Corpus,
    linear: LinearPack,
    layers: range,
    config: ClapConfig,
    *,
    work: Path,
    workers: Any,
    tell: Callable[[float], None],
) -> Trained:
    """Adam on the losses of `clap_loss`, the base frozen. A pack's decoder is in units that suit its metric: it is
    trained at the share under which answers are likeliest, and handed back in its units.

    Raises InputError, CorruptArtefact, StorageError.
    """
    groups = corpus.rows(held_out=False, n=config.answers)
    if len(groups) < config.prompts * workers.num_processes:
        raise InputError(
            f"{len(groups)} prompts have {config.answers} answers to train on; a step needs "
            f"{config.prompts * workers.num_processes}"
        )
    share = share_of(model, corpus, linear, layers, [rows[: config.answers] for rows in groups])
    clap = start(linear, corpus.features, layers, share=share).to(model.device)
    clap.readout.requires_grad_(config.readout_lr > 0)
    clap.log_variance.requires_grad_(config.readout_lr > 0)
    rates = {"decoder": config.decoder_lr, "readout": config.readout_lr, "log_variance": 10 * config.readout_lr}
    trained = [{"params": [getattr(clap, name)], "rate": rates[name]} for name in TRAINED if rates[name]]
    optimizer = torch.optim.Adam(trained, betas=(0.9, 0.95))
    history = _resume(work, clap, optimizer, config)
    module, prepared = workers.prepare(clap, optimizer)
    order = _prompts(len(groups), config, workers.num_processes)
    for step, chosen in enumerate(order):
        if step < len(history):
            continue
        draw = np.random.default_rng([config.seed, step, workers.process_index])
        mine = chosen[workers.process_index :: workers.num_processes]
        rows = np.concatenate([draw.choice(groups[g], config.answers, replace=False) for g in mine])
        rng = torch.Generator(model.device).manual_seed(int(draw.integers(2**62)))
        batch = corpus.batch(rows, n=config.answers, device=model.device)
        frozen = freeze(model, batch, layers)
        readout = config.readout_lr > 0
        parts = module(
            frozen,
            batch,
            rng,
            contrast=config.contrast,
            spread_kl=config.spread_kl if readout else 0.0,
        )
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1.0, (step + 1) / config.warmup) * (1 - 0.9 * step / config.steps)
        workers.backward(parts["loss"])
        prepared.step()
        prepared.zero_grad()
        tokens = int(parts.pop("tokens")) / len(rows)
        history.append({name: float(part.detach()) for name, part in parts.items()} | {"tokens": tokens})
        history[-1]["reconstruction"] /= tokens
        if not np.isfinite(history[-1]["loss"]):
            raise CorruptArtefact(f"the loss of step {step} is not finite; lower the learning rate")
        if workers.is_main_process and (len(history) % config.save_every == 0 or len(history) == config.steps):
            _save(work, clap, optimizer, history)
        tell(len(history) / config.steps)
    decoder = np.zeros_like(linear.decoder)
    decoder[:, list(layers)] = (clap.decoder.detach() * clap.decoder_scale / share).cpu().numpy()
    variance = np.maximum(clap.log_variance.detach().exp().cpu().numpy(), VARIANCE_FLOOR * linear.spread**2)
    return Trained(
        decoder=decoder,
        readout=(clap.readout.detach() / clap.feature_scale[:, None]).cpu().numpy(),
        variance=np.asarray(variance, np.float32),
        history=history,
    )


def start(linear: LinearPack, features: np.ndarray, layers: range, *, share: float) -> Clap:
    """The module at the pack, with `share` of its decoder."""
    decoder = share * torch.from_numpy(linear.decoder[:, list(layers)].astype(np.float32))
    size = decoder.square().mean(0).sqrt()
    return Clap(
        decoder=decoder,
        readout=torch.from_numpy(linear.readout.astype(np.float32)),
        variance=torch.from_numpy(linear.variance),
        prior_variance=torch.from_numpy(linear.spread.astype(np.float32) ** 2),
        decoder_scale=size.clamp(min=1e-3 * float(size.mean()) + 1e-12),
        feature_scale=torch.from_numpy(features.std(0).astype(np.float32) + 1e-6),
    )


@torch.no_grad()
def share_of(
    model: LlamaReference | HookedModel,
    corpus: Corpus,
    pack: LinearPack,
    layers: range,
    groups: list[np.ndarray],
) -> float:
    """The share of the pack's decoder under which the first of these prompts' answers, as many to each, are likeliest
    given their own latents.
    """
    clap = start(pack, corpus.features, layers, share=1.0).to(model.device)
    answers = []
    for rows in groups[:SHARE_PROMPTS]:
        batch = corpus.batch(rows, n=len(rows), device=model.device)
        answers.append((freeze(model, batch, layers), clap.vectors(clap.mean(batch.features, len(rows)))))
    best, least = SHARES[0], float("inf")
    for share in SHARES:
        nll = sum(float(frozen.nll(share * vectors).sum()) for frozen, vectors in answers)
        if nll > least:
            break
        best, least = share, nll
    return best


@torch.no_grad()
def health_of(
    model: LlamaReference | HookedModel,
    corpus: Corpus,
    pack: LinearPack,
    layers: range,
    *,
    tell: Callable[[float], None],
) -> dict[str, float]:
    """On held-out prompts: NLL per token of answers given their own latent, another's to the same prompt, and none;
    mutual information of latent and answer (at most log N nats); share of active latents. Answers are steered at the
    share of the decoder that suits four of the prompts best, for the decoder is in units that suit the metric.
    """
    n = min(HEALTH_ANSWERS, int(np.bincount(corpus.answers.groups).max()))
    groups = [rows[:n] for rows in corpus.rows(held_out=True, n=n)[:HEALTH_PROMPTS]]
    if not groups or n < 2:
        tell(1.0)
        return {}
    share = share_of(model, corpus, pack, layers, groups)
    clap = start(pack, corpus.features, layers, share=share).to(model.device)
    found, sums, tokens = [], np.zeros(3), 0
    for i, rows in enumerate(groups):
        batch = corpus.batch(rows, n=n, device=model.device)
        answers, mean = freeze(model, batch, layers), clap.mean(batch.features, n)
        given = (None, clap.vectors(mean), clap.vectors(mean.roll(1, 1)))
        sums += [float(answers.nll(vectors).sum()) for vectors in given]
        tokens += int(answers.n_tokens.sum())
        found.append(mean)
        tell((i + 1) / len(groups))
    means = torch.cat(found)  # (prompts, n, k)
    none, own, swapped = (round(float(nll), 4) for nll in sums / tokens)
    active = (means.square().mean((0, 1)) > ACTIVE * clap.prior_variance).float().mean()
    rng = torch.Generator(model.device).manual_seed(0)
    return {
        "nll_none": none,
        "nll_own_latent": own,
        "nll_swapped_latent": swapped,
        "nll_at_share": share,
        "mutual_information": round(mutual_information(means, clap.log_variance.exp(), rng), 3),
        "active_latents": round(float(active), 3),
    }


def _prompts(n: int, config: ClapConfig, processes: int) -> Iterator[np.ndarray]:
    """Which prompts each step takes, all processes together: every prompt once before any comes again."""
    rng = np.random.default_rng(config.seed)
    size = config.prompts * processes
    left = np.zeros(0, np.int64)
    for _ in range(config.steps):
        if len(left) < size:
            left = rng.permutation(n)
        yield left[:size]
        left = left[size:]


def _save(work: Path, clap: Clap, optimizer: torch.optim.Optimizer, history: list[dict[str, float]]) -> None:
    """A checkpoint: parameters and Adam's moments, then the losses, whose number says how far it is."""
    arrays = {}
    for name in TRAINED:
        parameter = getattr(clap, name)
        arrays[name] = parameter.detach().cpu().numpy()
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state.get(parameter, {}):
                arrays[f"{name}.{moment}"] = optimizer.state[parameter][moment].cpu().numpy()
    arrays["step"] = np.array([len(history)], np.int64)
    save_tensors(work / "clap.safetensors", arrays)
    write_json(work / "clap.json", {"history": history})


def _resume(work: Path, clap: Clap, optimizer: torch.optim.Optimizer, config: ClapConfig) -> list[dict[str, float]]:
    """Load the checkpoint in `work`, if there is a whole one: the losses of the steps that are done."""
    try:
        arrays = load_tensors(work / "clap.safetensors", None)
        history: list[dict[str, float]] = json.loads((work / "clap.json").read_bytes())["history"]
        done = int(arrays["step"][0])
        if not 0 < done <= min(len(history), config.steps):
            return []
    except (OSError, KeyError, ValueError, InputError, CorruptArtefact):
        return []
    with torch.no_grad():
        for name in TRAINED:
            parameter = getattr(clap, name)
            parameter.copy_(torch.from_numpy(arrays[name].copy()))
            if f"{name}.exp_avg" in arrays:
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(done)),
                    **{
                        moment: torch.from_numpy(arrays[f"{name}.{moment}"].copy()).to(parameter.device)
                        for moment in ("exp_avg", "exp_avg_sq")
                    },
                }
    return history[:done]
