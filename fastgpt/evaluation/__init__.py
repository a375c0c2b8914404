"""Perplexity, log-likelihoods and tasks."""
