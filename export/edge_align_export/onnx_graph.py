"""A decoder as an ONNX graph, written straight from its weights with ONNX Runtime's fused operators.

Inputs: `tokens` (batch, length) int64; `steering` (rows, n_layer, d_model) float32, rows 1 or batch, zero for the
base (not an initialiser with that default: IO binding does not know overridable initialisers);
`last` (batch,) int32: how many tokens a row then holds, less one; `total` () int32: the most a row then holds;
`wanted` (n,) int64: positions within `tokens` whose logits to compute; `past.N.key`, `past.N.value` (batch, n_head_kv,
room, d_head). Outputs: `logits` (batch, n, n_vocab) float32 and `present.N.key|value`, which may be the pasts' memory.

Why not a traced export: docs/decisions/0007-onnx-graph.md.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from onnx import helper, ModelProto, NodeProto, TensorProto, ValueInfoProto

from edge_align_export.decoder_spec import Checkpoint
from edge_align_export.onnx_weights import BLOCK, WeightFile

OPSET = 20
MICROSOFT = "com.microsoft"
ENCODER_BLOCKS = 2
Precision = Literal["fp32", "fp16", "int8", "int4"]
Accuracy = Literal[0, 4]
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


class _Graph:
    """Nodes and the initialisers they use. Values are named by the node that makes them."""

    def __init__(self, checkpoint: Checkpoint, weights: WeightFile, *, accuracy: Accuracy) -> None:
        self.checkpoint, self.spec, self.weights, self.accuracy = checkpoint, checkpoint.spec, weights, accuracy
        self.float = TensorProto.FLOAT16 if weights.precision == "fp16" else FLOAT
        self.nodes: list[NodeProto] = []
        self.used: dict[str, TensorProto] = {}
        self._widened: dict[str, str] = {}

    def node(
        self, kind: str, inputs: list[str], name: str, *, domain: str = "", n_out: int = 1, **attributes: Any
    ) -> str:
        outputs = [name, *(f"{name}.{i}" for i in range(1, n_out))]
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes))
        return name

    def use(self, tensor: TensorProto) -> str:
        self.used[tensor.name] = tensor
        return str(tensor.name)

    def constant(self, name: str, array: np.ndarray) -> str:
        return self.use(self.weights.constant(name, array))

    # -- layers ----------------------------------------------------------------------------------------------------
    def weight(self, *names: str) -> np.ndarray:
        """Weights of one input, stacked by rows."""
        return np.concatenate([self.checkpoint.read(name) for name in names])

    def linear(self, x: str, width: int, name: str, *parts: str) -> str:
        """x (…, width) times the stacked matrices `parts`, plus their biases where there are any."""
        if self.weights.bits == 4:
            packed = self.weights.quantised_affine(name, lambda: self.weight(*parts))
            out = self.quantised_product(self.widened(x), width + width // BLOCK, name, packed)
        elif self.weights.bits == 8:
            out = self.quantised_product(x, width, name, self.weights.quantised(name, lambda: self.weight(*parts)))
        else:
            matrix = self.use(self.weights.matrix(f"{name}.weight", lambda: self.weight(*parts).T))
            out = self.node("MatMul", [x, matrix], name)
        biases = [f"{part}.bias" for part in parts]
        if biases[0] in self.checkpoint.names:
            bias = self.use(self.weights.matrix(f"{name}.bias", lambda: self.weight(*biases)))
            out = self.node("Add", [out, bias], f"{name}.biased")
        return out

    def quantised_product(self, x: str, width: int, name: str, packed: list[TensorProto]) -> str:
        return self.node(
            "MatMulNBits",
            [x, *map(self.use, packed)],
            name,
            domain=MICROSOFT,
            K=width,
            N=packed[0].dims[0],
            bits=packed[0].dims[2] * 8 // BLOCK,
            block_size=BLOCK,
            **({"accuracy_level": self.accuracy} if self.accuracy else {}),
        )

    def widened(self, x: str) -> str:
        """x with the means of its blocks behind it, which the offsets of 4-bit weights are multiplied by."""
        if x not in self._widened:
            means = self.node("AveragePool", [x], f"{x}.means", kernel_shape=[BLOCK], strides=[BLOCK])
            self._widened[x] = self.node("Concat", [x, means], f"{x}.wide", axis=-1)
        return self._widened[x]

    def norm_weight(self, name: str) -> str:
        return self.use(self.weights.matrix(f"{name}.weight", lambda: self.checkpoint.read(name)))

    def norm(self, x: str, name: str, out: str) -> str:
        inputs = [x, self.norm_weight(name)]
        return self.node("SimplifiedLayerNormalization", inputs, out, axis=-1, epsilon=self.spec.rms_eps, stash_type=1)

    def add_and_norm(self, x: str, branch: str, norm: str, out: str) -> tuple[str, str]:
        """(the norm of x + branch, x + branch)."""
        self.nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [x, branch, self.norm_weight(norm)],
                [out, "", "", f"{out}.sum"],
                name=out,
                domain=MICROSOFT,
                epsilon=self.spec.rms_eps,
            )
        )
        return out, f"{out}.sum"

    def embed(self) -> str:
        """Hidden states before the first block."""
        if self.weights.bits:
            data, scales = self.weights.quantised_table("embed", lambda: self.checkpoint.read("embed"))
            self.node(
                "GatherBlockQuantized",
                [self.use(data), "tokens", self.use(scales)],
                "embedded.blocks",
                domain=MICROSOFT,
                gather_axis=0,
                quantize_axis=2,
                block_size=BLOCK,
                bits=8,
            )
            shape = self.constant("embedded.shape", np.array([0, 0, self.spec.d_model], np.int64))
            x = self.node("Reshape", ["embedded.blocks", shape], "embedded")
        else:
            table = self.use(self.weights.matrix("embed.weight", lambda: self.checkpoint.read("embed")))
            x = self.node("Gather", [table, "tokens"], "embedded")
        if self.spec.embed_scale == 1.0:
            return x
        scale = self.use(self.weights.matrix("embed.scale", lambda: np.array(self.spec.embed_scale, np.float32)))
        return self.node("Mul", [x, scale], "embedded.scaled")

    def head(self, x: str) -> None:
        """Logits; always float32."""
        tied = "head" not in self.checkpoint.names
        name = "embed" if tied else "head"
        if self.weights.bits:  # 8 bits: rounding here goes straight into the logits
            packed = self.weights.quantised(name, lambda: self.checkpoint.read(name))
            out = self.quantised_product(x, self.spec.d_model, "logits.all", packed)
        else:
            table = self.use(self.weights.matrix(f"{name}.weight", lambda: self.checkpoint.read(name)))
            out = self.node("FusedMatMul", [x, table], "logits.all", domain=MICROSOFT, transB=1)
        if self.float != FLOAT:
            out = self.node("Cast", [out], "logits.float", to=FLOAT)
        if self.spec.logit_cap:
            cap = self.constant("logits.cap", np.array(self.spec.logit_cap, np.float32))
            bounded = self.node("Tanh", [self.node("Div", [out, cap], "logits.scaled")], "logits.bounded")
            out = self.node("Mul", [bounded, cap], "logits.capped")
        self.nodes[-1].output[0] = "logits"

    def attention(self, il: int, x: str, *, cached: bool) -> str:
        s, p = self.spec, f"{il}."
        q, k, v = self.linear(x, s.d_model, f"{p}qkv", f"{p}q", f"{p}k", f"{p}v"), "", ""
        if f"{p}q_norm" in self.checkpoint.names:
            widths = np.array([s.n_head * s.d_head, s.n_head_kv * s.d_head, s.n_head_kv * s.d_head], np.int64)
            names = [f"{p}q.raw", f"{p}k.raw", f"{p}v.raw"]
            self.nodes.append(helper.make_node("Split", [q, self.constant("qkv.widths", widths)], names, axis=-1))
            q, k = (self.head_norm(names[i], f"{p}{part}_norm", int(widths[i])) for i, part in enumerate("qk"))
            v = names[2]
        cos, sin = self.rotary(il)
        past = [f"past.{il}.key", f"past.{il}.value"] if cached else ["", ""]
        present = [f"present.{il}.key", f"present.{il}.value"]
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [q, k, v, *past, "last", "total", cos, sin],
                [f"{p}attention", *present],
                name=f"{p}attention",
                domain=MICROSOFT,
                num_heads=s.n_head,
                kv_num_heads=s.n_head_kv,
                scale=s.attention_scale,
                do_rotary=1,
                **({"local_window_size": s.windows[il]} if s.windows[il] else {}),
                **({"softcap": s.attention_cap} if s.attention_cap else {}),
            )
        )
        return self.linear(f"{p}attention", s.n_head * s.d_head, f"{p}o", f"{p}o")

    def head_norm(self, x: str, name: str, width: int) -> str:
        """RMS norm of each head of x (batch, length, width)."""
        heads = self.constant("heads.shape", np.array([0, 0, -1, self.spec.d_head], np.int64))
        split = self.node("Reshape", [x, heads], f"{name}.heads")
        normed = self.norm(split, name, f"{name}.normed")
        flat = self.constant(f"flat.{width}", np.array([0, 0, width], np.int64))
        return self.node("Reshape", [normed, flat], f"{name}.flat")

    def rotary(self, il: int) -> tuple[str, str]:
        """Tables (n_ctx, d_head / 2) of cosines and sines; blocks with the same frequencies share them."""
        first = self.spec.frequencies.index(self.spec.frequencies[il])
        angles = np.arange(self.spec.n_ctx)[:, None] * np.array(self.spec.frequencies[il])
        cos = self.use(self.weights.matrix(f"rotary.{first}.cos", lambda: np.cos(angles)))
        return cos, self.use(self.weights.matrix(f"rotary.{first}.sin", lambda: np.sin(angles)))

    def feed_forward(self, il: int, x: str) -> str:
        p = f"{il}."
        gate = self.linear(x, self.spec.d_model, f"{p}gate", f"{p}gate")
        up = self.linear(x, self.spec.d_model, f"{p}up", f"{p}up")
        if self.spec.activation == "silu":
            active = self.node("QuickGelu", [gate], f"{p}active", domain=MICROSOFT, alpha=1.0)  # x sigmoid(x)
        else:
            active = self.node("Gelu", [gate], f"{p}active", approximate="tanh")
        gated = self.node("Mul", [active, up], f"{p}gated")
        return self.linear(gated, self.spec.d_ff, f"{p}down", f"{p}down")

    def block(self, il: int, x: str, normed: str, *, cached: bool) -> tuple[str, str]:
        """(residual stream before the feed-forward branch joins it, that branch); their sum is the block's output."""
        p = f"{il}."
        branch = self.attention(il, normed, cached=cached)
        if f"{p}attn_post_norm" in self.checkpoint.names:
            branch = self.norm(branch, f"{p}attn_post_norm", f"{p}attention.normed")
        normed, x = self.add_and_norm(x, branch, f"{p}ffn_norm", f"{p}middle")
        branch = self.feed_forward(il, normed)
        if f"{p}ffn_post_norm" in self.checkpoint.names:
            branch = self.norm(branch, f"{p}ffn_post_norm", f"{p}ffn.normed")
        return x, branch

    def model(self, inputs: list[ValueInfoProto], outputs: list[ValueInfoProto]) -> ModelProto:
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, [*self.used.values()])
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="edge-align")


