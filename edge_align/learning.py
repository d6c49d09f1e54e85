"""The learning half of `personalize`: texts to latents, latents to a preference encoder and what is known about it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from edge_align.bases import BaseModel
from edge_align.config import PersonalizeConfig, RuntimeConfig
from edge_align.encoder import PreferenceEncoder
from edge_align.engines import open_backend, open_tokenizer
from edge_align.features import embedding_table, MAX_TOKENS, open_base_encoder, prompt_features
from edge_align.fluency import CONTEXT, fluent_factor, sample_base, varied_factor
from edge_align.gate import compare_on_new, cross_validate, direction_reliability, earns_head, HeldOut, wilson
from edge_align.latent_dpo import draw_contrasts, fit, fit_head, LatentDPOConfig, LatentFeedback
from edge_align.pack import LatentPack
from edge_align.pairs import Dataset
from edge_align.records import Prompt

MAX_LATENTS = 64
"""Prompts over which the KL of a prompt-dependent profile is averaged."""

SUPPORT = 3.0
"""An answer whose latent is longer than this many prior radii (sqrt k) lies outside the pack's support."""


@dataclass(frozen=True, slots=True)
class Learnt:
    """A fitted encoder (scale 1), the latents it gives on the training prompts (n, k), and the evidence for it."""

    encoder: PreferenceEncoder
    latents: np.ndarray
    heldout: HeldOut
    reliability: float  # of the direction, 0..1: its squared cosine with the true one, estimated
    outside_support: float  # share of answers the pack knows little about


def encode_dataset(
    base: BaseModel,
    pack: LatentPack,
    dataset: Dataset,
    *,
    runtime: RuntimeConfig | None = None,
    tell: Callable[[float], None] = lambda _done: None,
) -> LatentFeedback:
    """Latents of every answer, each text encoded once, and the head inputs of every prompt."""
    texts: dict[str, int] = {}
    for pair in dataset.pairs:
        texts.setdefault(pair.chosen, len(texts))
        texts.setdefault(pair.rejected, len(texts))
    for rating in dataset.ratings:
        texts.setdefault(rating.completion, len(texts))
    prompts: dict[Prompt, int] = {}
    for prompt in [*(pair.prompt for pair in dataset.pairs), *(rating.prompt for rating in dataset.ratings)]:
        prompts.setdefault(prompt, len(prompts))
    threads = 0 if runtime is None else runtime.n_threads
    with open_tokenizer(base, n_threads=threads) as tokenize:
        # far more characters than MAX_TOKENS tokens ever cover need not be tokenised
        answers = [tokenize(text[: MAX_TOKENS * 32]) or [0] for text in texts]
        questions = [tokenize(prompt[-1].content[: MAX_TOKENS * 32]) or [0] for prompt in prompts]
    encoder = open_base_encoder(base, n_threads=threads)
    z = pack.encode(encoder.encode(answers, on_done=lambda n: tell(n / len(answers))))
    described = prompt_features(embedding_table(base), questions)
    inputs, expected = pack.head_inputs(described), pack.expected(described)

    def latents(found: list[tuple[str, Prompt]]) -> np.ndarray:
        if not found:
            return np.zeros((0, pack.k), np.float32)
        raw: np.ndarray = z[[texts[text] for text, _ in found]]
        centred: np.ndarray = raw - expected[[prompts[prompt] for _, prompt in found]]
        return centred

    pair_group = np.array([prompts[pair.prompt] for pair in dataset.pairs], dtype=np.int64)
    rated_group = np.array([prompts[rating.prompt] for rating in dataset.ratings], dtype=np.int64)
    return LatentFeedback(
        chosen=latents([(pair.chosen, pair.prompt) for pair in dataset.pairs]),
        rejected=latents([(pair.rejected, pair.prompt) for pair in dataset.pairs]),
        pair_features=inputs[pair_group],
        pair_weight=np.array([pair.weight for pair in dataset.pairs], dtype=np.float32),
        pair_group=pair_group,
        rated=latents([(rating.completion, rating.prompt) for rating in dataset.ratings]),
        rated_up=np.array([rating.label for rating in dataset.ratings], dtype=bool),
        rated_features=inputs[rated_group],
        rated_weight=np.array([rating.weight for rating in dataset.ratings], dtype=np.float32),
        rated_group=rated_group,
    )


