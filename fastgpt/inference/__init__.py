"""Text generation: sampling, key/value cache, beam search, CUDA graphs, the CPU engine."""
