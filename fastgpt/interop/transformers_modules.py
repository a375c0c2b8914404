"""Subclasses of transformers' GPT-2 modules with another `forward`, for `transformers_patch`.

Each class has one base, the class that it replaces, and adds only an attribute with the name of the
backend, so a module can be patched by assigning its `__class__`. Class names equal those of the
bases, because FSDP's wrapping policies, the Trainer and `save_pretrained` depend on them. Calls
that fastgpt's operators do not support run the `forward` of the base class.
"""

import inspect
from functools import wraps
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, activations
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.gpt2.modeling_gpt2 import GPT2PreTrainedModel as GPT2PreTrainedModel

from fastgpt import ops as backends
from fastgpt.ops.reference import split_heads

# Arguments that transformers passes down to attention and that do not change its result.
INERT = {"use_cache", "position_ids", "cache_position", "num_items_in_batch"}
# The name of the argument `cache` before transformers 5.24; both are accepted.
OLD_CACHE = "past_key_values"


def backend(name: str, x: Tensor, width: int = 1, n_head: int | None = None) -> ModuleType:
    """Return the backend `name` for `x`; width and n_head only for operations they affect."""
    return backends.get(name, x.device, backends.kernels_fit(width, n_head or width, x.dtype))


class Patched(type):
    """The type of the classes below: an instance is made by patching one of the original class.

    So ``type(model)(config)`` and ``model.from_pretrained(folder)`` make an ordinary model, as they
    do without a patch. Copies and pickles do not call the class, and remain patched.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return a new instance of the original class."""
        return cls.__bases__[0](*args, **kwargs)


