"""The backends that can be tried here: all, or all but Triton's where it is not installed."""

from importlib.util import find_spec

from fastgpt import ops

BACKENDS = [name for name in ops.BACKENDS if name != "triton" or find_spec("triton")]
