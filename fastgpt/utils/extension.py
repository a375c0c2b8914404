"""Import the compiled module `_C`, with a helpful error if it is missing."""

try:
    from fastgpt import _C as _C
except ImportError as error:
    raise ImportError(
        "fastgpt's compiled module is missing; run `pip install .` in the checkout"
    ) from error
