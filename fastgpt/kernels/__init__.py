"""The Triton kernels: one module per operation, imported only when asked for.

Their source is in the checkout's top-level ``kernels/`` folder, which must stay without an
``__init__.py``: a top-level package of that name would hide Hugging Face's ``kernels`` from
transformers. The wheel puts the files beside this one; in a checkout this package points at them.

Importing it raises ImportError if torch or Triton is outside the versions that fastgpt supports.
"""

from pathlib import Path

from fastgpt.utils.requirements import unsupported_version

if _fault := unsupported_version("torch", "triton"):
    raise ImportError(
        f"{_fault}. Each release of torch installs the Triton that fits it: pip install --upgrade "
        'torch. Without the kernels, use ops="native".'
    )

_source = Path(__file__).resolve().parents[2] / "kernels"
if (_source.parent / "pyproject.toml").is_file() and _source.is_dir():
    __path__ = [str(_source)]
