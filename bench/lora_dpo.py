"""LoRA-DPO and P-tuning-DPO on the base, with transformers and peft: the model, training, using what it learnt.

TRL's DPOTrainer trains the same adapter (`trl_dpo.py`, and a test). Here they are given every advantage that costs no
quality: the faster of bfloat16 and float32, reference log-probabilities computed once, and logits for answer tokens
only. What is trained is float32 whatever the base is, as peft makes it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import Bench, Kept, progress, timed
from safetensors.torch import save_file

from edge_align.errors import BackendUnavailable, EdgeAlignError
from edge_align.records import PreferencePair
from edge_align.runtime.torch_ref import LlamaReference

NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
NAMES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
GGUF = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = 2e-2  # of float32 logits between the two PyTorch models

Rows = list[tuple[list[int], list[int]]]  # (prompt, answer) token ids


@dataclass(frozen=True)
class Training:
    """Settings that all have. batch: pairs."""

    learning_rate: float
    beta: float = 0.1
    epochs: int = 2
    batch: int = 4


@dataclass(frozen=True)
class LoRA(Training):
    """Rank r on every linear map of the blocks."""

    learning_rate: float = 3e-4
    rank: int = 16
    alpha: int = 32


@dataclass(frozen=True)
class PTuning(Training):
    """Embeddings of virtual tokens before the prompt, trained as the outputs of a small network (arXiv 2103.10385)."""

    learning_rate: float = 1e-3
    tokens: int = 20


@contextmanager
def merged(
    model: LlamaReference, adapter: dict[str, torch.Tensor], *, strength: float = 1.0
) -> Iterator[LlamaReference]:
    """The reference with `strength` times the adapter, which is in transformers' layout, added to its stacked weights.

    The reference's projections hold the weight of the norm before them.
    """
    untouched = model.blocks
    model.blocks = [copy.copy(block) for block in untouched]
    s = model.shape
    for il, block in enumerate(model.blocks):
        parts = [(adapter[f"{il}.{name}.B"], adapter[f"{il}.{name}.A"]) for name in NAMES]
        q, k, v, out, gate, up, down = (strength * (b.to(model.device) @ a.to(model.device)) for b, a in parts)
        norms = [torch.from_numpy(model.tensors.read(f"blk.{il}.{name}_norm.weight")) for name in ("attn", "ffn")]
        change = torch.cat([interleave(q, s.n_head), interleave(k, s.n_head_kv), v])
        block.qkv = (block.qkv.float() + change * norms[0].to(model.device)).to(model.dtype)
        block.out = (block.out.float() + out).to(model.dtype)
        block.gate_up = (block.gate_up.float() + torch.cat([gate, up]) * norms[1].to(model.device)).to(model.dtype)
        block.down = (block.down.float() + down).to(model.dtype)
    try:
        yield model
    finally:
        model.blocks = untouched


@contextmanager
def preceded(model: LlamaReference, before: torch.Tensor) -> Iterator[list[int]]:
    """Embeddings (n, d_model) as tokens of the reference that its vocabulary does not have; their ids."""
    first, width = model.shape.n_vocab, model.shape.d_model
    model.head(torch.zeros(1, width, dtype=model.dtype, device=model.device))  # loads the table of embeddings
    untouched = model._embedding
    model._embedding = torch.cat([untouched, before.to(untouched)])
    try:
        yield list(range(first, first + len(before)))
    finally:
        model._embedding = untouched


@contextmanager
def applied(model: LlamaReference, adapter: dict[str, torch.Tensor], *, strength: float = 1.0) -> Iterator[list[int]]:
    """The reference with what was trained; the tokens that then come before every prompt. strength: of a LoRA.

    Steering vectors leave it as it is: each row is given its own.
    """
    if "before" in adapter:
        with preceded(model, adapter["before"]) as ids:
            yield ids
    elif "vectors" in adapter:
        yield []
    else:
        with merged(model, adapter, strength=strength):
            yield []


def kept_training(
    kept: Kept, work: Callable[[], tuple[dict[str, Any], dict[str, torch.Tensor]]]
) -> tuple[dict[str, Any], Path]:
    """What `work` says of a training, and the file of the adapter it gives; done once."""
    path = kept.path.with_suffix(".safetensors")
    if not (kept.rows and path.is_file()):
        cost, adapter = work()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: part.contiguous() for name, part in adapter.items()}, path)
        kept.add(cost)
    return kept.rows[-1], path


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


# -- training ------------------------------------------------------------------------------------------------------
def tokenized(bench: Bench, pairs: Sequence[PreferencePair]) -> list[Rows]:
    """Chosen and rejected answer of each pair, with the end of text."""
    rows: list[Rows] = []
    for pair in pairs:
        prompt = bench.backend.render(pair.prompt)
        answers = [[*bench.backend.tokenize(text), bench.eos] for text in (pair.chosen, pair.rejected)]
        rows.append([(prompt, answer) for answer in answers])
    return rows


def train(
    base: Any, rows: Sequence[Rows], settings: LoRA | PTuning, *, dtype: str, seed: int, steps: int = 0
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(seconds and losses, the adapter) on the device `base` is on; `base` is left as it is.

    The adapter of a LoRA: "layer.module.A" (rank, inputs) and ".B" (outputs, rank) float32, whose product B A is added
    to the weight; of P-tuning: "before" (tokens, d_model) float32. steps: stop after so many, and extrapolate the
    seconds.
    """
    torch.manual_seed(seed)
    student = student_of(copy.deepcopy(base).to(DTYPES[dtype]), settings)
    device = next(student.model.parameters()).device
    trained = [p for p in student.model.parameters() if p.requires_grad]

    plan = shuffled(len(rows), epochs=settings.epochs, batch=settings.batch, rng=np.random.default_rng(seed))
    total, plan = len(plan), plan[: steps or None]
    used = sorted({int(i) for part in plan for i in part})

    start = time.perf_counter()
    reference = torch.zeros(len(rows), 2, device=device)
    with torch.no_grad(), student.model.disable_adapter():
        for i in range(0, len(used), settings.batch):
            part = used[i : i + settings.batch]
            reference[part] = log_probs(student.inner, [rows[j] for j in part])
    reference_sec = waited(device) - start

    optimiser = torch.optim.AdamW(trained, lr=settings.learning_rate)
    start, losses = time.perf_counter(), []
    with progress(f"{type(settings).__name__}-DPO", len(plan)) as tell:
        for step, part in enumerate(plan):
            losses.append(dpo_step(student, [rows[j] for j in part], reference[part], beta=settings.beta))
            optimiser.step()
            optimiser.zero_grad()
            tell(step + 1)
    steps_sec = waited(device) - start

    adapter = student.adapter()
    return {
        "seconds": reference_sec * len(rows) / len(used) + steps_sec * total / len(plan),
        "extrapolated": len(plan) < total,
        "measured_sec": reference_sec + steps_sec,
        "steps": len(plan),
        "steps_of_all": total,
        "dtype": dtype,
        "device": device_name(device),
        "first_loss": losses[0],
        "last_loss": float(np.mean(losses[-5:])),
        "stored_bytes": stored_bytes(adapter),
    }, adapter


