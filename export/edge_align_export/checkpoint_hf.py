"""A Hugging Face folder as a checkpoint: names, sizes and settings of its config.json, weights of its safetensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from edge_align.errors import BackendUnavailable, InputError, ModelLoadError
from edge_align.files import sha256_bytes, sha256_file, shown
from edge_align_export.decoder_spec import (
    Checkpoint,
    DecoderSpec,
    HF_TYPES,
    MAX_POSITIONS,
    NO_ROPE_PERIOD,
    PERIODS,
    some_of,
    TIED,
)
from edge_align_export.rope import BASE, rope_of, SCALINGS, SLIDING

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


def open_folder(folder: Path) -> Checkpoint:
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
    if config.get("tie_word_embeddings", spec.architecture in TIED):
        found.pop("head", None)
    elif "head" not in found:
        raise ModelLoadError(f"{shown(folder)} has no weight for head ({_HF_TOP['head']})")
    unknown = {name for name in where.keys() - {*found.values(), _HF_TOP["head"]} if "rotary_emb" not in name}
    if unknown:
        raise BackendUnavailable(f"{shown(folder)} has weights that the export does not know: {some_of(unknown)}")

    def read(name: str) -> np.ndarray:
        array = _read_safetensors(where[found[name]], found[name])
        return array + 1.0 if gemma and "norm" in name else array

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
        interval = int(value("no_rope_layer_interval", NO_ROPE_PERIOD)) or NO_ROPE_PERIOD
        turned = config.get("no_rope_layers") or [(il + 1) % interval for il in range(n_layer)]
        if not isinstance(turned, list) or len(turned) != n_layer:
            raise ModelLoadError("config.json has no usable no_rope_layers")
        per_block = [one if turns else 0 * one for one, turns in zip(per_block, turned, strict=True)]
    scale = float(value("query_pre_attn_scalar", d_head) if name in PERIODS else d_head) ** -0.5
    scales = {"attention_scale": scale, "embed_scale": math.sqrt(d_model) if gemma else 1.0}
    if name == "granite":
        scales = {
            "attention_scale": float(value("attention_multiplier", 1.0)),
            "embed_scale": float(value("embedding_multiplier", 1.0)),
            "branch_scale": float(value("residual_multiplier", 1.0)),
            "logit_scale": 1 / (value("logits_scaling", 1.0) or 1.0),
        }
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
        frequencies=tuple(tuple(one.tolist()) for one in per_block),
        windows=windows,
        activation="silu" if activation == "silu" else "gelu",
        attention_cap=float(value("attn_logit_softcapping", 0.0)),
        logit_cap=float(value("final_logit_softcapping", 0.0)),
        **scales,
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
