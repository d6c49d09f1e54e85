"""Make a tiny base with random weights: as a GGUF, or as a Hugging Face folder. For tests and first tries.

    python scripts/tiny_models.py gguf qwen2 tiny.gguf       (or another of BUILDERS)
    python scripts/tiny_models.py hf qwen2 FOLDER            (or another of HF_CLASSES; needs the extra `export`)

Four blocks of width 64 (gemma3: six), a byte-level tokenizer (gemma3: SentencePiece's), under a megabyte. What such a
model says is noise, but it runs in every engine, steers, and has activations to read. llama.cpp loads plamo2 and
ignores control vectors on it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_align.simulation.prompts import prompts

WIDTH, LAYERS, HEADS, KV, INNER, CONTEXT = 64, 4, 4, 2, 128, 512
D_HEAD = WIDTH // HEADS
BLOCKS = {"gemma3": 6}  # elsewhere LAYERS
CAPS = (2.0, 3.0)  # gemma2: of attention's scores, and of logits
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "i n", "a n", "e r", "o n"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Make = Callable[..., np.ndarray]


def byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte if byte in printable else next(rest)) for byte in range(256)]


def write_gguf(path: Path, architecture: str = "qwen2", *, seed: int = 0, chat: bool = True) -> Path:
    """Random weights in F32; the same seed gives the same file. chat: with a template and the tokens of turns."""
    import gguf

    rng = np.random.default_rng(seed)

    def random(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(f"tiny random {architecture}")
    writer.add_block_count(BLOCKS.get(architecture, LAYERS))
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_context_length(CONTEXT)
    writer.add_head_count(HEADS)
    tensors = BUILDERS[architecture](writer, random)
    add_tokens = _add_sentencepiece if architecture == "gemma3" else _add_byte_level
    n_vocab = add_tokens(writer, pre="qwen2" if architecture == "qwen2" else "gpt-2", chat=chat)
    tensors["token_embd.weight"] = random(n_vocab, WIDTH) * 2
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2 if chat else 0)
    writer.add_add_bos_token(False)
    if chat:
        writer.add_chat_template(TEMPLATE)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_byte_level(writer: Any, *, pre: str, chat: bool, whole: Sequence[str] = ()) -> int:
    """GPT-2's kind of BPE; `whole` are tokens that no merges make. Returns how many tokens there are."""
    control = CONTROL if chat else ["<|endoftext|>", "<unused0>", "<unused1>"]
    tokens = [*control, *byte_tokens(), *(merge.replace(" ", "") for merge in MERGES), *whole]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(control) + [1] * (len(tokens) - len(control)))
    writer.add_token_merges(MERGES)
    return len(tokens)


