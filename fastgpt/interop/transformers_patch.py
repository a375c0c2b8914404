"""Use fastgpt's operators in a GPT-2 of Hugging Face transformers, and undo it.

    model = transformers.GPT2LMHeadModel.from_pretrained("gpt2")
    fastgpt.patch(model)

A patched module remains the same object with its parameters, buffers, hooks and attributes; only
its class becomes a subclass of the original one, with another `forward`
(`fastgpt.interop.transformers_modules`). The names in the `state_dict` do not change, and
`save_pretrained`, `generate`, the Trainer, `copy.deepcopy` and pickling keep working. Loading a
pickle of a patched model requires fastgpt; `save_pretrained` saves an ordinary model, and
``type(model)(config)`` and ``model.from_pretrained`` return one, to be patched itself.
"""

from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from fastgpt import ops as backends

if TYPE_CHECKING:
    from torch import nn

Model = TypeVar("Model", bound="nn.Module")


def patch(model: Model, ops: str = "auto") -> Model:
    """Make a GPT-2 of transformers (5.0 or newer) use fastgpt's operators, and return it.

    model: a `GPT2LMHeadModel`, `GPT2Model` or another GPT-2 model of transformers, changed in
    place. ops: the backend, as for `fastgpt.GPT`. Results differ by rounding only.

    The following operations are replaced:

    - every LayerNorm, and the addition before the second one of a block;
    - GELU in its tanh form (``gelu_new``, ``gelu_pytorch_tanh``); other activations are kept;
    - causal attention, if the attention implementation is ``"sdpa"`` (the default), the key/value
      cache is empty, and transformers created no mask, that is, no attention mask was given or it
      has no padding. Calls with padding, a filled cache, cross-attention, unusual scaling or
      another attention implementation run transformers' own attention;
    - in training (``model.train()``), the loss of a `GPT2LMHeadModel` that is given `labels` as a
      keyword argument: **its output then has** ``logits=None``, because the logits are never all
      materialized. In evaluation, and with a custom loss function, `logits_to_keep`,
      `shift_labels` or ``return_dict=False``, transformers' own head and loss run and the logits
      are returned. `num_items_in_batch`, which the Trainer passes, is supported.

    Modules whose class is not exactly the one that transformers builds (adapters, quantized layers,
    your own subclasses) are not patched. Patch before `torch.compile` or wrapping for several GPUs.

    Raises: TypeError if the model is not a GPT-2 of transformers; ValueError if it is already
        patched, or for an unknown backend; ImportError if transformers is missing or too old.
    """
    backends.check(ops)
    modules = _import_modules()
    if not isinstance(model, modules.GPT2PreTrainedModel):
        raise TypeError(
            "patch takes a GPT-2 of transformers, such as GPT2LMHeadModel or GPT2Model, before it "
            f"is wrapped or compiled, not {type(model).__module__}.{type(model).__qualname__}"
        )
    if _patched(model):
        raise ValueError("the model is already patched; to change its ops, unpatch it first")
    backends.get(ops)  # raises ImportError now, rather than in the first forward pass
    for module in model.modules():
        if fast := modules.FAST.get(type(module)):
            module.__class__ = fast
            module.fastgpt_ops = ops
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`: restore the original class of every module, and return the model.

    Raises: ValueError if the model is not patched.
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