def device_name(device: torch.device) -> str:
    """As results say it."""
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


def stored_bytes(adapter: dict[str, torch.Tensor]) -> int:
    """What an adapter takes in 16 bits."""
    return sum(part.numel() * 2 for part in adapter.values())


def student_of(base: Any, settings: LoRA | PTuning) -> _LoRAStudent | _PTuningStudent:
    """What is trained, on a base that is its own."""
    return _LoRAStudent(base, settings) if isinstance(settings, LoRA) else _PTuningStudent(base, settings)


class _LoRAStudent:
    """The base with a LoRA on every linear map of the blocks."""

    def __init__(self, base: Any, settings: LoRA) -> None:
        from peft import get_peft_model

        self.model = get_peft_model(base, lora_config(settings))
        self.inner = self.model.get_base_model()

    def log_probs(self, rows: list[Rows]) -> torch.Tensor:
        return log_probs(self.inner, rows)

    def adapter(self) -> dict[str, torch.Tensor]:
        return lora_adapter(self.inner)


def lora_config(settings: LoRA) -> Any:
    """peft's, for every linear map of the blocks."""
    from peft import LoraConfig

    targets = [name.split(".")[1] for name in NAMES]
    return LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules=targets)


def lora_adapter(inner: Any) -> dict[str, torch.Tensor]:
    """What was trained on transformers' model `inner`, as `train` returns it."""
    found = {}
    for il, layer in enumerate(inner.model.layers):
        for name in NAMES:
            module = layer.get_submodule(name)
            b = module.lora_B["default"].weight * module.scaling["default"]
            found[f"{il}.{name}.A"] = module.lora_A["default"].weight.detach().float().cpu()
            found[f"{il}.{name}.B"] = b.detach().float().cpu()
    return found


