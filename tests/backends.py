"""The backends that can be tried on a CPU.

Triton's run there in its interpreter, which tests/conftest.py switches on where there is no GPU;
with one, tests/kernels and tests/ops/test_triton.py try them on it.
"""

from importlib.util import find_spec

import torch

from fastgpt import ops

INTERPRETED = find_spec("triton") is not None and not torch.cuda.is_available()
BACKENDS = [name for name in ops.BACKENDS if name != "triton" or INTERPRETED]
