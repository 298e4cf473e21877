"""Batches of packed sequences."""

import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pretrain.engine.ranks import Ranks


@dataclass(frozen=True)
class TokenBatch:
    """B packed sequences of T+1 tokens: the first T are the inputs, the last T the targets.

    The targets of row i are `tokens[i, 1 : 1 + lengths[i]]`; the rest of the row is padding and must not count.
    """

    tokens: torch.Tensor
    """int32 [B, T+1], on the CPU."""
    lengths: torch.Tensor
    """int32 [B], valid targets per row: T, or less in the last row of a lane of a finite stream and with
    best-fit packing."""

    @property
    def num_targets(self) -> int:
        """Number of valid targets in all rows."""
        return int(self.lengths.sum())

    def slice(self, rows: slice) -> "TokenBatch":
        """Return some of the rows, without copying them."""
        return TokenBatch(self.tokens[rows], self.lengths[rows])

    def row_hashes(self) -> list[bytes]:
        """Return the sha256 of each row's tokens and length; equal rows have equal hashes on every machine."""
        tokens = self.tokens.to(torch.int32).contiguous().numpy().astype("<i4", copy=False)
        lengths = self.lengths.to(torch.int32).contiguous().numpy().astype("<i4", copy=False)
        return [
            hashlib.sha256(length.tobytes() + row.tobytes()).digest()
            for row, length in zip(tokens, lengths, strict=True)
        ]


@dataclass(frozen=True)
class BatchShare(TokenBatch):
    """The rows of a global batch that one rank trains on. Every row belongs to exactly one rank."""

    rows: tuple[int, ...]
    """The position of each of these rows in the global batch, ascending."""
    global_rows: int
    """Rows of the global batch."""
    global_targets: int
    """Valid targets of the global batch."""

    def sha256(self, ranks: Ranks | None = None) -> str:
        """Return the hex hash of the global batch: over the hashes of its rows, in order; a collective.

        It does not depend on how the rows are divided.
        """
        hashes = torch.zeros(self.global_rows, hashlib.sha256().digest_size, dtype=torch.uint8)
        for row, digest in zip(self.rows, self.row_hashes(), strict=True):
            hashes[row] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        if ranks is not None and ranks.group is not None:
            dist.all_reduce(hashes, group=ranks.group)  # a row is zero on all ranks but one
        return hashlib.sha256(hashes.numpy().tobytes()).hexdigest()
