"""A Hugging Face folder of the Llama family, SmolLM3, Granite, Qwen2 or Qwen3 as a GGUF in floating point.

The `gguf` package has the names of tensors and the writer, but no converter, and no well-kept package has one; so these
are converted here. GGUF's Llama, SmolLM3 and Granite have the rows of q and k in the order of ggml's interleaved rotary
embedding (pairs 2i, 2i + 1), Hugging Face's in that of rotated halves (i, i + d/2); Qwen keeps halves in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edge_align.errors import CorruptArtefact, InputError
from edge_align.files import shown
from edge_align_export.decoder_spec import INTERLEAVED, NO_ROPE_PERIOD, TIED
from edge_align_export.hf_folder import HFFolder, LISTED, OTHER_CONVERTER
from edge_align_export.hf_tokenizer import Vocabulary
from edge_align_export.rope import Rope, rope_of, SCALINGS

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "SmolLM3ForCausalLM": "smollm3",
    "GraniteForCausalLM": "granite",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Classes of `config.json` that are converted -> `general.architecture`."""

FLOATS = ("F32", "F16", "BF16")
F16_LIMIT = 65504.0


def check_convertible(folder: HFFolder) -> str:
    """`general.architecture` of the GGUF to be. Raises InputError (not converted here), CorruptArtefact (weights)."""
    architecture = ARCHITECTURES.get(folder.architecture)
    if architecture is None:
        raise InputError(
            f"{ascii(folder.architecture)[:60]} is not converted here, only {', '.join(ARCHITECTURES)}; "
            f"{OTHER_CONVERTER}"
        )
    rope = rope_of(folder.config)
    uses_window = folder.config.get("sliding_window") and folder.config.get(
        "use_sliding_window", architecture == "llama"
    )
    rotated = [(il + 1) % NO_ROPE_PERIOD != 0 for il in range(folder.size("num_hidden_layers"))]
    for name, value, usual in (
        ("no_rope_layers", folder.config.get("no_rope_layers") if architecture == "smollm3" else None, (None, rotated)),
        ("hidden_act", folder.config.get("hidden_act", "silu"), ("silu",)),
        ("rope scaling", rope.scaling, SCALINGS),
        ("sliding_window", folder.config.get("sliding_window") if uses_window else None, (None,)),
    ):
        if value not in usual:
            raise InputError(f"{shown(folder.path)} has {name} {ascii(value)}, not converted here; {OTHER_CONVERTER}")
    rope.divisors(_d_head(folder))  # or say what is wrong with its numbers
    expected = _expected(folder, architecture)
    wrong = [f"{name} is missing" for name in expected if name not in folder.shapes]
    wrong += [f"{name} is unknown" for name in folder.shapes if name not in expected and not _ignored(folder, name)]
    wrong += [
        f"{name} has shape {folder.shapes[name]}, expected {shape}"
        for name, shape in expected.items()
        if folder.shapes.get(name, shape) != shape
    ]
    if wrong:
        more = [f"and {len(wrong) - LISTED} more"] if len(wrong) > LISTED else []
        raise CorruptArtefact(f"the weights in {shown(folder.path)}: {'; '.join(wrong[:LISTED] + more)}")
    return architecture


