"""Checkpoints: the format, writing and reading it, and what of a run goes into it."""
