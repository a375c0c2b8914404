"""PyTorch's `opcheck`, without a warning that it causes itself."""

import warnings
from typing import Any

import torch


def opcheck(operator: Any, args: tuple[Any, ...]) -> None:
    """Assert that an operator passes `torch.library.opcheck`.

    It tests the schema, autograd, fake tensors and AOT dispatch.
    """
    with warnings.catch_warnings():
        # Since torch 2.14, opcheck passes non-leaf tensors to AOT dispatch, which reads their .grad
        # and suppresses the warning in a way that fails if warnings are errors.
        warnings.filterwarnings(
            "ignore",
            message="The .grad attribute of a Tensor that is not a leaf",
            module=r"torch\._subclasses\.meta_utils",
        )
        results = torch.library.opcheck(operator, args)
    assert set(results.values()) == {"SUCCESS"}
