"""Decoder weights of a GGUF or a Hugging Face folder under one set of names, in Hugging Face's layout.

Names: `embed`, `norm`, `head` (absent when tied to `embed`), and per block `N.` + `attn_norm`, `q`, `k`, `v`, `o`,
`q_norm`, `k_norm`, `ffn_norm`, `gate`, `up`, `down`, `attn_post_norm`, `ffn_post_norm`; biases end in `.bias`. Matrices
are (rows out, columns in); the weight of an RMS norm is what the normed state is multiplied by (Gemma's + 1 included).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_align.errors import BackendUnavailable, InputError, ModelLoadError
from edge_align.files import sha256_bytes, sha256_file, shown
from edge_align.gguf_header import GGUFHeader
from edge_align.gguf_tensors import GGUFTensors
from edge_align_export.rope import BASE, rope_of, rotary_frequencies, SCALINGS, SLIDING

HF_TYPES = ("llama", "mistral", "smollm3", "granite", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
GGUF_TYPES = ("llama", "smollm3", "granite", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
PERIODS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6}  # every so many blocks one looks at everything
NO_ROPE_PERIOD = 4  # SmolLM3: every so many blocks one has no rotary embedding
MAX_POSITIONS = 32_768  # of the rotary tables; longer contexts are capped

ONE = np.float32(1.0)


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
        if not np.isfinite(array).all():
            raise ModelLoadError(f"{shown(self.tokenizer_source)}: the weight {name} holds NaN or infinity")
        return array


def open_checkpoint(source: Path) -> Checkpoint:
    """A GGUF file or a Hugging Face folder.

    Raises InputError (neither), ModelLoadError (damaged or incomplete), BackendUnavailable (another architecture).
    """
    if source.is_dir():
        return _open_folder(source)
    if not source.is_file():
        raise InputError(f"{shown(source)} is neither a GGUF file nor a folder with a Hugging Face checkpoint")
    return _open_gguf(source)


# -- GGUF ----------------------------------------------------------------------------------------------------------
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


def _open_gguf(path: Path) -> Checkpoint:
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
        raise BackendUnavailable(f"{shown(path)} has weights that the export does not know: {_some(unknown)}")
    paired = spec.architecture in ("llama", "smollm3", "granite")
    heads = {"q": spec.n_head, "k": spec.n_head_kv} if paired else {}
    keys = [f"{spec.architecture}.{key}" for key in ("residual_scale", "logit_scale")]
    factors = _factors(spec, *map(tensors.header.metadata.get, keys))

    def read(name: str) -> np.ndarray:
        array = tensors.read(found[name])
        part = name.split(".")[1] if "." in name else name
        return (_half_rotated(array, heads[part]) if part in heads else array) * factors.get(part, ONE)

    blocks = [tensor for name, tensor in tensors.header.tensors.items() if name.startswith("blk.")]
    bits = 8 * sum(tensor.n_bytes for tensor in blocks) / sum(math.prod(tensor.shape) for tensor in blocks)
    return Checkpoint(path.stem, spec, frozenset(found), sha256_file(path), path, bits, read)


def _factors(spec: DecoderSpec, residual: Any, logits: Any) -> dict[str, np.float32]:
    """What weights are multiplied by, so that Granite's scaled branches and logits need no nodes of their own."""
    if spec.architecture != "granite":
        return {}
    branch, out = np.float32(residual or 1.0), np.float32(1.0 / (logits or 1.0))
    return {"o": branch, "down": branch, "norm": out}


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
    scale, embed_scale = (header.d_model // n_head if largest else d_head) ** -0.5, 1.0
    if gemma:
        embed_scale = math.sqrt(header.d_model)
    elif name == "granite":
        scale, embed_scale = value("attention.scale", scale), value("embedding_scale", 1.0)
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
        attention_scale=scale,
        frequencies=tuple(tuple(one.tolist()) for one in per_block),
        windows=windows,
        activation="gelu" if gemma else "silu",
        attention_cap=value("attn_logit_softcapping", 50.0) if name == "gemma2" else 0.0,
        logit_cap=value("final_logit_softcapping", 30.0 if name == "gemma2" else 0.0),
        embed_scale=embed_scale,
    )


# -- Hugging Face --------------------------------------------------------------------------------------------------
_HF_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
}
_HF_NORMS = {"ffn_norm": "post_attention_layernorm"}
_HF_FOUR_NORMS = {
    "attn_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
_HF_TOP = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}


def _open_folder(folder: Path) -> Checkpoint:
    config = _json(folder / "config.json")
    spec = _hf_spec(config)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelLoadError(f"{shown(folder)} holds no .safetensors file; other weight formats are not read")
    where = _safetensors_index(files)
    gemma = spec.architecture.startswith("gemma")
    blocks = _HF_NAMES | (_HF_FOUR_NORMS if spec.architecture in PERIODS else _HF_NORMS)
    found = _HF_TOP | {
        f"{il}.{ours}{ending}": f"model.layers.{il}.{theirs}{hf_ending}"
        for il in range(spec.n_layer)
        for ours, theirs in blocks.items()
        for ending, hf_ending in (("", ".weight"), (".bias", ".bias"))
    }
    found = {ours: theirs for ours, theirs in found.items() if theirs in where}
    if config.get("tie_word_embeddings", gemma or spec.architecture == "smollm3"):
        found.pop("head", None)
    elif "head" not in found:
        raise ModelLoadError(f"{shown(folder)} has no weight for head ({_HF_TOP['head']})")
    unknown = {name for name in where.keys() - {*found.values(), _HF_TOP["head"]} if "rotary_emb" not in name}
    if unknown:
        raise BackendUnavailable(f"{shown(folder)} has weights that the export does not know: {_some(unknown)}")

    factors = _factors(spec, config.get("residual_multiplier"), config.get("logits_scaling"))

    def read(name: str) -> np.ndarray:
        array = _read_safetensors(where[found[name]], found[name])
        part = name.split(".")[1] if "." in name else name
        return (array + 1.0 if gemma and "norm" in name else array) * factors.get(part, ONE)

    parts = [sha256_file(path) for path in (folder / "config.json", *files)]
    digest = sha256_bytes("\n".join(parts).encode())
    return Checkpoint(folder.resolve().name, spec, frozenset(found), digest, folder, 16.0, read)


