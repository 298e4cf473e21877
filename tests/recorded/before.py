"""Undo three changes of 26 and 27 November 2026, so that runs can be compared with older ones bit by bit.

Since then each rank trains on the rows that it has read, which changes the order of summation on several ranks, the
record of a batch is a hash over the hashes of its rows, and polar factors in fp32 on a CPU come from Cholesky factors.
`apply` gives a process the rows by position, the old hash, and polynomials. Nothing else may differ from a run of the
commits before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist

from optimizers.polar.precision import SPELLINGS
from pretrain.data import BatchShare
from pretrain.engine.ranks import Ranks


def by_position(owners: Sequence[int], ranks: int) -> list[int]:
    """The first rows to rank 0, the next ones to rank 1, and so on."""
    return [row * ranks // len(owners) for row in range(len(owners))]


def hash_of_contents(share: BatchShare, ranks: Ranks | None = None) -> str:
    """The sha256 of the shape, the tokens and the lengths of the global batch."""
    table = torch.zeros(share.global_rows, share.tokens.shape[1] + 1, dtype=torch.int32)
    table[list(share.rows)] = torch.cat([share.tokens, share.lengths[:, None]], dim=1)
    if ranks is not None and ranks.group is not None:
        dist.all_reduce(table, group=ranks.group)
    tokens, lengths = table[:, :-1], table[:, -1]
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    for tensor in (tokens, lengths):
        digest.update(tensor.contiguous().numpy().astype("<i4", copy=False).tobytes())
    return digest.hexdigest()


@contextmanager
def apply() -> Iterator[None]:
    """Undo the changes within the context."""
    fp32 = ("cpu", torch.float32)
    with (
        mock.patch.dict(SPELLINGS, {fp32: SPELLINGS[fp32]._replace(factorises=False)}),
        mock.patch("pretrain.data.stream.assign", by_position),
        mock.patch.object(BatchShare, "sha256", hash_of_contents),
    ):
        yield
