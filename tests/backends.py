"""The backends that can be tried on a CPU.

Triton's run there in its interpreter, which tests/conftest.py switches on where there is no GPU;
with one, tests/kernels and tests/ops/test_triton.py try them on it. The interpreter is slow, and
tests/kernels looks at each kernel anyway: so what else it can run is among the slow tests.
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
