"""The compiled module, or word of what to do when it is missing."""

try:
    from fastgpt import _C as _C
except ImportError as error:
    raise ImportError(
        "fastgpt's compiled part is missing; run `pip install .` in the checkout"
    ) from error