def convert(folder: HFFolder, path: Path, *, float_type: str = "F16", tell: Callable[[float], None]) -> None:
    """Write a GGUF with matrices as `float_type` and the rest as F32. Not atomic: give a temporary path.

    Raises InputError, CorruptArtefact (NaN, numbers too large for F16), BackendUnavailable.
    """
    from gguf import get_tensor_name_map, GGMLQuantizationType, GGUFWriter, LlamaFileType, MODEL_ARCH, MODEL_ARCH_NAMES
    from gguf.quants import quantize

    architecture = check_convertible(folder)
    vocabulary = Vocabulary(folder)
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(MODEL_ARCH(arch), folder.size("num_hidden_layers"))
    writer = GGUFWriter(path, architecture)
    rope = rope_of(folder.config)
    _settings(writer, folder, rope)
    writer.add_file_type(LlamaFileType.ALL_F32 if float_type == "F32" else LlamaFileType[f"MOSTLY_{float_type}"])
    vocabulary.write(writer)
    expected = _expected(folder, architecture)
    kinds = {name: GGMLQuantizationType[float_type if len(shape) == 2 else "F32"] for name, shape in expected.items()}
    factors = rope.divisors(_d_head(folder)).astype(np.float32) if rope.scaling == "llama3" else None
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name, shape in expected.items():
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        stored = quantize(np.zeros((1, shape[-1]), np.float32), kinds[name])
        rows = math.prod(shape[:-1])
        byte_shape = (*shape[:-1], stored.shape[-1]) if stored.dtype == np.uint8 else shape
        writer.add_tensor_info(str(known), byte_shape, stored.dtype, rows * stored.nbytes, raw_dtype=kinds[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for done, (name, array) in enumerate(folder.read(list(expected)), 1):
            if architecture in INTERLEAVED and name.endswith(("q_proj.weight", "k_proj.weight")):
                array = interleave(array, _n_head(folder, name))
            if float_type == "F16" and array.ndim == 2 and np.abs(array).max(initial=0.0) > F16_LIMIT:
                raise CorruptArtefact(
                    f"{name} in {shown(folder.path)} has numbers too large for F16; take --quant BF16"
                )
            writer.write_tensor_data(quantize(array, kinds[name]))
            tell(done / len(expected))
    finally:
        writer.close()


def interleave(array: np.ndarray, n_head: int) -> np.ndarray:
    """Rows of a projection (n_head * d_head, n): row i and row i + d_head / 2 of a head become neighbours."""
    halves = array.reshape(n_head, 2, array.shape[0] // n_head // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


def _n_head(folder: HFFolder, name: str) -> int:
    n_head = folder.size("num_attention_heads")
    return folder.size("num_key_value_heads", n_head) if "k_proj" in name else n_head


def _d_head(folder: HFFolder) -> int:
    return folder.size("head_dim", folder.size("hidden_size") // folder.size("num_attention_heads"))


def _ignored(folder: HFFolder, name: str) -> bool:
    """Weights that say nothing: old checkpoints' rotary frequencies, and the head of a model whose head is tied."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and _is_tied(folder))


def _is_tied(folder: HFFolder) -> bool:
    return bool(folder.config.get("tie_word_embeddings", ARCHITECTURES.get(folder.architecture) in TIED))


def _expected(folder: HFFolder, architecture: str) -> dict[str, tuple[int, ...]]:
    """Every weight that the settings ask for, in the order of writing, with its shape."""
    width, inner, vocab = (folder.size(name) for name in ("hidden_size", "intermediate_size", "vocab_size"))
    q, kv = (_n_head(folder, name) * _d_head(folder) for name in ("q_proj", "k_proj"))
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(folder.size("num_hidden_layers")):
        block = {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
        attention = {"q_proj": (q, width), "k_proj": (kv, width), "v_proj": (kv, width), "o_proj": (width, q)}
        shapes: dict[str, tuple[int, ...]] = {**block}
        for name, shape in attention.items():
            shapes[f"self_attn.{name}.weight"] = shape
            if architecture == "qwen2" and name != "o_proj":
                shapes[f"self_attn.{name}.bias"] = shape[:1]
        if architecture == "qwen3":
            shapes |= {f"self_attn.{name}.weight": (_d_head(folder),) for name in ("q_norm", "k_norm")}
        shapes |= {f"mlp.{name}.weight": (inner, width) for name in ("gate_proj", "up_proj")}
        shapes["mlp.down_proj.weight"] = (width, inner)
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
    found["model.norm.weight"] = (width,)
    if not _is_tied(folder):
        found["lm_head.weight"] = (vocab, width)
    return found


def _settings(writer: Any, folder: HFFolder, rope: Rope) -> None:
    n_head, d_head = folder.size("num_attention_heads"), _d_head(folder)
    writer.add_name(folder.path.resolve().name)
    writer.add_block_count(folder.size("num_hidden_layers"))
    writer.add_context_length(folder.size("max_position_embeddings", 2048))
    writer.add_embedding_length(folder.size("hidden_size"))
    writer.add_feed_forward_length(folder.size("intermediate_size"))
    writer.add_head_count(n_head)
    writer.add_head_count_kv(_n_head(folder, "k_proj"))
    writer.add_layer_norm_rms_eps(float(folder.config.get("rms_norm_eps", 1e-6)))
    writer.add_vocab_size(folder.size("vocab_size"))
    writer.add_rope_dimension_count(d_head)
    writer.add_rope_freq_base(rope.base)
    if d_head * n_head != folder.size("hidden_size"):
        writer.add_key_length(d_head)
        writer.add_value_length(d_head)
    if folder.architecture == "GraniteForCausalLM":
        writer.add_embedding_scale(folder.number("embedding_multiplier", 1.0))
        writer.add_attention_scale(folder.number("attention_multiplier", 1.0))
        writer.add_residual_scale(folder.number("residual_multiplier", 1.0))
        writer.add_logit_scale(folder.number("logits_scaling", 1.0))
    if rope.scaling == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.number("factor"))
