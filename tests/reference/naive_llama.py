"""A Llama in numpy, float64, one position and one head at a time; and a tiny random one as a GGUF."""

from pathlib import Path

import numpy as np

D, HEADS, KV, FF, VOCAB, LAYERS, EPS, ROPE = 8, 4, 2, 12, 20, 3, 1e-5, 100.0
SIZE = D // HEADS


def write_tiny(path: Path) -> dict[str, np.ndarray]:
    """Write random weights as a GGUF; returns them as float64."""
    import gguf

    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    weights = {"token_embd.weight": random(VOCAB, D) * 3, "output_norm.weight": 1 + random(D)}
    for il in range(LAYERS):
        weights |= {
            f"blk.{il}.attn_norm.weight": 1 + random(D),
            f"blk.{il}.attn_q.weight": random(D, D) * 2,
            f"blk.{il}.attn_k.weight": random(KV * SIZE, D) * 2,
            f"blk.{il}.attn_v.weight": random(KV * SIZE, D),
            f"blk.{il}.attn_output.weight": random(D, D),
            f"blk.{il}.ffn_norm.weight": 1 + random(D),
            f"blk.{il}.ffn_gate.weight": random(FF, D),
            f"blk.{il}.ffn_up.weight": random(FF, D),
            f"blk.{il}.ffn_down.weight": random(D, FF),
        }
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(FF)
    writer.add_context_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_rope_freq_base(ROPE)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    for name, array in weights.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: array.astype(np.float64) for name, array in weights.items()}


def norm(x, weight):
    return x / np.sqrt(np.mean(x**2) + EPS) * weight


def rotate(x, position):
    """Rotary embedding of one head: neighbours (2i, 2i+1) turn by position * base^(-2i / size)."""
    out = np.empty(len(x))
    for i in range(len(x) // 2):
        angle = position * ROPE ** (-2 * i / len(x))
        a, b = x[2 * i], x[2 * i + 1]
        out[2 * i] = a * np.cos(angle) - b * np.sin(angle)
        out[2 * i + 1] = a * np.sin(angle) + b * np.cos(angle)
    return out


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def logits(w, tokens, *, vectors=None, steered_from=0):
    """(T, VOCAB); `vectors` (LAYERS, D) are added to the outputs of blocks from position `steered_from` on."""
    states = [w["token_embd.weight"][t] for t in tokens]
    for il in range(LAYERS):
        p = f"blk.{il}."
        keys, values, after = [], [], []
        for t, x in enumerate(states):
            h = norm(x, w[p + "attn_norm.weight"])
            q, k, v = (w[f"{p}attn_{name}.weight"] @ h for name in "qkv")
            keys.append([rotate(k[g * SIZE : (g + 1) * SIZE], t) for g in range(KV)])
            values.append([v[g * SIZE : (g + 1) * SIZE] for g in range(KV)])
            mixed = []
            for head in range(HEADS):
                g = head // (HEADS // KV)
                mine = rotate(q[head * SIZE : (head + 1) * SIZE], t)
                weight = softmax(np.array([mine @ keys[s][g] / np.sqrt(SIZE) for s in range(t + 1)]))
                mixed.append(sum(weight[s] * values[s][g] for s in range(t + 1)))
            x = x + w[p + "attn_output.weight"] @ np.concatenate(mixed)
            h = norm(x, w[p + "ffn_norm.weight"])
            gate = w[p + "ffn_gate.weight"] @ h
            x = x + w[p + "ffn_down.weight"] @ (gate / (1 + np.exp(-gate)) * (w[p + "ffn_up.weight"] @ h))
            if vectors is not None and il > 0 and t >= steered_from:
                x = x + vectors[il]
            after.append(x)
        states = after
    return np.stack([w["token_embd.weight"] @ norm(x, w["output_norm.weight"]) for x in states])
