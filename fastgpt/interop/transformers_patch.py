"""fastgpt's operators inside a GPT-2 of Hugging Face's transformers, in one line, and out again.

    model = transformers.GPT2LMHeadModel.from_pretrained("gpt2")
    fastgpt.patch(model)

A patched module keeps its place, parameters, buffers, hooks and attributes; only its class becomes
a subclass of the original one, with another `forward`
(`fastgpt.interop.transformers_modules`). Names in the `state_dict`, `save_pretrained`, `generate`,
the Trainer, `copy.deepcopy` and pickling keep working. A pickle of a patched model needs fastgpt to
load; `save_pretrained` writes an ordinary model.
"""

from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from fastgpt import ops as backends

if TYPE_CHECKING:
    from torch import nn

Model = TypeVar("Model", bound="nn.Module")


def patch(model: Model, ops: str = "auto") -> Model:
    """Make a GPT-2 of transformers (5.0 or newer) compute with fastgpt's operators; return it.

    model: a `GPT2LMHeadModel`, `GPT2Model` or another of transformers' GPT-2s, changed in place;
    ops: the backend, as for `fastgpt.GPT`. Results differ by rounding only. What is replaced:

    - every LayerNorm, and the addition before a block's second one;
    - GELU in its tanh form (``gelu_new``, ``gelu_pytorch_tanh``); another activation stays;
    - causal attention, where the model's attention is ``"sdpa"`` (the default), no key/value cache
      is filled yet and transformers made no mask: none was given, or one without padding. Calls
      with padding, a filled cache, cross-attention, unusual scaling or another attention
      implementation run transformers' own attention;
    - in training (``model.train()``) the loss of a `GPT2LMHeadModel` that is given `labels` by
      name: **its output then has** ``logits=None``, because they are never all held. In evaluation,
      with a loss function of your own, `logits_to_keep`, `shift_labels` or ``return_dict=False``
      transformers' own head and loss run, and the logits are there. `num_items_in_batch`, which
      the Trainer gives, is honoured.

    A module that is not exactly of the class transformers builds (an adapter, a quantised layer, a
    subclass of your own) is left alone. Patch before `torch.compile` or wrapping for several GPUs.

    TypeError: the model is not a GPT-2 of transformers. ValueError: it is patched already, or there
    is no such backend. ImportError: transformers is missing or too old.
    """
    backends.check(ops)
    modules = _import_modules()
    if not isinstance(model, modules.GPT2PreTrainedModel):
        raise TypeError(
            "patch takes a GPT-2 of transformers, such as GPT2LMHeadModel or GPT2Model, before it "
            f"is wrapped or compiled, not {type(model).__module__}.{type(model).__qualname__}"
        )
    if _patched(model):
        raise ValueError("the model is patched already; to change its ops, unpatch it first")
    backends.get(ops)  # ImportError, if it cannot be had, is better now than later
    for module in model.modules():
        if fast := modules.FAST.get(type(module)):
            module.__class__ = fast
            module.fastgpt_ops = ops
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`: give every module its own class back; return the model.

    ValueError unless the model is patched.
    """
    patched = _patched(model)
    if not patched:
        raise ValueError("the model is not patched: there is nothing to undo")
    for module in patched:
        module.__class__ = type(module).__bases__[0]
        del module.fastgpt_ops
    return model


def _patched(model: "nn.Module") -> "list[nn.Module]":
    return [module for module in model.modules() if "fastgpt_ops" in vars(module)]


def _import_modules() -> ModuleType:
    try:
        from fastgpt.interop import transformers_modules as patched_gpt2
    except ImportError as error:
        raise ImportError(
            "fastgpt.patch needs transformers 5.0 or newer: pip install 'transformers>=5'"
        ) from error
    return patched_gpt2
