"""Export GPT-2 as a stateful OpenVINO model with its own key/value cache, as optimum-intel does.

The model is used by `benchmarks.generation_peers`. Attention consists of ReadValue, Gather by
`beam_idx`, Concat, ScaledDotProductAttention and Assign, which OpenVINO fuses into one operation:
https://docs.openvino.ai/2026/openvino-workflow/running-inference/inference-request/stateful-models.html
"""

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as op

from fastgpt import GPT

INT4_GROUP = 32  # number of weights of a row that share a scale


def write(model: GPT, path: Path, precision: str) -> None:
    """Write the model of a GPT-2 with biases to `path` (.xml, and .bin in the same folder).

    precision: "float32", or "int8" or "int4", quantized by NNCF with its default settings except
    the group size (with "int4", the embedding table and the head have 8 bits).

    Inputs of the model: `ids` int64 [B, T], `positions` int64 [T], `beam_idx` int32 [B]. Output:
    the logits float32 [B, V] after the last token.
    """
    made = _Network(model).model()
    if precision != "float32":
        import nncf

        modes = nncf.CompressWeightsMode
        settings: dict[str, Any] = {"mode": modes.INT8_ASYM}
        if precision == "int4":
            settings = {"mode": modes.INT4_SYM, "group_size": INT4_GROUP, "ratio": 1.0}
        made = nncf.compress_weights(made, **settings)
    ov.save_model(made, path, compress_to_fp16=False)


class _Network:
    """Builder of the model."""

    def __init__(self, model: GPT) -> None:
        self.config = model.config
        self.weights = {name: w.detach().float().numpy() for name, w in model.state_dict().items()}
        self.table = op.constant(self.weights["wte.weight"], name="wte.weight")
        tied = model.config.tie_weights
        self.head = self.table if tied else self.constant("lm_head.weight")
        self.ids = op.parameter([-1, -1], np.int64, name="ids")
        self.positions = op.parameter([-1], np.int64, name="positions")
        self.beam_idx = op.parameter([-1], np.int32, name="beam_idx")
        self.sinks: list[Any] = []

    def model(self) -> ov.Model:
        """Return the complete model."""
        tokens = op.gather(self.table, self.ids, 0)
        x = op.add(tokens, op.gather(self.constant("wpe.weight"), self.positions, 0))  # [B, T, C]
        for i in range(self.config.n_layer):
            x = self.block(i, x)
        logits = op.matmul(self.norm("ln_f", x), self.head, False, True)
        parameters = [self.ids, self.positions, self.beam_idx]
        for parameter in parameters:
            parameter.output(0).set_names({parameter.friendly_name})
        result = op.result(logits)
        result.output(0).set_names({"logits"})
        return ov.Model([result], self.sinks, parameters, "gpt2")

    def block(self, i: int, x: Any) -> Any:
        """Return x after a block; the last block returns only the last token: [B, C]."""
        y = self.attention(i, self.norm(f"h.{i}.ln_1", x))
        if i + 1 == self.config.n_layer:
            y, x = (op.gather(v, np.int64(-1), np.int64(1)) for v in (y, x))
        x = op.add(x, self.linear(f"h.{i}.attn.c_proj", y))
        y = self.linear(f"h.{i}.mlp.c_fc", self.norm(f"h.{i}.ln_2", x))
        return op.add(x, self.linear(f"h.{i}.mlp.c_proj", op.gelu(y, "TANH")))

    def attention(self, i: int, x: Any) -> Any:
        """Return causal attention over all tokens so far, before its projection."""
        qkv = op.split(self.linear(f"h.{i}.attn.c_attn", x), np.int64(2), 3)
        q, k, v = (self.by_head(qkv.output(n)) for n in range(3))
        k, v = self.remember(f"key.{i}", k), self.remember(f"value.{i}", v)
        y = op.transpose(op.scaled_dot_product_attention(q, k, v, causal=True), [0, 2, 1, 3])
        return op.reshape(y, [0, 0, self.config.n_embd], True)

    def by_head(self, x: Any) -> Any:
        """Split the heads: [B, T, C] -> [B, H, T, D]."""
        heads = self.config.n_head
        shape = [0, 0, heads, self.config.n_embd // heads]
        return op.transpose(op.reshape(x, shape, True), [0, 2, 1, 3])

    def remember(self, name: str, new: Any) -> Any:
        """Append `new` to the state of a name and return the result."""
        heads = self.config.n_head
        size = [-1, heads, -1, self.config.n_embd // heads]
        rows = op.gather(op.shape_of(self.ids), [0], 0)
        nothing = op.broadcast(np.float32(0), op.concat([rows, np.array([heads, 0, size[3]])], 0))
        kept = op.read_value(nothing, name, np.float32, size)
        together = op.concat([op.gather(kept, self.beam_idx, 0), new], 2)
        self.sinks.append(op.assign(together, name))
        return together

    def norm(self, name: str, x: Any) -> Any:
        """Return the LayerNorm of x."""
        normed = op.mvn(x, [-1], True, self.config.layer_norm_eps, "INSIDE_SQRT")
        scaled = op.multiply(normed, self.constant(f"{name}.weight"))
        return op.add(scaled, self.constant(f"{name}.bias"))

    def linear(self, name: str, x: Any) -> Any:
        """Return x W^T + b."""
        product = op.matmul(x, self.constant(f"{name}.weight"), False, True)
        return op.add(product, self.constant(f"{name}.bias"))

    def constant(self, name: str) -> Any:
        """Return one of the model's weights."""
        return op.constant(self.weights[name], name=name)
