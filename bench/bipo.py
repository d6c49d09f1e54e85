"""Steering vectors trained through the frozen base on one person's pairs: BiPO (arXiv 2406.00045).

The paper trains one vector after one block. Here several blocks have one each, from the last prompt token on, as the
engines apply them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import progress
from lora_dpo import device_name, Rows, shuffled, stored_bytes, Training, waited

from edge_align.runtime.torch_ref import LlamaReference
from edge_align_export.clap_loss import FrozenDecoder, make_batch

MAX_TOKENS = 512  # of an answer


@dataclass(frozen=True)
class Bipo(Training):
    """Settings of a training; AdamW without weight decay, as the paper's code runs. The blocks: first and last."""

    learning_rate: float = 1e-2
    blocks: tuple[int, int] = (8, 21)

    def layers(self, n_layer: int) -> range:
        """Those of `blocks` that a base has."""
        first, last = self.blocks
        return range(first, min(last + 1, n_layer))


def train(
    model: LlamaReference, pairs: Sequence[Rows], settings: Bipo, *, seed: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(seconds and losses, "vectors": (n_layer, d_model) float32, zero outside the blocks that are steered).

    Deterministic by seed; the learning rate falls as a cosine.
    """
    start, losses = waited(model.device), []
    layers = settings.layers(model.n_layer)
    rng = np.random.default_rng(seed)
    vectors = torch.zeros(len(layers), model.shape.d_model, device=model.device, requires_grad=True)
    optimiser = torch.optim.AdamW([vectors], lr=settings.learning_rate, weight_decay=0.0)
    plan = shuffled(len(pairs), epochs=settings.epochs, batch=settings.batch, rng=rng)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, len(plan))
    untouched = torch.full((len(pairs), 2), torch.nan, device=model.device)  # NLL under the base
    with progress("BiPO", len(plan)) as tell:
        for step, part in enumerate(plan):
            rows = [row for i in part for row in pairs[i]]
            answers = [answer[:MAX_TOKENS] for _, answer in rows]
            batch = make_batch([p for p, _ in rows], answers, torch.empty(0, device=model.device), n=2)
            frozen = FrozenDecoder(model, batch, layers)
            if untouched[part].isnan().any():
                with torch.no_grad():
                    untouched[part] = frozen.nll(None).view(-1, 2)
            sign = float(rng.choice((-1.0, 1.0)))
            moved = frozen.nll((sign * vectors).expand(len(rows), -1, -1)).view(-1, 2)
            gain = untouched[part] - moved  # log-ratio of chosen and rejected
            loss = -F.logsigmoid(sign * settings.beta * (gain[:, 0] - gain[:, 1])).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
            tell(step + 1)
    found = torch.zeros(model.n_layer, model.shape.d_model)
    found[list(layers)] = vectors.detach().cpu()
    return {
        "seconds": waited(model.device) - start,
        "steps": len(plan),
        "device": device_name(model.device),
        "first_loss": losses[0],
        "last_loss": float(np.mean(losses[-5:])),
        "stored_bytes": stored_bytes({"vectors": found[list(layers)]}),
    }, {"vectors": found}
