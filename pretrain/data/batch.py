"""A batch of packed sequences."""

import hashlib
from dataclasses import dataclass

import torch


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

    def sha256(self) -> str:
        """Return a hex hash of shape and contents; equal batches have equal hashes on every machine."""
        digest = hashlib.sha256(repr(tuple(self.tokens.shape)).encode())
        for tensor in (self.tokens, self.lengths):
            digest.update(tensor.to(torch.int32).contiguous().numpy().astype("<i4", copy=False).tobytes())
        return digest.hexdigest()
