"""Exact duplicates: documents whose text occurs earlier in the sources."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from pretrain.data.prepared.parts import PartTable

# Documents are compared in buckets of about this many, chosen by hash. Sorting a bucket takes about 48 bytes for each
# of its documents; besides, every document takes one byte.
BUCKET_DOCUMENTS = 1 << 24


def find_duplicates(parts: Sequence[int], load: Callable[[int], PartTable]) -> list[npt.NDArray[np.bool_]]:
    """Return for each part which of its documents to keep, [documents]: the first one with each text.

    Two texts count as equal if both of their 64-bit hashes are equal.

    Args:
        parts: in the order in which their documents count as earlier.
        load: returns the table of a part.

    """
    keep = [np.ones(len(load(part).hashes), np.bool_) for part in parts]
    borders = np.cumsum([0, *map(len, keep)])
    buckets = max(1, -(-int(borders[-1]) // BUCKET_DOCUMENTS))
    for bucket in range(buckets):
        found = []
        for part, begin in zip(parts, borders[:-1], strict=True):
            table = load(part)
            chosen = np.flatnonzero(table.hashes % np.uint64(buckets) == bucket)
            found.append((table.hashes[chosen], table.keys[chosen], chosen + begin))
        hashes, keys, places = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.lexsort((places, keys, hashes))
        hashes, keys = hashes[order], keys[order]
        repeated = places[order[1:]][(hashes[1:] == hashes[:-1]) & (keys[1:] == keys[:-1])]
        for index, begin, end in zip(range(len(keep)), borders[:-1], borders[1:], strict=True):
            keep[index][repeated[(repeated >= begin) & (repeated < end)] - begin] = False
    return keep