class _PTuningStudent:
    """The base with virtual tokens before the prompt."""

    def __init__(self, base: Any, settings: PTuning) -> None:
        from peft import get_peft_model, PromptEncoderConfig

        config = PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=settings.tokens, encoder_hidden_size=base.config.hidden_size
        )
        self.model = get_peft_model(base, config)
        self.inner = self.model.get_base_model()

    def _before(self) -> torch.Tensor:
        return torch.as_tensor(self.model.get_prompt(1)[0])

    def log_probs(self, rows: list[Rows]) -> torch.Tensor:
        return log_probs(self.inner, rows, self._before())

    def adapter(self) -> dict[str, torch.Tensor]:
        return {"before": self._before().detach().float().cpu()}


def shuffled(n: int, *, epochs: int, batch: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Indices of every step's batch: all n in a new order each epoch."""
    orders = [rng.permutation(n) for _ in range(epochs)]
    return [order[i : i + batch] for order in orders for i in range(0, n, batch)]


def waited(device: torch.device) -> float:
    """The time, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def fastest_dtype(
    base: Any, rows: Sequence[Rows], settings: LoRA | PTuning, allowed: str = "auto"
) -> tuple[str, dict[str, float]]:
    """The faster dtype here, and the seconds of one training step in each that was tried, after a warm-up."""
    tried = {}
    for name in DTYPES:
        if allowed in ("auto", name):
            student = student_of(copy.deepcopy(base).to(DTYPES[name]), settings)
            part = list(rows[: settings.batch])
            reference = torch.zeros(len(part), 2, device=next(student.model.parameters()).device)
            dpo_step(student, part, reference, beta=settings.beta)
            tried[name], _ = timed(lambda: dpo_step(student, part, reference, beta=settings.beta))  # noqa: B023
    return min(tried, key=lambda name: tried[name]), tried


def dpo_step(student: Any, rows: list[Rows], reference: torch.Tensor, *, beta: float) -> float:
    """Forward and backward of one batch; returns the loss (Rafailov et al. 2023, eq. 7)."""
    ratio = student.log_probs(rows) - reference
    loss = -F.logsigmoid(beta * (ratio[:, 0] - ratio[:, 1])).mean()
    loss.backward()
    return float(loss.detach())


def log_probs(inner: Any, rows: list[Rows], before: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probability of the chosen and the rejected answer of each pair, (len(rows), 2) float32.

    before: embeddings (n, d_model) ahead of every prompt. Rows are padded on the right, where causal attention never
    looks; only answer positions reach the output layer.
    """
    flat = [row for pair in rows for row in pair]
    width = max(len(prompt) + len(answer) for prompt, answer in flat) - 1
    tokens = torch.zeros(len(flat), width, dtype=torch.long)
    target = torch.full((len(flat), width), -1)
    for i, (prompt, answer) in enumerate(flat):
        tokens[i, : len(prompt) + len(answer) - 1] = torch.tensor([*prompt, *answer[:-1]])
        target[i, len(prompt) - 1 : len(prompt) + len(answer) - 1] = torch.tensor(answer)
    device = inner.lm_head.weight.device
    tokens, target = tokens.to(device), target.to(device)
    asked = target >= 0
    x = inner.model.embed_tokens(tokens)
    n = 0 if before is None else len(before)
    if before is not None:
        x = torch.cat([before.to(x.dtype).expand(len(flat), -1, -1), x], dim=1)
    hidden = inner.model(inputs_embeds=x, use_cache=False).last_hidden_state[:, n:][asked]
    nll = F.cross_entropy(inner.lm_head(hidden).float(), target[asked], reduction="none")
    return -torch.zeros(len(flat), device=device).index_add(0, asked.nonzero()[:, 0], nll).view(-1, 2)
