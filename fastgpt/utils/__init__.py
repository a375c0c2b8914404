"""Helpers that know nothing of GPT: hardware, files, progress display, signals."""
