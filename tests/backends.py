"""The backends that can be tested on a CPU.

Without a GPU, the Triton kernels run in Triton's interpreter, which tests/conftest.py enables; with
one, tests/kernels and tests/ops/test_triton.py test them on it. As the interpreter is slow and
tests/kernels tests each kernel anyway, other tests with the Triton backend are marked as slow.
"""

from importlib.util import find_spec

import pytest
import torch

from fastgpt import ops

INTERPRETED = find_spec("triton") is not None and not torch.cuda.is_available()
BACKENDS = [
    pytest.param(name, marks=[pytest.mark.slow] * (name == "triton"))
    for name in ops.BACKENDS
    if name != "triton" or INTERPRETED
]
