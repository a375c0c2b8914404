"""Checkpoints: reading, writing, and one writer per run folder."""
