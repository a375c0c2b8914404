"""Save and load checkpoints, and lock run folders."""

from fastgpt.utils.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {}, ("load", "run_lock", "save"))