def _hf_spec(config: dict[str, Any]) -> DecoderSpec:
    name = str(config.get("model_type"))
    if name not in HF_TYPES:
        raise BackendUnavailable(f"the architecture {name!r} cannot be exported; these can: {', '.join(HF_TYPES)}")

    def value(key: str, fallback: float | None = None) -> Any:
        found = config.get(key)
        found = fallback if found is None else found
        if not isinstance(found, int | float) or isinstance(found, bool):
            raise ModelLoadError(f"config.json has no usable {key}")
        return found

    n_layer, d_model, n_head = (int(value(k)) for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    d_head = int(value("head_dim", 256 if name.startswith("gemma") else d_model // n_head))
    gemma = name.startswith("gemma")
    activation = (
        config.get("hidden_activation") or config.get("hidden_act") or ("gelu_pytorch_tanh" if gemma else "silu")
    )
    activation = "gelu_pytorch_tanh" if gemma and activation == "gelu" else activation  # as transformers does
    if activation not in ("silu", "gelu_pytorch_tanh"):
        raise BackendUnavailable(f"the activation {activation!r} cannot be exported")
    refused = ["use_bidirectional_attention", *([] if name == "gemma2" else ["attn_logit_softcapping"])]
    for key in refused:
        if config.get(key):
            raise BackendUnavailable(f"{name} models with {key} cannot be exported")
    windows = _windows(name, config, n_layer)
    rope = rope_of(config, usual=1e6 if name == "gemma3_text" else BASE)
    if rope.scaling not in SCALINGS:
        raise BackendUnavailable(f"the rotary scaling {rope.scaling!r} cannot be exported")
    local = frequencies = rope.frequencies(d_head)
    if name == "gemma3_text":
        local = rope_of(config, SLIDING).frequencies(d_head)
    per_block = [local if window else frequencies for window in windows]
    if name == "smollm3":
        interval = int(config.get("no_rope_layer_interval") or NO_ROPE_PERIOD)
        turned = config.get("no_rope_layers") or [(il + 1) % interval for il in range(n_layer)]
        per_block = [one if turns else 0 * one for one, turns in zip(per_block, turned, strict=True)]
    scale, embed_scale = float(value("query_pre_attn_scalar", d_head) if name in PERIODS else d_head) ** -0.5, 1.0
    if gemma:
        embed_scale = math.sqrt(d_model)
    elif name == "granite":
        scale, embed_scale = float(value("attention_multiplier", 1.0)), float(value("embedding_multiplier", 1.0))
    return DecoderSpec(
        architecture=name,
        n_layer=n_layer,
        d_model=d_model,
        n_head=n_head,
        n_head_kv=int(value("num_key_value_heads", n_head)),
        d_head=d_head,
        d_ff=int(value("intermediate_size")),
        n_vocab=int(value("vocab_size")),
        n_ctx=min(int(value("max_position_embeddings")), MAX_POSITIONS),
        rms_eps=float(value("rms_norm_eps")),
        attention_scale=scale,
        frequencies=tuple(tuple(one.tolist()) for one in per_block),
        windows=windows,
        activation="silu" if activation == "silu" else "gelu",
        attention_cap=float(value("attn_logit_softcapping", 0.0)),
        logit_cap=float(value("final_logit_softcapping", 0.0)),
        embed_scale=embed_scale,
    )


def _windows(name: str, config: dict[str, Any], n_layer: int) -> tuple[int, ...]:
    """How far each block looks back; 0 is everything."""
    window = config.get("sliding_window")
    if not isinstance(window, int) or window <= 0 or config.get("use_sliding_window") is False:
        return (0,) * n_layer
    if name in PERIODS:
        kinds = config.get("layer_types")
        if not isinstance(kinds, list) or len(kinds) != n_layer:
            period = int(config.get("sliding_window_pattern", PERIODS[name]))
            kinds = ["sliding_attention" if (il + 1) % period else "full_attention" for il in range(n_layer)]
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    if name == "mistral":
        return (window,) * n_layer
    raise BackendUnavailable(f"{name} models with a sliding window cannot be exported")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{shown(path.parent)} is no Hugging Face checkpoint: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{shown(path)} is not readable as JSON") from error
    if not isinstance(found, dict):
        raise ModelLoadError(f"{shown(path)} is not readable as JSON")
    return found


def _safetensors_index(files: list[Path]) -> dict[str, Path]:
    from safetensors import safe_open, SafetensorError

    where: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                where |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(
                f"{shown(path)} is damaged or truncated: {' '.join(str(error).split())[:120]}"
            ) from error
    return where


def _read_safetensors(path: Path, name: str) -> np.ndarray:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:  # torch: numpy has no bfloat16
        return np.asarray(file.get_tensor(name).float().numpy())


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
