"""The split of a document: training or validation, decided by a hash of its contents."""

import hashlib
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

Split = Literal["train", "validation"]
Hashes = npt.NDArray[np.uint64]


def text_hash(text: bytes) -> int:
    """Return the 64-bit hash that decides the split of a document, given as UTF-8."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def is_validation(text: bytes, fraction: float) -> bool:
    """Return whether a document, given as UTF-8, belongs to the validation split."""
    return fraction > 0 and text_hash(text) / 2**64 < fraction


def are_validation(hashes: Hashes, fraction: float) -> npt.NDArray[np.bool_]:
    """Return the same as `is_validation` for many documents, given by their `text_hash`."""
    return hashes.astype(np.float64) / 2.0**64 < fraction


def chosen(hashes: Callable[[], Hashes], fraction: float, split: Split) -> npt.NDArray[np.bool_] | None:
    """Return which documents belong to a split; None for all of them, without asking for their hashes."""
    if split == "train" and not fraction:
        return None
    return are_validation(hashes(), fraction) == (split == "validation")
