"""Which rank trains on which row of a global batch, and how the few rows that must move get there.

A row is read by the rank that has its lane, its *owner*. All ranks train on equally many rows, so a rank that read more
than its part gives the last of them away. Where the lanes divide evenly over the ranks, no row moves:

    owner of rows 0 to 7       0 1 0 1 0 1 0 1            0 1 2 0 1 2 0 1    (three lanes on three ranks, batches of 9)
    trained by                 0 1 0 1 0 1 0 1            0 1 2 0 1 2 0 1    row 8 is of rank 2: none moves
    with four ranks            0 1 0 1 2 2 3 3                               ranks 2 and 3 had no lane

The assignment follows from the owners alone, never from timing, so every rank computes the same one and knows which
messages to expect.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from pretrain.engine.ranks import Ranks


def assign(owners: Sequence[int], ranks: int) -> list[int]:
    """Return the rank that trains on each row.

    A rank keeps the first rows that it owns, up to its part; the others go, in order, to the ranks that have room, the
    lowest first. No assignment moves fewer rows.

    Args:
        owners: the rank that read each row.
        ranks: number of ranks. The parts are equal, or differ by one row at the end of a finite stream.

    """
    room = [len(owners) // ranks + (rank < len(owners) % ranks) for rank in range(ranks)]
    trainers = [-1] * len(owners)
    moving = []
    for row, owner in enumerate(owners):
        if room[owner]:
            room[owner] -= 1
            trainers[row] = owner
        else:
            moving.append(row)
    free = (rank for rank, places in enumerate(room) for _ in range(places))
    for row, rank in zip(moving, free, strict=True):
        trainers[row] = rank
    return trainers


def exchange(
    own: npt.NDArray[np.int32], owners: Sequence[int], trainers: Sequence[int], ranks: Ranks
) -> npt.NDArray[np.int32]:
    """Return the rows that this rank trains on, in order; a collective, but only rows that move are sent.

    Two ranks exchange one message at most.

    Args:
        own: int32 [rows that this rank owns, T+1], in order.
        owners: the rank that read each row of the global batch.
        trainers: the rank that trains on each.
        ranks: the ranks.

    """
    rank = ranks.rank
    if ranks.group is None or all(owner == trainer for owner, trainer in zip(owners, trainers, strict=True)):
        return own
    owned = np.array(owners) == rank
    position = np.cumsum(owned) - 1  # of an own row in `own`
    trained = np.array(trainers) == rank
    result = np.empty((int(trained.sum()), own.shape[1]), dtype=np.int32)
    place = np.cumsum(trained) - 1
    result[place[owned & trained]] = own[position[owned & trained]]
    messages: dict[tuple[int, int], list[int]] = {}
    for row, (owner, trainer) in enumerate(zip(owners, trainers, strict=True)):
        if owner != trainer and rank in (owner, trainer):
            messages.setdefault((owner, trainer), []).append(row)
    works, received = [], []
    for (owner, trainer), rows in messages.items():
        if owner == rank:
            message = torch.from_numpy(own[position[rows]])
            works.append(dist.isend(message, group=ranks.group, group_dst=trainer))
        else:
            message = torch.empty(len(rows), own.shape[1], dtype=torch.int32)
            works.append(dist.irecv(message, group=ranks.group, group_src=owner))
            received.append((rows, message))
    for work in filter(None, works):
        work.wait()
    for rows, message in received:
        result[place[rows]] = message.numpy()
    return result
