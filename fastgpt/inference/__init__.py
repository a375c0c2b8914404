"""Text generation: sampling, key/value cache, beam search, CUDA graphs, the CPU engine."""

from fastgpt.utils.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {},
    (
        "beam_search",
        "cuda_graph",
        "engine",
        "generation",
        "kv_cache",
        "quantization",
        "sampling",
        "session",
        "text",
    ),
)