def _add_sentencepiece(writer: Any, *, pre: str, chat: bool, prefix: bool = False) -> int:
    """Gemma's kind: scores and no merges, bytes for what has no token, runs of spaces and line breaks of their own."""
    control = CONTROL if chat else ["<eos>", "<unused0>", "<unused1>"]
    whole = ["  ", "   ", "\n\n", "<b>", "</s>"]
    learnt = "th in \u2581t \u2581th the \u2581the an er on ing qu \u2581a oo aaa aa".split()
    letters = ["\u2581", *map(chr, range(33, 127)), "\n", "ä", "é", "ß"]
    groups = [(control, 3), (["<unk>"], 2), ([f"<0x{byte:02X}>" for byte in range(256)], 6), (whole, 4)]
    groups += [(learnt, 1), (letters, 1)]
    tokens = [(token, kind) for group, kind in groups for token in group]
    ranked = [*learnt, *letters]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_scores([-float(ranked.index(token)) if kind == 1 else -1000.0 for token, kind in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_unk_token_id(len(control))
    writer.add_add_space_prefix(prefix)
    return len(tokens)


def _gated(
    writer: Any, random: Make, *, kv: int = KV, bias: bool = False, layers: int = LAYERS
) -> dict[str, np.ndarray]:
    """RMS norms, rotary embedding, grouped queries, gated MLP."""
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    tensors = {"output_norm.weight": 1 + 0.1 * random(WIDTH)}
    for block in (f"blk.{layer}." for layer in range(layers)):
        for name, rows in (("q", HEADS), ("k", kv), ("v", kv)):
            tensors[f"{block}attn_{name}.weight"] = random(rows * D_HEAD, WIDTH)
            if bias:
                tensors[f"{block}attn_{name}.bias"] = 0.1 * random(rows * D_HEAD)
        tensors |= {
            f"{block}attn_norm.weight": 1 + 0.1 * random(WIDTH),
            f"{block}attn_output.weight": random(WIDTH, HEADS * D_HEAD),
            f"{block}ffn_norm.weight": 1 + 0.1 * random(WIDTH),
            f"{block}ffn_gate.weight": random(INNER, WIDTH),
            f"{block}ffn_up.weight": random(INNER, WIDTH),
            f"{block}ffn_down.weight": random(WIDTH, INNER),
        }
    return tensors


def _llama(writer: Any, random: Make) -> dict[str, np.ndarray]:
    writer.add_rope_dimension_count(D_HEAD)
    return _gated(writer, random)


def _granite(writer: Any, random: Make) -> dict[str, np.ndarray]:
    """Embeddings, attention's scores, branches and logits each scaled."""
    writer.add_embedding_scale(3.0)
    writer.add_attention_scale(0.2)
    writer.add_residual_scale(0.3)
    writer.add_logit_scale(2.0)
    return _llama(writer, random)


def _qwen2(writer: Any, random: Make) -> dict[str, np.ndarray]:
    return _gated(writer, random, bias=True)


def _gemma(writer: Any, random: Make) -> dict[str, np.ndarray]:
    writer.add_key_length(D_HEAD)
    writer.add_value_length(D_HEAD)
    return _gated(writer, random, kv=1)


def _gemma2(writer: Any, random: Make) -> dict[str, np.ndarray]:
    """Attention's scores and logits bounded."""
    writer.add_attn_logit_softcapping(CAPS[0])
    writer.add_final_logit_softcapping(CAPS[1])
    return _windowed(writer, random, LAYERS, {"post_attention": WIDTH, "post_ffw": WIDTH})


def _gemma3(writer: Any, random: Make) -> dict[str, np.ndarray]:
    """Heads normed."""
    norms = {"attn_q": D_HEAD, "attn_k": D_HEAD, "post_attention": WIDTH, "post_ffw": WIDTH}
    return _windowed(writer, random, BLOCKS["gemma3"], norms)


def _windowed(writer: Any, random: Make, layers: int, norms: dict[str, int]) -> dict[str, np.ndarray]:
    """Both branches normed; most blocks look back eight tokens."""
    writer.add_key_length(D_HEAD)
    writer.add_value_length(D_HEAD)
    writer.add_sliding_window(8)
    tensors = _gated(writer, random, kv=1, layers=layers)
    for block in (f"blk.{layer}." for layer in range(layers)):
        for name, width in norms.items():
            tensors[f"{block}{name}_norm.weight"] = 1 + 0.1 * random(width)
    return tensors


def _gpt2(writer: Any, random: Make) -> dict[str, np.ndarray]:
    """Learnt positions, layer norms with biases, one matrix for q, k and v."""
    writer.add_layer_norm_eps(1e-5)
    tensors = {"position_embd.weight": random(CONTEXT, WIDTH), "output_norm.weight": 1 + 0.1 * random(WIDTH)}
    tensors["output_norm.bias"] = 0.1 * random(WIDTH)
    for block in (f"blk.{layer}." for layer in range(LAYERS)):
        for name, rows, columns in (
            ("attn_qkv", 3 * WIDTH, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_up", INNER, WIDTH),
            ("ffn_down", WIDTH, INNER),
        ):
            tensors[f"{block}{name}.weight"] = random(rows, columns)
            tensors[f"{block}{name}.bias"] = 0.1 * random(rows)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"{block}{name}.weight"] = 1 + 0.1 * random(WIDTH)
            tensors[f"{block}{name}.bias"] = 0.1 * random(WIDTH)
    return tensors


def _plamo2(writer: Any, random: Make) -> dict[str, np.ndarray]:
    """Blocks of Mamba and of attention in turn."""
    conv, state, inner, steps = 4, 8, 64, 4
    delta = 64  # llama.cpp fixes it: max(64, width / 16)
    writer.add_head_count_kv([0 if layer % 2 == 0 else KV for layer in range(LAYERS)])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_key_length(D_HEAD)
    writer.add_value_length(D_HEAD)
    writer.add_ssm_conv_kernel(conv)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(steps)
    writer.add_ssm_group_count(0)
    tensors = {"output_norm.weight": 1 + 0.1 * random(WIDTH)}
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        tensors |= {
            f"{block}attn_norm.weight": 1 + 0.1 * random(WIDTH),
            f"{block}post_attention_norm": 1 + 0.1 * random(WIDTH),
            f"{block}ffn_norm.weight": 1 + 0.1 * random(WIDTH),
            f"{block}post_ffw_norm": 1 + 0.1 * random(WIDTH),
            f"{block}ffn_up.weight": random(2 * INNER, WIDTH),
            f"{block}ffn_down.weight": random(WIDTH, INNER),
        }
        if layer % 2 == 0:
            tensors |= {
                f"{block}ssm_in.weight": random(2 * inner, WIDTH),
                f"{block}ssm_conv1d.weight": random(inner, conv),
                f"{block}ssm_x.weight": random(delta + 2 * state, inner),
                f"{block}ssm_dt.weight": random(steps, delta),
                f"{block}ssm_dt.bias": random(steps),
                f"{block}ssm_a": -np.abs(random(steps)),
                f"{block}ssm_d": random(steps),
                f"{block}ssm_out.weight": random(WIDTH, inner),
                f"{block}ssm_dt_norm": 1 + 0.1 * random(delta),
                f"{block}ssm_b_norm": 1 + 0.1 * random(state),
                f"{block}ssm_c_norm": 1 + 0.1 * random(state),
            }
        else:
            tensors |= {
                f"{block}attn_qkv.weight": random((HEADS + 2 * KV) * D_HEAD, WIDTH),
                f"{block}attn_q_norm.weight": 1 + 0.1 * random(HEADS, D_HEAD),
                f"{block}attn_k_norm.weight": 1 + 0.1 * random(KV, D_HEAD),
                f"{block}attn_output.weight": random(WIDTH, HEADS * D_HEAD),
            }
    return tensors


BUILDERS = {
    "llama": _llama,
    "smollm3": _llama,
    "granite": _granite,
    "qwen2": _qwen2,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "plamo2": _plamo2,
}

SPLIT = {
    "llama": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""How Llama 3 and Qwen2 split text before merging."""


HF_CLASSES = {"llama": "Llama", "smollm3": "SmolLM3", "granite": "Granite", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""Names of transformers' classes begin with these."""


def write_hf(folder: Path, architecture: str = "llama", *, seed: int = 0, **settings: object) -> Path:
    """A folder as `save_pretrained` writes it; `settings` replace those of the config."""
    import torch
    import transformers

    folder.mkdir(parents=True)
    n_vocab = _write_tokenizer(folder, architecture)
    kind, model = (getattr(transformers, HF_CLASSES[architecture] + end) for end in ("Config", "ForCausalLM"))
    config = {
        "vocab_size": n_vocab,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": architecture in ("qwen2", "smollm3"),
        "initializer_range": 0.12,
        "bos_token_id": 0,
        "eos_token_id": 2,
        **({"pad_token_id": 1} if architecture == "smollm3" else {}),  # its usual one is beyond this vocabulary
    }
    torch.manual_seed(seed)
    built = model(kind(**(config | settings)))
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if weight.ndim == 1:  # biases and norms start at 0 and 1, where a mix-up would not show
                weight.add_(0.1 * torch.randn_like(weight))
            assert torch.isfinite(weight).all(), name
    built.save_pretrained(folder)
    return folder


def _write_tokenizer(folder: Path, architecture: str) -> int:
    from tokenizers import decoders, models, pre_tokenizers, Regex, Tokenizer, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT["qwen2" if architecture.startswith("qwen") else "llama"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    text = " ".join(prompts("pack"))  # of the project's own, these change least: what tests sample depends on them
    digits = " ".join(str(number) for number in range(1000))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=CONTROL, show_progress=False
    )
    tokenizer.train_from_iterator([text, digits], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return int(tokenizer.get_vocab_size())


def main(arguments: list[str]) -> int:
    if len(arguments) != 3 or arguments[0] not in ("gguf", "hf"):
        print(__doc__, file=sys.stderr)
        return 2
    made = (write_gguf if arguments[0] == "gguf" else write_hf)(Path(arguments[2]), arguments[1])
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
