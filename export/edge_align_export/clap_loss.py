"""What CLaP minimises: reconstruction, contrast over swapped latents, KL of the aggregated posterior.

The three losses of CLaP (arXiv 2412.20834) with the language model frozen and additive steering for its
adapter: z reaches the model as vectors that are added to the outputs of some blocks, decode-only (contract 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from edge_align.runtime.torch_ref import LlamaReference
from edge_align_export.hooked import HookedModel

KL_DRAWS = 16  # of each posterior, for the Monte-Carlo estimate


@dataclass(frozen=True)
class Batch:
    """Answers of several prompts, N to each, rows of one prompt in a row.

    tokens (B, T) int64, right-padded; first (B,) index of the first answer token; length (B,) of prompt and answer;
    features (B, n_feature) float32 of the answers; n: answers per prompt.
    """

    tokens: torch.Tensor
    first: torch.Tensor
    length: torch.Tensor
    features: torch.Tensor
    n: int


def make_batch(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], features: torch.Tensor, *, n: int
) -> Batch:
    """On the device of `features`; answers with their end-of-text token where they ended."""
    device = features.device
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    tokens = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    return Batch(
        tokens=tokens.to(device),
        first=torch.tensor([len(prompt) for prompt in prompts], device=device),
        length=torch.tensor([len(text) for text in texts], device=device),
        features=features,
        n=n,
    )


class Frozen(Protocol):
    """Answers under the frozen base."""

    @property
    def n_tokens(self) -> torch.Tensor:
        """(B,) answer tokens of each row."""
        ...

    def nll(self, vectors: torch.Tensor | None) -> torch.Tensor:
        """(B,) nats, summed over each answer; vectors (B, len(layers), d_model), or None for the base."""
        ...


def freeze(model: LlamaReference | HookedModel, batch: Batch, layers: range) -> Frozen:
    """The answers of a batch, to be steered in `layers`, decode-only (contract 2)."""
    if isinstance(model, LlamaReference):
        return FrozenDecoder(model, batch, layers)
    return HookedDecoder(model, batch, layers)


def said_and_steered(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) bool each: the positions that predict an answer token, and all that are steered."""
    at = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)[None]
    steered = at >= batch.first[:, None] - 1
    return steered & (at < batch.length[:, None] - 1), steered


def summed_nll(logits: torch.Tensor, batch: Batch, said: torch.Tensor) -> torch.Tensor:
    """(B,) from the logits (n, n_vocab) at the n positions where said (B, T) is True, row by row."""
    rows = torch.nonzero(said)
    each = F.cross_entropy(logits.float(), batch.tokens[rows[:, 0], rows[:, 1] + 1], reduction="none")
    return torch.zeros(len(said), device=each.device).index_add(0, rows[:, 0], each)


class FrozenDecoder:
    """On our own PyTorch reference; what comes before the steered blocks is computed once a batch."""

    def __init__(self, model: LlamaReference, batch: Batch, layers: range) -> None:
        self._model, self._batch, self._layers = model, batch, layers
        self.n_tokens = batch.length - batch.first
        self._said, steered = said_and_steered(batch)
        self._steered = steered[..., None].to(model.dtype)
        with torch.no_grad():
            self._rotary = model.rotary(torch.arange(batch.tokens.shape[1], device=batch.tokens.device)[None])
            x = model.embed(batch.tokens)
            for il in range(layers.start):
                x = model.block(il, x, self._rotary, None)
        self._below = x

    def nll(self, vectors: torch.Tensor | None) -> torch.Tensor:
        """As `Frozen.nll`."""
        x = self._below
        for il in range(self._layers.start, self._model.n_layer):
            x = self._model.block(il, x, self._rotary, None)
            if vectors is not None and il in self._layers:
                x = x + self._steered * vectors[:, il - self._layers.start, None].to(x.dtype)
        return summed_nll(self._model.head(x[self._said]), self._batch, self._said)


class HookedDecoder:
    """On a model of transformers, all of it every time."""

    def __init__(self, model: HookedModel, batch: Batch, layers: range) -> None:
        self._model, self._batch, self._layers = model, batch, layers
        self.n_tokens = batch.length - batch.first
        self._said, self._steered = said_and_steered(batch)
        self._first = int(batch.first.min()) - 1

    def nll(self, vectors: torch.Tensor | None) -> torch.Tensor:
        """As `Frozen.nll`."""
        logits = self._model.logits(
            self._batch.tokens, first=self._first, vectors=vectors, layers=self._layers, steered=self._steered
        )
        return summed_nll(logits[self._said[:, self._first :]], self._batch, self._said)


