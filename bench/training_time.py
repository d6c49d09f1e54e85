"""LoRA-DPO against edge-align on the same 200 pairs of one user: seconds, and win rate on the same unseen prompts.

    python bench/training_time.py --save              # the LoRA takes half an hour on two cores; kept when done
    python bench/training_time.py --steps 4 --save    # its time extrapolated, and marked so

The LoRA is given every advantage that costs no quality: the faster of bfloat16 and float32 here, reference
log-probabilities computed once, logits for answer tokens only, and its loading time left out while ours is counted.
All answers come from one PyTorch engine; the LoRA is merged into its weights.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    Answer,
    Bench,
    console,
    digest,
    learn_profile,
    main,
    parser,
    progress,
    reference_model,
    sample_rows,
    SEED,
    short_pairs,
    steering,
    timed,
)
from rich.table import Table
from safetensors.torch import load_file, save_file

from edge_align.config import PersonalizeConfig
from edge_align.errors import BackendUnavailable, EdgeAlignError
from edge_align.records import PreferencePair
from edge_align.runtime.torch_ref import LlamaReference
from edge_align.simulation.prompts import prompts
from edge_align.simulation.users import bootstrap_interval, user, wins

RANK, ALPHA, LEARNING_RATE, BETA, EPOCHS, BATCH = 16, 32, 3e-4, 0.1, 2, 4
NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
NAMES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
GGUF = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = 2e-2  # of float32 logits between the two PyTorch models


def run(bench: Bench) -> dict[str, Any]:
    args = bench.args
    if args.quick:
        args.pairs, args.tokens, args.prompts, args.max_tokens, args.steps = 8, 12, 2, 8, args.steps or 1
    who = user(args.user)
    pairs = short_pairs(bench, who, n=args.pairs, tokens=args.tokens)
    seconds, profile = timed(lambda: learn_profile(bench, pairs, kl_budget=args.kl_budget))
    console.print(f"edge-align: {seconds:.2f} s")
    lora, deltas = train_lora(bench, pairs)
    found = {"user": who.name, "pairs": len(pairs), "edge_align_sec": seconds, "lora": lora}
    found["lora_over_edge_align"] = lora["seconds"] / seconds
    if not args.no_answers:
        found |= compare(bench, profile.encoder, deltas)
    table = Table("", "seconds", "win rate")
    for name, cost in (("edge-align", seconds), ("LoRA-DPO", lora["seconds"])):
        note = " (extrapolated)" if name == "LoRA-DPO" and lora["extrapolated"] else ""
        rate = found.get("win_rate", {}).get(name)
        table.add_row(name, f"{cost:.2f}{note}", "" if rate is None else f"{rate:.3f}")
    console.print(table)
    return found


# -- answers -------------------------------------------------------------------------------------------------------
def compare(bench: Bench, encoder: Any, deltas: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Win rates of both against the base's answers to the same prompts, same cap and seed."""
    args, who = bench.args, user(bench.args.user)
    unseen = list(prompts("test")[: args.prompts])
    model, seed = reference_model(bench), args.seed + SEED

    def texts(name: str, vectors: np.ndarray | None, *depends: Any) -> list[str]:
        kept = bench.keep(f"training-{name}", unseen, args.max_tokens, seed, str(model.dtype), *depends)
        made: list[Answer] = sample_rows(
            bench, model, unseen, vectors, max_tokens=args.max_tokens, seed=seed, kept=kept, label=name
        )
        return [answer.text for answer in made]

    base = texts("base", None)
    steered = steering(bench, encoder, unseen)
    zero = np.zeros((bench.pack.n_layer, bench.pack.d_model), np.float32)
    arrays = np.stack([zero if v is None else v.array for v in steered])
    ours = texts("ours", arrays, digest(arrays))
    merge(model, deltas)
    theirs = texts("lora", None, digest(*[d.numpy() for d in deltas.values()]))
    found: dict[str, Any] = {"prompts": len(unseen), "win_rate": {}, "win_ci": {}}
    for name, made in (("edge-align", ours), ("LoRA-DPO", theirs)):
        won = wins(who.judge, made, base)
        found["win_rate"][name] = float(won.mean())
        found["win_ci"][name] = list(bootstrap_interval(won, rng=np.random.default_rng(0)))
    return found


def merge(model: LlamaReference, deltas: dict[str, torch.Tensor]) -> None:
    """Add the LoRA's weight changes, which are in transformers' layout, to the reference's stacked weights."""
    s = model.shape
    for il, block in enumerate(model.blocks):
        d = {name: deltas[f"{il}.{name}"] for name in NAMES}
        q, k, v, out, gate, up, down = (d[name] for name in NAMES)
        change = torch.cat([interleave(q, s.n_head), interleave(k, s.n_head_kv), v])
        block.qkv = (block.qkv.float() + change).to(model.dtype)
        block.out = (block.out.float() + out).to(model.dtype)
        block.gate_up = (block.gate_up.float() + torch.cat([gate, up])).to(model.dtype)
        block.down = (block.down.float() + down).to(model.dtype)