class LayerNorm(nn.LayerNorm, metaclass=Patched):
    """LayerNorm computed by `ops.layer_norm`."""

    fastgpt_ops: str

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of `x` `[B, T, C]`."""
        ops = backend(self.fastgpt_ops, x, x.size(-1))
        normed: Tensor = ops.layer_norm(x, self.weight, self.bias, self.eps)
        return normed


class NewGELUActivation(activations.NewGELUActivation, metaclass=Patched):
    """GELU computed by `ops.gelu`."""

    fastgpt_ops: str

    def forward(self, x: Tensor) -> Tensor:
        """Apply GELU to `x`, of any shape."""
        y: Tensor = backend(self.fastgpt_ops, x).gelu(x)
        return y


class GELUTanh(activations.GELUTanh, metaclass=Patched):
    """GELU computed by `ops.gelu`."""

    fastgpt_ops: str

    def forward(self, x: Tensor) -> Tensor:
        """Apply GELU to `x`, of any shape."""
        y: Tensor = backend(self.fastgpt_ops, x).gelu(x)
        return y


class GPT2Attention(modeling_gpt2.GPT2Attention, metaclass=Patched):
    """Attention computed by `ops.causal_attention`, for whole sequences without padding."""

    fastgpt_ops: str

    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> Any:
        """Return the output `[B, T, C]`, and None instead of the attention weights."""
        cache = kwargs.pop(OLD_CACHE, cache)
        if (
            attention_mask is not None  # for "sdpa", transformers passes none without padding
            or encoder_hidden_states is not None
            or output_attentions
            or not self._is_usual()
            or not _is_empty(cache, self.layer_idx)
            or any(value is not None for name, value in kwargs.items() if name not in INERT)
        ):
            return super().forward(
                hidden_states,
                cache,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                output_attentions=output_attentions,
                **kwargs,
            )
        qkv = self.c_attn(hidden_states)  # [B, T, 3C]
        if cache is not None:
            _, k, v = split_heads(qkv, self.num_heads)
            cache.update(k, v, self.layer_idx)
        dropout_p = self.attn_dropout.p if self.training else 0.0
        ops = backend(self.fastgpt_ops, qkv, self.embed_dim, self.num_heads)
        y = ops.causal_attention(qkv, self.num_heads, dropout_p)
        return self.resid_dropout(self.c_proj(y)), None

    def _is_usual(self) -> bool:
        """Return whether attention is configured as in GPT-2: causal, scaled by 1/√D only."""
        return (
            self.config._attn_implementation == "sdpa"
            and self.config.scale_attn_weights
            and not self.config.scale_attn_by_inverse_layer_idx
            and self.is_causal
            and getattr(self.config, "is_causal", True)
        )


class GPT2Block(modeling_gpt2.GPT2Block, metaclass=Patched):
    """Block with `ops.add_layer_norm` between attention and the MLP."""

    fastgpt_ops: str

    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        """Return the residual stream `[B, T, C]` after the block."""
        cache = kwargs.pop(OLD_CACHE, cache)
        norm = self.ln_2
        if encoder_hidden_states is not None or type(norm) is not LayerNorm or _is_watched(norm):
            y: Tensor = super().forward(
                hidden_states,
                cache,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                use_cache=use_cache,
                **kwargs,
            )
            return y
        attended, _ = self.attn(
            self.ln_1(hidden_states),
            cache,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        ops = backend(self.fastgpt_ops, hidden_states, hidden_states.size(-1))
        total, normed = ops.add_layer_norm(
            attended, hidden_states, norm.weight, norm.bias, norm.eps
        )
        result: Tensor = total + self.mlp(normed)
        return result


class GPT2LMHeadModel(modeling_gpt2.GPT2LMHeadModel, metaclass=Patched):
    """Model that uses `ops.linear_cross_entropy` in training, without materializing all logits."""

    fastgpt_ops: str

    @wraps(modeling_gpt2.GPT2LMHeadModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss without logits in training with labels; otherwise call the base class."""
        if len(args) > 1 or not self._takes_loss_alone(kwargs):
            return super().forward(*args, **kwargs)
        labels = kwargs.pop("labels")
        for handled in ("logits_to_keep", "return_dict"):
            kwargs.pop(handled, None)
        outputs = self.transformer(*args, **kwargs)
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithCrossAttentions(
            loss=self._loss(outputs.last_hidden_state, labels, **kwargs), logits=None, **others
        )

    def _takes_loss_alone(self, kwargs: dict[str, Any]) -> bool:
        """Return whether a call with these keyword arguments needs only the standard loss."""
        head = self.lm_head
        keep, named = kwargs.get("logits_to_keep"), kwargs.get("return_dict")
        return (
            self.training
            and kwargs.get("labels") is not None
            and kwargs.get("shift_labels") is None
            and (keep is None or (isinstance(keep, int) and keep == 0))
            and (self.config.return_dict if named is None else named)
            and self._has_usual_loss()
            and type(head) is nn.Linear
            and getattr(head, "bias", None) is None
            and not _is_watched(head)
        )

    def _has_usual_loss(self) -> bool:
        """Return whether `loss_function` is the standard one for causal language models.

        This repeats the lookup of the `loss_function` property. The property itself also warns that
        GPT-2 has no loss type, and torch.compile cannot trace a warning.
        """
        named = LOSS_MAPPING.get(getattr(self, "loss_type", None), ForCausalLMLoss)
        return getattr(self, "_loss_function", named) is ForCausalLMLoss

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        **_: Any,
    ) -> Tensor:
        """Return the loss of hidden states `[B, T, C]` against the labels of the next positions.

        The loss is the mean over the labels that are not `ignore_index`, or their sum divided by
        `num_items_in_batch`, which the Trainer counts over all micro-batches of a step.
        """
        # The last position of a row has no label after it.
        targets = F.pad(labels.to(hidden.device), (0, 1), value=ignore_index)[..., 1:].flatten()
        entropy = backend(self.fastgpt_ops, hidden).linear_cross_entropy
        if num_items_in_batch is None:
            mean: Tensor = entropy(hidden, self.lm_head.weight, targets, ignore_index)
            return mean
        n_counted = (targets != ignore_index).sum()
        # Without counted labels the mean is NaN, but the sum must be 0. In that case, count the
        # last position, whose loss is then multiplied by n_counted = 0.
        targets[-1] = torch.where(n_counted == 0, 0, ignore_index)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(hidden.device)
        mean = entropy(hidden, self.lm_head.weight, targets, ignore_index)
        return mean * n_counted / num_items_in_batch


def _is_empty(cache: Any, layer: int) -> bool:
    """Return whether there is no cache, or a `DynamicCache` that is empty for a layer."""
    return cache is None or (type(cache) is DynamicCache and cache.get_seq_length(layer) == 0)


def _is_watched(module: nn.Module) -> bool:
    """Return whether a module must be called itself: it has hooks or an overridden `forward`.

    Accelerate overrides `forward` to fetch offloaded parameters.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return any(hooks) or "forward" in vars(module)


def _check_arguments(cls: type[nn.Module], known: type[nn.Module]) -> None:
    """Raise ImportError if the `forward` of `known` has other arguments than that of `cls`."""
    theirs, ours = (list(inspect.signature(c.forward).parameters) for c in (known, cls))
    if ours != ["cache" if name == OLD_CACHE else name for name in theirs]:
        raise ImportError(f"{known} takes {theirs}, but fastgpt supports {ours}")


_check_arguments(GPT2Attention, modeling_gpt2.GPT2Attention)
_check_arguments(GPT2Block, modeling_gpt2.GPT2Block)

# Original class -> patched class. Only modules of exactly these classes are patched.
FAST: dict[type[nn.Module], type[nn.Module]] = {
    cls.__bases__[0]: cls
    for cls in (LayerNorm, NewGELUActivation, GELUTanh, GPT2Attention, GPT2Block, GPT2LMHeadModel)
}
