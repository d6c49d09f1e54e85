"""Answers sampled in PyTorch, a batch at a time, each row with vectors of its own; prompts unsteered (contract 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from edge_align.config import SamplingConfig
from edge_align.runtime.positions import PositionSums
from edge_align.runtime.torch_ref import LlamaReference
from edge_align.runtime.torch_rows import draw, KVCache


def sample(
    model: LlamaReference,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    eos: Sequence[int],
    vectors: np.ndarray | None = None,
    batch: int = 64,
    on_done: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """One answer per prompt (token ids, `eos` kept when reached), in the order given.

    vectors: (n_layer, d_model) for all rows or (n_rows, n_layer, d_model) with a row for each.
    """
    return sample_and_read(
        model, prompts, layers=(), sampling=sampling, eos=eos, vectors=vectors, batch=batch, on_done=on_done
    )[0]


@torch.inference_mode()
def sample_and_read(
    model: LlamaReference,
    prompts: Sequence[Sequence[int]],
    *,
    layers: Sequence[int],
    sampling: SamplingConfig,
    eos: Sequence[int],
    vectors: np.ndarray | None = None,
    batch: int = 64,
    on_done: Callable[[int], None] | None = None,
    positions: PositionSums | None = None,
) -> tuple[list[list[int]], np.ndarray]:
    """As `sample`, and what `mean_hidden` would read of every answer, at no further pass: (n, len(layers), d_model)
    float32, and by position. An answer that `max_tokens` cuts counts without its last token, never passed through.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    means = np.zeros((len(prompts), len(layers), model.shape.d_model), np.float32)
    rng = torch.Generator(model.device).manual_seed(sampling.seed)
    done = 0
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        steering = None
        if vectors is not None:
            chosen = vectors[rows] if vectors.ndim == 3 else vectors[None]
            steering = torch.from_numpy(np.ascontiguousarray(chosen)).to(model.device)
        each = [prompts[i] for i in rows]
        made, read = _sample_batch(model, each, sampling, set(eos), steering, layers, rng, positions)
        means[rows] = read.cpu().numpy()
        for i, answer in zip(rows, made, strict=True):
            answers[i] = answer
        done += len(rows)
        if on_done is not None:
            on_done(done)
    return answers, means


def _prefill(model: LlamaReference, prompts: Sequence[Sequence[int]], room: int) -> KVCache:
    """A cache of all but the last token of every prompt, unsteered; equal prompts are passed through once."""
    distinct = sorted({tuple(prompt) for prompt in prompts})
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(distinct), longest - 1, dtype=torch.long)
    for row, prompt in zip(tokens, distinct, strict=True):
        row[: len(prompt) - 1] = torch.tensor(prompt[:-1], dtype=torch.long)
    tokens = tokens.to(model.device)
    s = model.shape
    cache = KVCache((model.n_layer, len(distinct), s.n_head_kv, longest + room, s.d_head), model.dtype, model.device)
    if longest > 1:
        x = model.embed(tokens)
        rotary = model.rotary(torch.arange(longest - 1, device=model.device)[None])
        for il in range(model.n_layer):
            x = model.block(il, x, rotary, None, cache)
    cache.lengths = torch.tensor([len(prompt) - 1 for prompt in distinct], device=model.device)
    cache.longest = longest - 1
    place = {prompt: i for i, prompt in enumerate(distinct)}
    cache.select(torch.tensor([place[tuple(prompt)] for prompt in prompts], device=model.device))
    return cache


def _sample_batch(
    model: LlamaReference,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    eos: set[int],
    steering: torch.Tensor | None,
    layers: Sequence[int],
    rng: torch.Generator,
    positions: PositionSums | None,
) -> tuple[list[list[int]], torch.Tensor]:
    device = model.device
    cache = _prefill(model, prompts, sampling.max_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    sums = torch.zeros(len(prompts), len(layers), model.shape.d_model, device=device)
    by_position = torch.zeros(sampling.max_tokens, len(layers), model.shape.d_model, device=device)
    counts = torch.zeros(sampling.max_tokens, len(prompts), device=device)  # 1 where a state counts
    alive = torch.arange(len(prompts), device=device)
    open_ = torch.ones(len(prompts), dtype=torch.bool, device=device)
    ends = torch.tensor(sorted(eos), device=device)
    current = torch.tensor([prompt[-1] for prompt in prompts], device=device)
    for step in range(sampling.max_tokens):
        rotary = model.rotary(cache.lengths[:, None])
        span = cache.longest + 1
        mask = (torch.arange(span, device=device)[None] <= cache.lengths[:, None])[:, None, None, :]
        x = model.embed(current[:, None])
        reading = open_[alive].float() * (step > 0)  # step 0 passes the prompt's last token
        counts[step, alive] = reading
        for il in range(model.n_layer):
            x = model.block(il, x, rotary, mask, cache)
            if steering is not None and il > 0:
                rows = steering if steering.shape[0] == 1 else steering[alive]
                x = x + rows[:, il, None, :].to(x.dtype)
            for at in (at for at, layer in enumerate(layers) if layer == il):
                here = x[:, 0].float() * reading[:, None]
                sums[alive, at] += here
                by_position[step, at] = here.sum(0)
        cache.lengths, cache.longest = cache.lengths + 1, cache.longest + 1
        current = draw(model.head(x[:, 0]).float(), sampling, rng)
        was_open = open_[alive]
        open_[alive[torch.isin(current, ends)]] = False
        left = open_[alive]
        drawn = torch.stack([alive, current, was_open, left]).tolist()  # one wait for the device
        for i, token, counted in zip(*drawn[:3], strict=True):
            if counted:
                answers[i].append(token)
        remain = sum(drawn[3])
        if not remain:
            break
        if remain <= 0.8 * len(drawn[3]):  # copying the cache costs more than a few idle rows
            alive, current = alive[left], current[left]
            cache.select(torch.nonzero(left)[:, 0])
    if positions is not None:
        positions.merge(by_position[1:].cpu().numpy(), counts[1:].sum(1).long().cpu().numpy())
    return answers, sums / counts.sum(0).clamp(min=1)[:, None, None]
