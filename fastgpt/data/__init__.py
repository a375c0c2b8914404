"""Data loading: documents, token shards, corpora, batches and prefetching."""

from typing import TYPE_CHECKING

from fastgpt.utils.lazy import lazy_names

if TYPE_CHECKING:
    from fastgpt.data.encode import encode_file as encode_file
    from fastgpt.data.pipeline import prepare as prepare

_HOMES = {"encode_file": "encode", "prepare": "pipeline"}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