def decoder_graph(checkpoint: Checkpoint, weights: WeightFile) -> ModelProto:
    """The whole model with its steering input; large initialisers go to `weights` as they are read."""
    g, s = _Graph(checkpoint, weights, accuracy=4 if weights.bits else 0), checkpoint.spec
    steering = "steering" if g.float == FLOAT else g.node("Cast", ["steering"], "steering.half", to=g.float)
    rows = [f"steering.{il}" for il in range(s.n_layer)]
    g.nodes.append(helper.make_node("Split", [steering], rows, name="rows", axis=1, num_outputs=s.n_layer))
    x = g.embed()
    normed = g.norm(x, "0.attn_norm", "0.start")
    for il in range(s.n_layer):
        x, branch = g.block(il, x, normed, cached=True)
        # on the branch, so that the sum with the residual stream stays fused with the norm after it
        branch = g.node("Add", [branch, rows[il]], f"{il}.steered")
        last = il + 1 == s.n_layer
        normed, x = g.add_and_norm(x, branch, "norm" if last else f"{il + 1}.attn_norm", f"{il + 1}.start")
    g.head(g.node("Gather", [normed, "wanted"], "answered", axis=1))
    inputs = [
        *_common_inputs(),
        helper.make_tensor_value_info("steering", FLOAT, ["rows", s.n_layer, s.d_model]),
        helper.make_tensor_value_info("wanted", INT64, ["n"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", FLOAT, ["batch", "n", s.n_vocab])]
    for il in range(s.n_layer):
        for part in ("key", "value"):
            shape = ["batch", s.n_head_kv, "room", s.d_head]
            inputs.append(helper.make_tensor_value_info(f"past.{il}.{part}", g.float, shape))
            outputs.append(
                helper.make_tensor_value_info(f"present.{il}.{part}", g.float, ["batch", shape[1], "kept", s.d_head])
            )
    return g.model(inputs, outputs)


def encoder_graph(checkpoint: Checkpoint, weights: WeightFile) -> ModelProto:
    """The first blocks alone: outputs `embedded`, `hidden.0`, `hidden.1`, each (batch, length, d_model) float32.

    The same weights in the same file; products of quantised weights are computed in float32 here.
    """
    g, s = _Graph(checkpoint, weights, accuracy=0), checkpoint.spec
    x = g.embed()
    made = ["embedded"]  # as in the table, before any scaling
    normed = g.norm(x, "0.attn_norm", "0.start")
    n_blocks = min(ENCODER_BLOCKS, s.n_layer)
    for il in range(n_blocks):
        x, branch = g.block(il, x, normed, cached=False)
        if il + 1 < n_blocks:
            normed, x = g.add_and_norm(x, branch, f"{il + 1}.attn_norm", f"{il + 1}.start")
        else:
            x = g.node("Add", [x, branch], f"{il}.out")
        made.append(x)
    names = ["embedding", *(f"hidden.{il}" for il in range(n_blocks))]
    for name, value in zip(names, made, strict=True):
        g.node("Cast", [value], name, to=FLOAT)
    outputs = [helper.make_tensor_value_info(name, FLOAT, ["batch", "length", s.d_model]) for name in names]
    return g.model(_common_inputs(), outputs)


def _common_inputs() -> list[ValueInfoProto]:
    return [
        helper.make_tensor_value_info("tokens", INT64, ["batch", "length"]),
        helper.make_tensor_value_info("last", TensorProto.INT32, ["batch"]),
        helper.make_tensor_value_info("total", TensorProto.INT32, []),
    ]
