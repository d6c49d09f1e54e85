"""What a decoder computes, and its weights under one set of names, in Hugging Face's layout.

Names: `embed`, `norm`, `head` (absent when tied to `embed`), and per block `N.` + `attn_norm`, `q`, `k`, `v`, `o`,
`q_norm`, `k_norm`, `ffn_norm`, `gate`, `up`, `down`, `attn_post_norm`, `ffn_post_norm`; biases end in `.bias`. Matrices
are (rows out, columns in); the weight of an RMS norm is what the normed state is multiplied by (Gemma's + 1 included).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_align.errors import ModelLoadError
from edge_align.files import shown

INTERLEAVED = ("llama", "smollm3", "granite")  # in GGUF, pairs of a rotation lie side by side in rows of q and k
PERIODS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6}  # every so many blocks one looks at everything
TIED = ("smollm3", "gemma", "gemma2", "gemma3_text")  # the head is the embedding where config.json does not say
NO_ROPE_PERIOD = 4  # SmolLM3: every so many blocks one has no rotary embedding
MAX_POSITIONS = 32_768  # of the rotary tables; longer contexts are capped
HF_TYPES = ("llama", "mistral", "smollm3", "granite", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
GGUF_TYPES = ("llama", "smollm3", "granite", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """What a decoder computes, beyond its weights. `windows` and `frequencies` have an entry per block."""

    architecture: str
    n_layer: int
    d_model: int
    n_head: int
    n_head_kv: int
    d_head: int
    d_ff: int
    n_vocab: int
    n_ctx: int  # trained context, capped at MAX_POSITIONS
    rms_eps: float
    attention_scale: float
    frequencies: tuple[tuple[float, ...], ...]  # rotary: radians per position, d_head / 2 of them
    windows: tuple[int, ...]  # tokens a block looks back; 0: all
    activation: str = "silu"  # or "gelu" (the tanh form)
    attention_cap: float = 0.0  # scores become cap * tanh(score / cap); 0: they stay
    logit_cap: float = 0.0  # logits, likewise
    embed_scale: float = 1.0
    branch_scale: float = 1.0  # of what attention and feed-forward add to the residual stream (Granite)
    logit_scale: float = 1.0  # likewise; both are in the weights that a checkpoint gives

    def in_weight(self, name: str) -> float:
        """What a weight, or its bias, is multiplied by, so that the graph needs no nodes for it."""
        part = name.removesuffix(".bias").rsplit(".", 1)[-1]
        return {"o": self.branch_scale, "down": self.branch_scale, "norm": self.logit_scale}.get(part, 1.0)


@dataclass(frozen=True)
class Checkpoint:
    """A spec and its weights, read one at a time. `base_hash` identifies the source in packs and profiles."""

    id: str
    spec: DecoderSpec
    names: frozenset[str]
    base_hash: str
    tokenizer_source: Path  # the GGUF, or the folder
    bits: float  # of a weight in the source: mean over a GGUF's blocks, 16 (which may be 32) for a folder
    _read: Callable[[str], np.ndarray]

    def read(self, name: str) -> np.ndarray:
        """One weight, float32. Raises ModelLoadError when it is missing or not finite."""
        if name not in self.names:
            raise ModelLoadError(f"{shown(self.tokenizer_source)} has no weight for {name}")
        array = self._read(name)
        if (factor := self.spec.in_weight(name)) != 1.0:
            array = array * np.float32(factor)
        if not np.isfinite(array).all():
            raise ModelLoadError(f"{shown(self.tokenizer_source)}: the weight {name} holds NaN or infinity")
        return array


def some_of(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
