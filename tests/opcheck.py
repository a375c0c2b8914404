"""PyTorch's own check of an operator, without a warning that PyTorch gives itself."""

import warnings
from typing import Any

import torch


def opcheck(operator: Any, args: tuple[Any, ...]) -> None:
    """Assert that the operator passes `torch.library.opcheck`: its schema, autograd, fake tensors
    and AOT dispatch."""
    with warnings.catch_warnings():
        # From torch 2.14 on, opcheck passes non-leaf tensors to AOT dispatch, which reads their
        # .grad and hides the warning by a way that does not work where warnings are errors.
        warnings.filterwarnings(
            "ignore",
            message="The .grad attribute of a Tensor that is not a leaf",
            module=r"torch\._subclasses\.meta_utils",
        )
        results = torch.library.opcheck(operator, args)
    assert set(results.values()) == {"SUCCESS"}
