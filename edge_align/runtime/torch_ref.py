"""A small Llama in PyTorch with the GGUF's own (dequantised) weights.

Three uses: its first blocks are the answer encoder (`edge_align.features`), the whole of it is the reference that
other engines are compared with, and its batches may carry a different steering vector in every row.
Weights are those of the GGUF, so q and k are laid out for ggml's interleaved rotary embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from edge_align.errors import BackendUnavailable, ModelLoadError
from edge_align.gguf_header import GGUFHeader
from edge_align.gguf_tensors import GGUFTensors
from edge_align.runtime.positions import PositionSums
from edge_align.runtime.torch_rows import attend_one, batches, KVCache

SUPPORTED = ("llama",)
"""Values of `general.architecture` this module computes."""


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Sizes and constants of a Llama checkpoint, under edge-align's names."""

    n_layer: int
    d_model: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    rope_base: float
    rms_eps: float

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_head


def read_shape(header: GGUFHeader) -> LlamaShape:
    """Shape of a checkpoint. Raises BackendUnavailable for an architecture other than `SUPPORTED`, and its variants."""
    if header.architecture not in SUPPORTED:
        raise BackendUnavailable(f"PyTorch computes {', '.join(SUPPORTED)} models here, not {header.architecture!r}")

    def value(key: str, default: float | None = None) -> float:
        found = header.metadata.get(f"{header.architecture}.{key}", default)
        if not isinstance(found, int | float):
            raise ModelLoadError(f"the GGUF has no usable {header.architecture}.{key}")
        return found

    n_head = int(value("attention.head_count"))
    variants = {
        "scaled rotary embeddings": "rope_freqs.weight" in header.tensors
        or header.metadata.get(f"{header.architecture}.rope.scaling.type", "none") != "none",
        "heads of another width": value("attention.key_length", header.d_model // n_head) * n_head != header.d_model,
        "biases": any(name.startswith("blk.0.") and name.endswith(".bias") for name in header.tensors),
        "experts": "blk.0.ffn_gate_inp.weight" in header.tensors,
    }
    found = [what for what, there in variants.items() if there]
    if found:
        raise BackendUnavailable(f"PyTorch does not compute {' and '.join(found)} here")
    return LlamaShape(
        n_layer=header.n_layer,
        d_model=header.d_model,
        n_head=n_head,
        n_head_kv=int(value("attention.head_count_kv", n_head)),
        n_vocab=header.tensors["token_embd.weight"].shape[1],
        rope_base=value("rope.freq_base", 10000.0),
        rms_eps=value("attention.layer_norm_rms_epsilon"),
    )


@dataclass(slots=True)
class Block:
    """Weights of one decoder block. Projections of one input are stacked, with the norm's weight folded in."""

    qkv: torch.Tensor  # (d_model + 2 * n_head_kv * d_head, d_model)
    out: torch.Tensor  # (d_model, d_model)
    gate_up: torch.Tensor  # (2 * d_ff, d_model)
    down: torch.Tensor  # (d_model, d_ff)


def fastest() -> tuple[str, torch.dtype]:
    """The device PyTorch is fastest on here, and bfloat16 where that has instructions of its own, else float32."""
    if torch.cuda.is_available():
        return "cuda", torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return "cpu", torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


class LlamaReference:
    """The model, or its first `n_layer` blocks.

    dtype: float32 for parity, bfloat16 for speed (the residual stream then is bfloat16 too). device: where it runs; the
    answers of every method are on the CPU again, those of `hidden` and `head` are not.
    Raises ModelLoadError when the file is not a readable GGUF, BackendUnavailable for other architectures.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        n_layer: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tensors = GGUFTensors(Path(path))
        self.shape = read_shape(self.tensors.header)
        self.dtype, self.device = dtype, torch.device(device)
        self.n_layer = self.shape.n_layer if n_layer is None else min(n_layer, self.shape.n_layer)
        self.blocks = [self._block(il) for il in range(self.n_layer)]
        self._embedding: torch.Tensor | None = None
        self._head: torch.Tensor | None = None
        half = self.shape.d_head // 2
        steps = torch.arange(half, dtype=torch.float64, device=self.device)
        self._inv_freq = self.shape.rope_base ** (-steps / half)
        if self.device.type != "cpu":
            self._load_head()  # looking rows up on the CPU would wait for the device at every token

    def _weights(self, *names: str, norm: str | None = None) -> torch.Tensor:
        """Tensors stacked by rows; the columns times `norm`, the weight of the RMS norm before them."""
        with torch.inference_mode(False):  # whoever asks first, gradients may pass through them later
            stacked = torch.cat([torch.from_numpy(self.tensors.read(name)) for name in names])
            if norm is not None:
                stacked = stacked * torch.from_numpy(self.tensors.read(norm))
            return stacked.to(self.device, self.dtype)

    def _block(self, il: int) -> Block:
        p = f"blk.{il}."
        return Block(
            qkv=self._weights(
                p + "attn_q.weight", p + "attn_k.weight", p + "attn_v.weight", norm=p + "attn_norm.weight"
            ),
            out=self._weights(p + "attn_output.weight"),
            gate_up=self._weights(p + "ffn_gate.weight", p + "ffn_up.weight", norm=p + "ffn_norm.weight"),
            down=self._weights(p + "ffn_down.weight"),
        )

    # -- parts -----------------------------------------------------------------------------------------------------
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """(…,) int64 token ids -> (…, d_model); only the rows in use are dequantised."""
        if self._embedding is not None:
            return F.embedding(tokens, self._embedding)
        used, inverse = torch.unique(tokens, return_inverse=True)
        return F.embedding(
            inverse, torch.from_numpy(self.tensors.rows("token_embd.weight", used.numpy())).to(self.dtype)
        )

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, d_model) residual stream after the last block -> (…, n_vocab) logits."""
        return F.linear(self._norm(hidden), self._load_head())

    def _load_head(self) -> torch.Tensor:
        if self._head is None:
            tied = "output.weight" not in self.tensors.header.tensors
            self._embedding = self._weights("token_embd.weight")
            self._head = self._weights("token_embd.weight" if tied else "output.weight", norm="output_norm.weight")
        return self._head

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        """RMS norm without its weight, which is folded into the projection that follows."""
        norm: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = (norm.square() / self.shape.d_model + self.shape.rms_eps).rsqrt()
        return x * inverse.to(x.dtype)

    def rotary(self, positions: torch.Tensor) -> torch.Tensor:
        """(B, T) positions -> (B, 1, T, d_head / 2) unit complex numbers."""
        angles = positions.to(torch.float64)[:, None, :, None] * self._inv_freq
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    def _rotate(self, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * rotary).flatten(-2).to(x.dtype)

    def block(
        self,
        il: int,
        x: torch.Tensor,
        rotary: torch.Tensor,
        mask: torch.Tensor | None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Output of block `il` for x (B, T, d_model); mask (B, 1, T, S) True where a query may look."""
        w, s = self.blocks[il], self.shape
        batch, length, _ = x.shape
        widths = [s.d_model, s.n_head_kv * s.d_head, s.n_head_kv * s.d_head]
        q, k, v = torch.split(F.linear(self._norm(x), w.qkv), widths, dim=-1)
        q = self._rotate(q.view(batch, length, s.n_head, s.d_head).transpose(1, 2), rotary)
        k = self._rotate(k.view(batch, length, s.n_head_kv, s.d_head).transpose(1, 2), rotary)
        v = v.view(batch, length, s.n_head_kv, s.d_head).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(il, k, v)
        if length == 1 and mask is not None:
            y = attend_one(q, k, v, mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        x = x + F.linear(y.transpose(1, 2).reshape(batch, length, s.d_model), w.out)
        gate, up = F.linear(self._norm(x), w.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, w.down)

    # -- whole passes ----------------------------------------------------------------------------------------------
    def hidden(
        self,
        tokens: torch.Tensor,
        *,
        vectors: torch.Tensor | None = None,
        steered: torch.Tensor | None = None,
        layers: Sequence[int] = (),
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Residual stream after the last block held, and the outputs of `layers`, for right-padded rows.

        tokens (B, T) int64; vectors (B or 1, n_layer, d_model) added at the positions where steered (B, T) is True.
        """
        batch, length = tokens.shape
        rotary = self.rotary(torch.arange(length, device=self.device)[None])
        x = self.embed(tokens)
        kept = []
        for il in range(self.n_layer):
            x = self.block(il, x, rotary, None)
            if vectors is not None and il > 0:
                delta = vectors[:, il, None, :].to(x.dtype)
                x = x + (delta if steered is None else delta * steered[..., None])
            if il in layers:
                kept.append(x)
        return x, kept

    @torch.inference_mode()
    def score(self, prompt: Sequence[int], completion: Sequence[int], vectors: np.ndarray | None = None) -> np.ndarray:
        """Teacher-forced logits (len(completion), n_vocab) float32; steered from the last prompt token on."""
        tokens = torch.tensor([[*prompt, *completion[:-1]]], device=self.device)
        steered = torch.arange(tokens.shape[1], device=self.device)[None] >= len(prompt) - 1
        steering = None if vectors is None else torch.from_numpy(np.array(vectors))[None].to(self.device)
        hidden, _ = self.hidden(tokens, vectors=steering, steered=steered)
        return self.head(hidden[0, len(prompt) - 1 :]).float().cpu().numpy()

    @torch.inference_mode()
    def log_probs(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, batch: int = 24
    ) -> list[np.ndarray]:
        """Teacher-forced log-probability of every completion token without steering: (T_i,) float32 per row."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(completions[i]))
        found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(prompts)
        for start in range(0, len(order), batch):
            rows = [i for i in order[start : start + batch] if len(completions[i])]
            texts = [[*prompts[i], *completions[i]] for i in rows]
            tokens = torch.zeros(len(rows), max(map(len, texts), default=1), dtype=torch.long)
            for row, text in zip(tokens, texts, strict=True):
                row[: len(text)] = torch.tensor(text)
            tokens = tokens.to(self.device)
            hidden, _ = self.hidden(tokens)
            for j, i in enumerate(rows):
                first, last = len(prompts[i]), len(texts[j])
                logits = self.head(hidden[j, first - 1 : last - 1]).float()
                own = logits.gather(-1, tokens[j, first:last, None])[:, 0]
                found[i] = (own - logits.logsumexp(-1)).cpu().numpy()
        return found

    @torch.inference_mode()
    def mean_hidden(
        self,
        sequences: Sequence[Sequence[int]],
        spans: Sequence[tuple[int, int]],
        layers: Sequence[int],
        *,
        tokens_per_batch: int = 8192,
        positions: PositionSums | None = None,
    ) -> np.ndarray:
        """(n, len(layers), d_model) float32: mean output of each block over the span [first, last) of each row.

        positions: where the states are also added up by their distance from `first`.
        """
        out = np.empty((len(sequences), len(layers), self.shape.d_model), np.float32)
        lengths = [len(sequence) for sequence in sequences]
        for rows in batches(sorted(range(len(lengths)), key=lengths.__getitem__), lengths, tokens_per_batch):
            tokens = torch.zeros(len(rows), len(sequences[rows[-1]]), dtype=torch.long)
            share = torch.zeros(tokens.shape)
            for j, i in enumerate(rows):
                first, last = spans[i]
                tokens[j, : len(sequences[i])] = torch.tensor(sequences[i])
                share[j, first:last] = 1 / (last - first)
            tokens, share = tokens.to(self.device), share.to(self.device)
            rotary = self.rotary(torch.arange(tokens.shape[1], device=self.device)[None])
            x = self.embed(tokens)
            for il in range(max(layers) + 1):
                x = self.block(il, x, rotary, None)
                for at in (at for at, layer in enumerate(layers) if layer == il):
                    out[rows, at] = torch.einsum("bt,btd->bd", share, x.float()).cpu().numpy()
                    if positions is not None:
                        for j, i in enumerate(rows):
                            positions.add(at, 0, x[j, slice(*spans[i])].float().cpu().numpy())
        return out
