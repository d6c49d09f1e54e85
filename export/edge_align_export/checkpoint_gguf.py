"""A GGUF as a checkpoint: names, sizes and the settings that llama.cpp knows by a file's architecture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from edge_align.errors import BackendUnavailable, ModelLoadError
from edge_align.files import sha256_file, shown
from edge_align.gguf_header import GGUFHeader
from edge_align.gguf_tensors import GGUFTensors
from edge_align_export.decoder_spec import (
    Checkpoint,
    DecoderSpec,
    GGUF_TYPES,
    HF_TYPES,
    INTERLEAVED,
    MAX_POSITIONS,
    NO_ROPE_PERIOD,
    PERIODS,
    some_of,
)
from edge_align_export.rope import BASE, rotary_frequencies

_GGUF_NAMES = {
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "attn_post_norm": "post_attention_norm",
    "ffn_norm": "ffn_norm",
    "ffn_post_norm": "post_ffw_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
_GGUF_TOP = {"embed": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}


def open_gguf(path: Path) -> Checkpoint:
    tensors = GGUFTensors(path)
    spec = _gguf_spec(tensors.header, tensors)
    found = _GGUF_TOP | {
        f"{il}.{ours}{ending}": f"blk.{il}.{theirs}{gguf_ending}"
        for il in range(spec.n_layer)
        for ours, theirs in _GGUF_NAMES.items()
        for ending, gguf_ending in (("", ".weight"), (".bias", ".bias"))
    }
    found = {ours: theirs for ours, theirs in found.items() if theirs in tensors.header.tensors}
    unknown = tensors.header.tensors.keys() - {*found.values(), "rope_freqs.weight"}
    if unknown:
        raise BackendUnavailable(f"{shown(path)} has weights that the export does not know: {some_of(unknown)}")
    heads = {"q": spec.n_head, "k": spec.n_head_kv} if spec.architecture in INTERLEAVED else {}

    def read(name: str) -> np.ndarray:
        array = tensors.read(found[name])
        part = name.split(".")[1] if "." in name else ""
        return _half_rotated(array, heads[part]) if part in heads else array

    blocks = [tensor for name, tensor in tensors.header.tensors.items() if name.startswith("blk.")]
    bits = 8 * sum(tensor.n_bytes for tensor in blocks) / max(1, sum(math.prod(tensor.shape) for tensor in blocks))
    return Checkpoint(path.stem, spec, frozenset(found), sha256_file(path), path, bits, read)


def _half_rotated(array: np.ndarray, n_head: int) -> np.ndarray:
    """Undo ggml's order of q and k rows: pairs of a rotation side by side -> first halves, then second halves."""
    pairs = array.reshape(n_head, -1, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(array.shape))


def _gguf_spec(header: GGUFHeader, tensors: GGUFTensors) -> DecoderSpec:
    name = header.architecture
    if name not in GGUF_TYPES:
        raise BackendUnavailable(
            f"the architecture {name!r} cannot be exported from a GGUF ({', '.join(GGUF_TYPES)} can); "
            f"give its Hugging Face folder instead ({', '.join(HF_TYPES)})"
        )

    def value(key: str, fallback: float | None = None) -> float:
        found = header.metadata.get(f"{name}.{key}", fallback)
        if not isinstance(found, int | float):
            raise ModelLoadError(f"the GGUF has no usable {name}.{key}")
        return found

    scaling = header.metadata.get(f"{name}.rope.scaling.type", "none")
    if scaling not in ("none", "linear", ""):
        raise BackendUnavailable(f"the rotary scaling {scaling!r} cannot be exported from a GGUF")
    if header.metadata.get(f"{name}.expert_count"):
        raise BackendUnavailable("models with experts cannot be exported")
    n_head = int(value("attention.head_count"))
    d_head = int(value("attention.key_length", header.d_model // n_head))
    if value("rope.dimension_count", d_head) != d_head:
        raise BackendUnavailable("models that rotate only a part of each head cannot be exported")
    frequencies = rotary_frequencies(value("rope.freq_base", BASE), d_head)
    if scaling == "linear":
        frequencies = frequencies / value("rope.scaling.factor")
    if "rope_freqs.weight" in header.tensors:  # Llama 3's scaling, already worked out
        frequencies = frequencies / tensors.read("rope_freqs.weight")
    local = rotary_frequencies(value("rope.freq_base_swa", BASE), d_head) if name == "gemma3" else frequencies
    window, period = int(value("attention.sliding_window", 0)) if name in PERIODS else 0, PERIODS.get(name, 1)
    if window and value("attention.sliding_window_pattern", period) != period:
        raise BackendUnavailable(
            f"{name} models with windows not in {period - 1} of {period} blocks cannot be exported"
        )
    windows = tuple(window if (il + 1) % period else 0 for il in range(header.n_layer))
    per_block = [local if window else frequencies for window in windows]
    if name == "smollm3":
        per_block = [one if (il + 1) % NO_ROPE_PERIOD else 0 * one for il, one in enumerate(per_block)]
    # llama.cpp knows the 27B models by their number of blocks; they alone scale attention otherwise
    largest = (name, header.n_layer) in (("gemma2", 46), ("gemma3", 62))
    gemma = name.startswith("gemma")
    scale = (header.d_model // n_head if largest else d_head) ** -0.5
    scales = {"attention_scale": scale, "embed_scale": math.sqrt(header.d_model) if gemma else 1.0}
    if name == "granite":
        scales = {
            "attention_scale": value("attention.scale", scale),
            "embed_scale": value("embedding_scale", 1.0),
            "branch_scale": value("residual_scale", 1.0),
            "logit_scale": 1 / (value("logit_scale", 1.0) or 1.0),
        }
    return DecoderSpec(
        architecture=name,
        n_layer=header.n_layer,
        d_model=header.d_model,
        n_head=n_head,
        n_head_kv=int(value("attention.head_count_kv", n_head)),
        d_head=d_head,
        d_ff=int(value("feed_forward_length")),
        n_vocab=header.tensors["token_embd.weight"].shape[1],
        n_ctx=min(int(value("context_length")), MAX_POSITIONS),
        rms_eps=value("attention.layer_norm_rms_epsilon"),
        frequencies=tuple(tuple(one.tolist()) for one in per_block),
        windows=windows,
        activation="gelu" if gemma else "silu",
        attention_cap=value("attn_logit_softcapping", 50.0) if name == "gemma2" else 0.0,
        logit_cap=value("final_logit_softcapping", 30.0 if name == "gemma2" else 0.0),
        **scales,
    )