def interleave(w: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a q or k projection from transformers' half-split rotary layout to the GGUF's interleaved one."""
    return w.view(heads, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)


def split_halves(w: torch.Tensor, heads: int) -> torch.Tensor:
    """The reverse of `interleave`."""
    return w.view(heads, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


# -- the transformers model ----------------------------------------------------------------------------------------
def build_hf(bench: Bench) -> Any:
    """transformers' Llama with the GGUF's dequantised weights, float32; checked against our reference's logits."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise BackendUnavailable("this bench needs the extra: pip install 'edge-align[bench]'") from None
    reference = LlamaReference(bench.base.path)
    s, read = reference.shape, reference.tensors.read
    tied = "output.weight" not in reference.tensors.header.tensors
    config = LlamaConfig(
        vocab_size=s.n_vocab,
        hidden_size=s.d_model,
        intermediate_size=reference.blocks[0].down.shape[1],
        num_hidden_layers=s.n_layer,
        num_attention_heads=s.n_head,
        num_key_value_heads=s.n_head_kv,
        rms_norm_eps=s.rms_eps,
        rope_theta=s.rope_base,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
    )
    state = {"model.embed_tokens.weight": read("token_embd.weight"), "model.norm.weight": read("output_norm.weight")}
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if tied else read("output.weight")
    for il in range(s.n_layer):
        ours, theirs = f"blk.{il}.", f"model.layers.{il}."
        for name, gguf in zip(NAMES, GGUF, strict=True):
            weight = torch.from_numpy(read(f"{ours}{gguf}.weight"))
            if gguf in ("attn_q", "attn_k"):
                weight = split_halves(weight, s.n_head if gguf == "attn_q" else s.n_head_kv)
            state[f"{theirs}{name}.weight"] = weight
        state[f"{theirs}input_layernorm.weight"] = read(ours + "attn_norm.weight")
        state[f"{theirs}post_attention_layernorm.weight"] = read(ours + "ffn_norm.weight")
    model = LlamaForCausalLM(config)
    model.load_state_dict({k: v if torch.is_tensor(v) else torch.from_numpy(v) for k, v in state.items()})
    tokens = bench.backend.tokenize("The bread was still warm when the baker opened the door of the shop.")
    with torch.inference_mode():
        theirs_logits = model(torch.tensor([tokens])).logits[0].numpy()
    error = float(np.abs(theirs_logits[:-1] - reference.score(tokens[:1], tokens[1:])).max())
    if not error < TOLERANCE:
        raise EdgeAlignError(f"the transformers model is not the base: logits differ by {error:.3g}")
    return model


# -- LoRA-DPO ------------------------------------------------------------------------------------------------------
Rows = list[tuple[list[int], list[int]]]  # (prompt, answer) token ids


def train_lora(bench: Bench, pairs: Sequence[PreferencePair]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(seconds and settings, weight changes by "layer.module"); kept when done, for it takes long."""
    args = bench.args
    settings = [RANK, ALPHA, LEARNING_RATE, BETA, EPOCHS, BATCH, args.steps, args.dtype, args.seed, args.threads]
    texts = [[pair.prompt[-1].content, pair.chosen, pair.rejected] for pair in pairs]
    report = bench.keep("lora", settings, texts)
    path = report.path.with_suffix(".safetensors")
    if not (report.rows and path.is_file()):
        row, deltas = _train(bench, pairs)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: delta.contiguous() for name, delta in deltas.items()}, path)
        report.add(row)
    return report.rows[-1], load_file(path)


def _train(bench: Bench, pairs: Sequence[PreferencePair]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    args = bench.args
    torch.manual_seed(args.seed)
    rows: list[Rows] = []
    for pair in pairs:
        prompt = bench.backend.render(pair.prompt)
        rows.append([(prompt, [*bench.backend.tokenize(text), bench.eos]) for text in (pair.chosen, pair.rejected)])
    base = build_hf(bench)
    tried = {name: probe_dtype(base, rows[:BATCH], name) for name in DTYPES if args.dtype in ("auto", name)}
    dtype = min(tried, key=lambda name: tried[name])
    model = with_lora(base.to(DTYPES[dtype]))
    inner = model.get_base_model()

    rng = np.random.default_rng(args.seed)
    orders = [rng.permutation(len(rows)) for _ in range(EPOCHS)]
    plan = [order[i : i + BATCH] for order in orders for i in range(0, len(rows), BATCH)]
    total, plan = len(plan), plan[: args.steps or None]
    used = sorted({int(i) for part in plan for i in part})

    start = time.perf_counter()
    reference = torch.zeros(len(rows), 2)
    with torch.no_grad(), model.disable_adapter():
        for i in range(0, len(used), BATCH):
            part = used[i : i + BATCH]
            reference[part] = log_probs(inner, [rows[j] for j in part])
    reference_sec = time.perf_counter() - start

    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    start, losses = time.perf_counter(), []
    with progress("LoRA-DPO", len(plan)) as tell:
        for step, part in enumerate(plan):
            losses.append(dpo_step(inner, [rows[j] for j in part], reference[part]))
            optimiser.step()
            optimiser.zero_grad()
            tell(step + 1)
    steps_sec = time.perf_counter() - start

    deltas = {
        f"{il}.{name}": layer.get_submodule(name).get_delta_weight("default").detach().float()
        for il, layer in enumerate(inner.model.layers)
        for name in NAMES
    }
    seconds = reference_sec * len(rows) / len(used) + steps_sec * total / len(plan)
    return {
        "seconds": seconds,
        "extrapolated": len(plan) < total,
        "measured_sec": reference_sec + steps_sec,
        "steps": len(plan),
        "steps_of_all": total,
        "dtype": dtype,
        "probe_sec": tried,
        "first_loss": losses[0],
        "last_loss": float(np.mean(losses[-5:])),
        "rank": RANK,
        "learning_rate": LEARNING_RATE,
        "beta": BETA,
        "epochs": EPOCHS,
        "batch": BATCH,
    }, deltas


def with_lora(base: Any) -> Any:
    """A LoRA on every linear map of the blocks."""
    from peft import get_peft_model, LoraConfig

    targets = [name.split(".")[1] for name in NAMES]
    return get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets))


def probe_dtype(base: Any, rows: list[Rows], name: str) -> float:
    """Seconds of one training step in this dtype, after a warm-up."""
    inner = with_lora(copy.deepcopy(base).to(DTYPES[name])).get_base_model()
    reference = torch.zeros(len(rows), 2)
    dpo_step(inner, rows, reference)
    seconds, _ = timed(lambda: dpo_step(inner, rows, reference))
    return seconds


def dpo_step(inner: Any, rows: list[Rows], reference: torch.Tensor) -> float:
    """Forward and backward of one batch; returns the loss (Rafailov et al. 2023, eq. 7)."""
    ratio = log_probs(inner, rows) - reference
    loss = -F.logsigmoid(BETA * (ratio[:, 0] - ratio[:, 1])).mean()
    loss.backward()
    return float(loss.detach())


def log_probs(inner: Any, rows: list[Rows]) -> torch.Tensor:
    """Log-probability of the chosen and the rejected answer of each pair, (len(rows), 2) float32.

    Rows are padded on the right, where causal attention never looks; only answer positions reach the output layer.
    """
    flat = [row for pair in rows for row in pair]
    width = max(len(prompt) + len(answer) for prompt, answer in flat) - 1
    tokens = torch.zeros(len(flat), width, dtype=torch.long)
    target = torch.full((len(flat), width), -1)
    for i, (prompt, answer) in enumerate(flat):
        tokens[i, : len(prompt) + len(answer) - 1] = torch.tensor([*prompt, *answer[:-1]])
        target[i, len(prompt) - 1 : len(prompt) + len(answer) - 1] = torch.tensor(answer)
    asked = target >= 0
    hidden = inner.model(tokens, use_cache=False).last_hidden_state[asked]
    nll = F.cross_entropy(inner.lm_head(hidden).float(), target[asked], reduction="none")
    return -torch.zeros(len(flat)).index_add(0, asked.nonzero()[:, 0], nll).view(-1, 2)


if __name__ == "__main__":
    p = parser("LoRA-DPO against edge-align on the same pairs: seconds and win rate.")
    p.add_argument("--user", default="positive")
    p.add_argument("--pairs", type=int, default=200)
    p.add_argument("--tokens", type=int, default=75, help="answers are cut to this many tokens")
    p.add_argument("--prompts", type=int, default=100, help="unseen test prompts")
    p.add_argument("--max-tokens", type=int, default=96)
    p.add_argument("--steps", type=int, default=0, help="stop the LoRA after so many steps and extrapolate its time")
    p.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: the faster one here")
    p.add_argument("--kl-budget", type=float, default=PersonalizeConfig().kl_budget)
    p.add_argument("--no-answers", action="store_true", help="seconds only")
    main(run, p.parse_args(), __file__)