def learn(pack: LatentPack, feedback: LatentFeedback, *, seed: int, config: LatentDPOConfig | None = None) -> Learnt:
    """Latent DPO on encoded feedback: gate, head selection and final fit on all rows. Deterministic by seed."""
    config = config or LatentDPOConfig()
    contrasts = draw_contrasts(feedback, pack.variance, config=config, seed=seed)
    heldout = cross_validate(feedback, contrasts, config=config, seed=seed)
    mean = fit(contrasts, feedback, config=config)
    head_in = np.zeros((0, pack.prompt_projection.shape[1]), np.float32)
    head_out = np.zeros((pack.k, 0), np.float32)
    if earns_head(feedback, contrasts, config=config, seed=seed):
        mean, head_in, head_out = fit_head(contrasts, feedback, config=config)
    encoder = PreferenceEncoder(mean=mean, head_in=head_in, head_out=head_out, scale=1.0)
    inputs = np.concatenate([feedback.pair_features, feedback.rated_features])
    if encoder.depends_on_prompt:
        latents = np.stack([encoder.latent(row) for row in inputs[:MAX_LATENTS]])
    else:
        latents = encoder.latent()[None]
    every = np.concatenate([feedback.chosen, feedback.rejected, feedback.rated])
    return Learnt(
        encoder=encoder,
        latents=latents,
        heldout=heldout,
        reliability=direction_reliability(feedback),
        outside_support=float((np.linalg.norm(every, axis=1) > SUPPORT * np.sqrt(pack.k)).mean()),
    )


def compare_with(
    pack: LatentPack, feedback: LatentFeedback, active: PreferenceEncoder, new: np.ndarray, *, seed: int
) -> tuple[float, float]:
    """(refit, active): the shares of the rows `new` (pairs, then ratings) that each predicts without having seen them.

    A prompt-dependent profile takes part with its constant mean, as the cross-validated refits do.
    """
    config = LatentDPOConfig()
    contrasts = draw_contrasts(feedback, pack.variance, config=config, seed=seed)
    return compare_on_new(feedback, contrasts, new, active.mean, config=config, seed=seed)


def calibrate(pack: LatentPack, learnt: Learnt, *, kl_budget: float) -> tuple[PreferenceEncoder, float]:
    """The encoder at strength 1, and the KL predicted for it, nats per decoded token.

    The budget is a ceiling: a direction that fresh feedback would not give again gets less of it. The square root of
    the reliability is the expected cosine between what was learnt and what the person likes.
    """
    scale = pack.scale_for(learnt.latents, kl_budget * learnt.reliability**0.5)
    return replace(learnt.encoder, scale=scale), pack.mean_kl(learnt.latents * scale)


@dataclass(frozen=True, slots=True)
class Checked:
    """An encoder at the strength at which its answers are within their limits; what was found there.

    The ratios are to the base's own: see `fluency.collision` and `fluency.sampled_nll`. None: not looked at.
    """

    encoder: PreferenceEncoder
    predicted_kl: float
    nll_ratio: float | None = None
    collision_ratio: float | None = None


def keep_fluent(
    base: BaseModel,
    pack: LatentPack,
    learnt: Learnt,
    encoder: PreferenceEncoder,
    *,
    config: PersonalizeConfig,
    runtime: RuntimeConfig | None = None,
    tell: Callable[[float], None] | None = None,
) -> Checked:
    """`encoder`, less strong where its answers would be alike or unlikely beyond the limits of `config`.

    A limit of 0 is not looked at. A prompt-dependent profile is tried with its mean latent. Raises BackendError,
    ModelLoadError.
    """
    vectors = pack.decode(learnt.latents.mean(0) * encoder.scale)
    if vectors.is_zero:
        return Checked(encoder, 0.0)
    nll = alike = None
    with closing(open_backend(base, replace(runtime or RuntimeConfig(), n_ctx=CONTEXT))) as backend:
        own = pack.base_sample or sample_base(backend)
        factor = 1.0
        if config.collision_limit:
            factor, alike = varied_factor(backend, vectors, own, limit=config.collision_limit)
        if config.nll_limit:
            weaker = vectors.scaled(factor)
            fluent, nll = fluent_factor(backend, weaker, limit=config.nll_limit, base_nll=own.nll, tell=tell)
            factor *= fluent
    encoder = replace(encoder, scale=encoder.scale * factor)
    return Checked(encoder, pack.mean_kl(learnt.latents * encoder.scale), nll, alike)


def preference_accuracy(encoder: PreferenceEncoder, feedback: LatentFeedback) -> dict[str, float]:
    """Share of pairs in which p(z|x) gives the chosen answer's latent the higher log-ratio to the prior."""
    mean = np.broadcast_to(encoder.mean, feedback.chosen.shape)
    if encoder.depends_on_prompt:
        mean = mean + feedback.pair_features @ encoder.head_in.T @ encoder.head_out.T
    margin = (mean * (feedback.chosen - feedback.rejected)).sum(1)
    n = len(margin)
    correct = float((margin > 0).sum() + 0.5 * (margin == 0).sum())
    low, high = wilson(correct, n)
    return {"accuracy": correct / n, "ci_low": low, "ci_high": high, "n": n}
