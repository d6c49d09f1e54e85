"""Tiny random Hugging Face checkpoints, one per architecture.

python tests/reference/tiny_checkpoints.py KIND FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KINDS = ("llama", "mistral", "smollm3", "granite", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
SIZES: dict[str, Any] = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 256,
}
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {
        "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"sliding_window": 8},
    "smollm3": {"rope_theta": 5e4},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.3,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.2,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True, "rope_theta": 1e6},
    "gemma": {"head_dim": 32},
    "gemma2": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 24,
        "rope_theta": 1e6,
    },
}
CONTROL = ("<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}<|im_start|>assistant "
)


def make_checkpoint(kind: str, folder: Path, *, seed: int = 0, **settings: Any) -> Path:
    """Write config (`settings` over the kind's own), weights (biases and norms random too) and a tokenizer of bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **SIZES | EXTRA[kind] | settings)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * (0.3 if "norm" in name else 0.5))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "chat_template": TEMPLATE})
    )
    return folder


def as_transformers_5(folder: Path) -> None:
    """Rewrite the rotary settings of config.json the way transformers 5 spells them (tried with 5.24.0)."""
    config = json.loads((folder / "config.json").read_text())
    if "rope_parameters" in config:  # it runs
        return
    main = {"rope_theta": config.pop("rope_theta")} | (config.pop("rope_scaling", None) or {"rope_type": "default"})
    if "rope_local_base_freq" in config:
        local = {"rope_theta": config.pop("rope_local_base_freq"), "rope_type": "default"}
        config["rope_parameters"] = {"full_attention": main, "sliding_attention": local}
    else:
        config["rope_parameters"] = main
    (folder / "config.json").write_text(json.dumps(config))


def byte_tokenizer() -> dict[str, Any]:
    """A tokenizer.json in which token i is byte i, in GPT-2's spelling of bytes; then the control tokens."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    spelling = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": 256 + i, "content": text, **flags} for i, text in enumerate(CONTROL)],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {spelling[byte]: byte for byte in range(256)}, "merges": []},
    }


if __name__ == "__main__":
    make_checkpoint(sys.argv[1], Path(sys.argv[2]))
