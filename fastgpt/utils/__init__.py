"""Utilities that are independent of the model: hardware, files, progress display, signals."""
