"""Export GPT-2 as an ONNX graph of the operations that are fastest in onnxruntime on a CPU.

The graph is used by `benchmarks.generation_peers`. The com.microsoft operations are documented in
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. Keys and values are in
buffers `[B, H, S, D]` that the caller owns and GroupQueryAttention updates in place: each buffer is
bound both as past and as present.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fastgpt import GPT

Array = NDArray[Any]
BLOCK = 32  # number of weights of a row that share a scale
CHANNELS = -8  # 8 bits with one scale per row
# Bits of the weights of the transformer blocks and of the head (0: not quantized).
KINDS = {"float32": (0, 0), "int8": (8, 8), "int4": (4, 8), "int8_channels": (CHANNELS, CHANNELS)}
STANDARD = ("Add", "Gather", "LayerNormalization", "MatMul")  # the others are Microsoft's
DYNAMIC_QUANTIZATION = 4  # the accuracy_level of MatMulNBits that quantizes its input to int8


def write(model: GPT, path: Path, kind: str) -> None:
    """Write the graph of a GPT-2 with biases.

    kind: "float32"; "int8" or "int4" with one scale per block of weights; or "int8_channels" with
    onnxruntime's dynamic quantization, which is slower for one token, but faster for many.

    Inputs of the graph: `ids` int64 [B, T], `positions` int64 [T], `last_key` int32 [B] (the number
    of tokens so far minus one), `total` int32 [1] (the number of tokens so far), `past.key.i` and
    `past.value.i`. Outputs: `logits` float32 [B, V] after the last token, `present.key.i` and
    `present.value.i`.
    """
    graph = _Graph(model, *KINDS[kind])
    graph.network()
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_graph(
        graph.nodes, "gpt2", graph.inputs(), graph.outputs(), initializer=graph.initializers
    )
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=10), path)


class _Graph:
    """Builder of the graph; values are identified by their names."""

    def __init__(self, model: GPT, rounding: int, head: int) -> None:
        self.config = model.config
        self.weights = {name: _numpy(value) for name, value in model.state_dict().items()}
        self.weights["lm_head.weight"] = _numpy(model.head_weight)
        self.rounding, self.head = rounding, head
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def network(self) -> None:
        """Add all nodes."""
        tokens = self.node("Gather", self.weight("wte.weight"), "ids")
        places = self.node("Gather", self.weight("wpe.weight"), "positions")
        total = self.node("Add", tokens, places)  # [B, T, C]
        first = [self.weight("h.0.ln_1.weight"), self.weight("h.0.ln_1.bias")]
        normed = self.node("LayerNormalization", total, *first, epsilon=self.config.layer_norm_eps)
        for i in range(self.config.n_layer):
            normed, total = self.block(i, normed, total)
        self.linear("lm_head", normed, self.head, outputs=("logits",))

    def block(self, i: int, normed: str, total: str) -> tuple[str, str]:
        """Add a block; take and return the residual stream and its next norm."""
        last = i + 1 == self.config.n_layer
        at = f"h.{i}."
        qkv = self.linear(at + "attn.c_attn", normed, self.rounding, bias=True)
        y = self.attention(i, qkv)
        if last:  # only the logits after the last token are needed
            y, total = self.last_token(y), self.last_token(total)
        y = self.linear(at + "attn.c_proj", y, self.rounding)
        normed, total = self.add_and_norm(y, total, at + "ln_2", at + "attn.c_proj.bias")
        y = self.linear(at + "mlp.c_fc", normed, self.rounding)
        y = self.node("FastGelu", y, self.weight(at + "mlp.c_fc.bias"))
        y = self.linear(at + "mlp.c_proj", y, self.rounding)
        next_norm = "ln_f" if last else f"h.{i + 1}.ln_1"
        return self.add_and_norm(y, total, next_norm, at + "mlp.c_proj.bias")

    def attention(self, i: int, qkv: str) -> str:
        """Add causal attention of `qkv` [B, T, 3C] over the key/value buffers."""
        return self.node(
            *("GroupQueryAttention", qkv, "", "", f"past.key.{i}", f"past.value.{i}"),
            *("last_key", "total"),
            outputs=(f"h.{i}.attention", f"present.key.{i}", f"present.value.{i}"),
            num_heads=self.config.n_head,
            kv_num_heads=self.config.n_head,
        )

    def add_and_norm(self, y: str, total: str, norm: str, bias: str) -> tuple[str, str]:
        """Add `y` + bias to the residual stream; return the norm of the sum and the sum."""
        weights = [self.weight(n) for n in (f"{norm}.weight", f"{norm}.bias", bias)]
        outputs = (f"{norm}.normed", "", "", f"{norm}.sum")
        epsilon = self.config.layer_norm_eps
        self.node("SkipLayerNormalization", y, total, *weights, outputs=outputs, epsilon=epsilon)
        return outputs[0], outputs[3]

    def linear(
        self, name: str, x: str, bits: int, bias: bool = False, outputs: tuple[str, ...] = ()
    ) -> str:
        """Add x W^T with W quantized to `bits` (0: not quantized), plus the bias if `bias`."""
        weight = self.weights[f"{name}.weight"]  # [out, in]
        shift = [self.weight(f"{name}.bias")] if bias else []
        if bits == 0:
            y = self.node("MatMul", x, self.constant(f"{name}.T", weight.T), outputs=outputs)
            return self.node("Add", y, *shift) if bias else y
        stored, scales = _by_row(weight) if bits == CHANNELS else _in_blocks(weight, bits)
        matrix = [self.constant(f"{name}.stored", stored), self.constant(f"{name}.scales", scales)]
        if bits == CHANNELS:
            return self.node("DynamicQuantizeMatMul", x, *matrix, "", *shift, outputs=outputs)
        n_rows, n_columns = weight.shape
        return self.node(
            *("MatMulNBits", x, *matrix, "", "", *shift),
            outputs=outputs,
            N=n_rows,
            K=n_columns,
            bits=bits,
            block_size=BLOCK,
            accuracy_level=DYNAMIC_QUANTIZATION,
        )

    def last_token(self, x: str) -> str:
        """Add the selection of the last position: [B, T, C] -> [B, C]."""
        return self.node("Gather", x, self.constant("last", np.array(-1)), axis=1)

    def node(
        self, kind: str, *inputs: str, outputs: tuple[str, ...] = (), **attributes: Any
    ) -> str:
        """Add a node, by default with one output; return the name of the first output."""
        outputs = outputs or (f"{kind}.{len(self.nodes)}",)
        domain = "" if kind in STANDARD else "com.microsoft"
        self.nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def weight(self, name: str) -> str:
        """Add one of the model's weights unchanged."""
        return self.constant(name, self.weights[name])

    def constant(self, name: str, value: Array) -> str:
        """Add a constant, unless one of this name exists."""
        if all(name != tensor.name for tensor in self.initializers):
            contiguous = np.ascontiguousarray(value).reshape(value.shape)
            self.initializers.append(numpy_helper.from_array(contiguous, name))
        return name

    def inputs(self) -> list[onnx.ValueInfoProto]:
        """Return the inputs of the graph, which the caller binds."""
        return [
            _tensor("ids", TensorProto.INT64, "B", "T"),
            _tensor("positions", TensorProto.INT64, "T"),
            _tensor("last_key", TensorProto.INT32, "B"),
            _tensor("total", TensorProto.INT32, 1),
            *self._buffers("past"),
        ]

    def outputs(self) -> list[onnx.ValueInfoProto]:
        """Return the outputs of the graph."""
        logits = _tensor("logits", TensorProto.FLOAT, "B", self.config.vocab_size)
        return [logits, *self._buffers("present")]

    def _buffers(self, when: str) -> list[onnx.ValueInfoProto]:
        heads, width = self.config.n_head, self.config.n_embd
        return [
            _tensor(f"{when}.{kind}.{i}", TensorProto.FLOAT, "B", heads, "S", width // heads)
            for i in range(self.config.n_layer)
            for kind in ("key", "value")
        ]


def _tensor(name: str, dtype: int, *shape: str | int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def _in_blocks(weight: Array, bits: int) -> tuple[Array, Array]:
    """Quantize with one scale per block; values are stored unsigned, with half of the range added.

    [N, K] -> uint8 [N, K / BLOCK, bytes of a block] and float32 [N, K / BLOCK].
    """
    rows, columns = weight.shape
    blocks = weight.reshape(rows, columns // BLOCK, BLOCK)
    half = 2 ** (bits - 1)
    furthest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    # Map the value of largest magnitude to -half: the range -half to half - 1 has one more value on
    # this side. The scale is negative where that value is positive.
    scales = furthest / -half
    whole = np.rint(blocks / np.where(scales == 0, 1, scales)) + half
    stored = whole.clip(0, 2 * half - 1).astype(np.uint8)
    if bits == 4:
        stored = stored[..., 0::2] | (stored[..., 1::2] << 4)
    return stored, scales[..., 0].astype(np.float32)


def _by_row(weight: Array) -> tuple[Array, Array]:
    """Quantize with one scale per row: [N, K] -> int8 [K, N] and float32 [N]."""
    scales = np.abs(weight).max(1) / 127
    whole = np.rint(weight / np.where(scales == 0, 1, scales)[:, None])
    return whole.astype(np.int8).T, scales.astype(np.float32)


def _numpy(value: torch.Tensor) -> Array:
    return value.detach().float().numpy()
