"""From text files to batches: documents, token shards, the corpus, prefetching."""
