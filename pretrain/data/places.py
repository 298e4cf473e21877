"""Where in the files of data the documents of a batch are, for people."""

from __future__ import annotations

from typing import Any

from pretrain.data.documents import Cursor
from pretrain.data.order import Ring
from pretrain.data.position import StreamPosition


def batch_places(before: StreamPosition, after: StreamPosition, seed: int) -> list[dict[str, Any]]:
    """Return what this rank's lanes read for a batch: for each lane that moved, from where to where.

    The rows of all ranks together are those of the whole batch; which rank trains on a row is another matter. With
    best-fit packing the places are where reading continues, and some documents wait for a later batch.

    Args:
        before: the position of the stream before the batch.
        after: the position after it.
        seed: `data.seed`, which orders the files.
    """
    rings = [position.ring for position in after.rings]
    found = []
    for lane, end in sorted(after.cursors.items()):
        start = before.cursors[lane]
        if start != end:
            ring = next(ring for ring in rings if lane in ring.lanes)
            places = {"from": _place(ring, lane, start, seed), "to": _place(ring, lane, end, seed)}
            found.append({"source": ring.name, "lane": lane, **places})
    return found


def _place(ring: Ring, lane: int, cursor: Cursor, seed: int) -> dict[str, Any]:
    """A position: rows are counted from 0 in the row group, or in the file if it has none."""
    units = ring.lane_units(cursor.epoch, lane, seed)
    if cursor.unit >= len(units):
        return {"epoch": cursor.epoch, "end_of_epoch": True}
    _, unit = units[cursor.unit]
    place = {"epoch": cursor.epoch, "file": unit.file.path, "row": unit.part + cursor.row * unit.parts}
    if unit.row_group is not None:
        place["row_group"] = unit.row_group
    return place | {"token": cursor.token}
