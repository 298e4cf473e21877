"""The run folder: its files, its lock, its manifest, and what a person watches."""
