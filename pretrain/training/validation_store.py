"""The validation split of remote sources, kept in the run folder: built once, and not again at every start."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pretrain.data import TokenBatch
from pretrain.engine.ranks import Ranks
from pretrain.files import replacing


@dataclass(frozen=True)
class ValidationStore:
    """A file that rank 0 reads and writes.

    Attributes:
        path: the file.
        key: what the split depends on; a file with another key is not used.
        ranks: all ranks of the run.
    """

    path: Path
    key: str
    ranks: Ranks

    def load(self, rows: int) -> tuple[list[TokenBatch], int] | None:
        """Return the split in batches of `rows` sequences, and the bytes of its text; None if it is not stored.

        A collective.
        """
        found = self.ranks.on_rank_0(self._read)
        if found is None:
            return None
        tokens, lengths, text_bytes = found
        pairs = zip(torch.from_numpy(tokens).split(rows), torch.from_numpy(lengths).split(rows), strict=True)
        return [TokenBatch(*pair) for pair in pairs], text_bytes

    def save(self, batches: list[TokenBatch], text_bytes: int) -> None:
        """Write the split; a collective."""
        self.ranks.on_rank_0(lambda: self._write(batches, text_bytes))

    def _read(self) -> tuple[np.ndarray, np.ndarray, int] | None:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                if str(file["key"]) == self.key:
                    return file["tokens"], file["lengths"], int(file["text_bytes"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # not there, or damaged: it is built again
        return None

    def _write(self, batches: list[TokenBatch], text_bytes: int) -> None:
        with replacing(self.path) as partial, partial.open("wb") as file:
            np.savez(
                file,
                key=self.key,
                tokens=np.concatenate([batch.tokens.numpy() for batch in batches]),
                lengths=np.concatenate([batch.lengths.numpy() for batch in batches]),
                text_bytes=text_bytes,
            )