class Clap(torch.nn.Module):
    """Posterior encoder and adapter: z ~ N(R f, diag s^2) of centred features f, vectors = z W.

    decoder (k, len(layers), d_model) in units of `decoder_scale` (len(layers), d_model); readout (n_feature, k) in
    units of 1 / feature_scale; log_variance (k,). prior_variance (k,): N(0, diag) is the prior, which keeps the
    latents' scale.
    """

    prior_variance: torch.Tensor
    decoder_scale: torch.Tensor
    feature_scale: torch.Tensor

    def __init__(
        self,
        *,
        decoder: torch.Tensor,
        readout: torch.Tensor,
        variance: torch.Tensor,
        prior_variance: torch.Tensor,
        decoder_scale: torch.Tensor,
        feature_scale: torch.Tensor,
    ) -> None:
        super().__init__()
        self.register_buffer("prior_variance", prior_variance)
        self.register_buffer("decoder_scale", decoder_scale)
        self.register_buffer("feature_scale", feature_scale)
        self.decoder = torch.nn.Parameter(decoder / decoder_scale)
        self.readout = torch.nn.Parameter(readout * feature_scale[:, None])
        self.log_variance = torch.nn.Parameter(variance.log())

    def mean(self, features: torch.Tensor, n: int) -> torch.Tensor:
        """(B, n_feature), n rows to each prompt -> posterior means (B / n, n, k), centred within the prompt."""
        grouped = (features / self.feature_scale).view(-1, n, features.shape[1])
        return (grouped - grouped.mean(1, keepdim=True)) @ self.readout

    def vectors(self, z: torch.Tensor) -> torch.Tensor:
        """(..., k) -> (B, len(layers), d_model)."""
        return torch.einsum("bk,kld->bld", z.flatten(0, -2), self.decoder * self.decoder_scale)

    def forward(
        self, frozen: Frozen, batch: Batch, rng: torch.Generator, *, contrast: float, spread_kl: float
    ) -> dict[str, torch.Tensor]:
        """`loss`, and its parts in nats per answer: reconstruction, contrast (one swap), kl (summed over latents)."""
        mean = self.mean(batch.features, batch.n)
        noise = torch.randn(mean.shape, generator=rng, device=mean.device)
        z = mean + (0.5 * self.log_variance).exp() * noise
        own = frozen.nll(self.vectors(z))
        parts = {"reconstruction": own.mean()}
        if contrast:
            shift = int(torch.randint(1, batch.n, (), generator=rng, device=mean.device))
            parts["contrast"] = F.softplus(own - frozen.nll(self.vectors(z.roll(shift, 1)))).mean()
        if spread_kl:
            parts["kl"] = aggregated_kl(mean, self.log_variance.exp(), self.prior_variance, rng)
        weight = {"reconstruction": 1.0, "contrast": contrast, "kl": spread_kl}
        loss = torch.stack([weight[name] * part for name, part in parts.items()]).sum()
        return {"loss": loss, "tokens": frozen.n_tokens.sum(), **{name: part.detach() for name, part in parts.items()}}


def aggregated_kl(
    mean: torch.Tensor, variance: torch.Tensor, prior_variance: torch.Tensor, rng: torch.Generator
) -> torch.Tensor:
    """KL of the mixture of one prompt's posteriors to N(0, diag prior_variance), per latent, summed; mean over prompts.

    mean (G, N, k), variance (k,). Unlike the KL of each posterior it lets them stay apart (the paper's remedy for
    posterior collapse). Monte Carlo, KL_DRAWS draws of every posterior.
    """
    noise = torch.randn((KL_DRAWS, *mean.shape), generator=rng, device=mean.device)
    z = mean + variance.sqrt() * noise  # (S, G, N, k)
    each = _log_normal(z[:, :, :, None] - mean[None, :, None], variance)  # (S, G, N, N, k)
    mixture = each.logsumexp(3) - math.log(mean.shape[1])
    return (mixture - _log_normal(z, prior_variance)).mean((0, 2)).sum(-1).mean()


def mutual_information(mean: torch.Tensor, variance: torch.Tensor, rng: torch.Generator) -> float:
    """Nats that one draw of z tells about which of a prompt's N answers it is of; at most log N. mean (G, N, k)."""
    z = mean + variance.sqrt() * torch.randn(mean.shape, generator=rng, device=mean.device)
    each = _log_normal(z[:, :, None] - mean[:, None], variance).sum(-1)  # (G, N of z, N of posterior)
    own = each.diagonal(dim1=1, dim2=2)
    return float((own - each.logsumexp(2) + math.log(mean.shape[1])).mean())


def _log_normal(x: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    return -0.5 * (x.square() / variance + variance.log() + math.log(2 * math.pi))
