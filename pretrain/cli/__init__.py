"""The `aurora` command, one module per verb. Loading it takes neither torch, nor numpy, nor pydantic."""

from pretrain.cli.command import main

__all__ = ["main"]
