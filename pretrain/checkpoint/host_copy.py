"""A copy of the training state in host memory, from which a checkpoint is written while training continues."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pretrain.checkpoint.format import Fragment

_ALIGNMENT = 64
"""Bytes; at least the size of an element of every dtype."""


class HostCopy:
    """Host memory that one fragment list after another is copied into.

    The memory is allocated by the first copy and used again by the later ones, which then cost no more than moving the
    bytes. On a GPU it is pinned, so that the copy runs at the speed of the bus.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """Return the fragments with copies of their values, which are valid until the next call.

        Raises:
            RuntimeError: there is not enough memory.
        """
        given = list(fragments)
        starts, size = _places(given)
        if size > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # not both at the same time
            self._memory = _allocate(size, pinned=any(f.values.is_cuda for f in given))
        copies = []
        for fragment, start in zip(given, starts, strict=True):
            values = fragment.values.detach()
            copy = self._memory[start : start + values.nbytes].view(values.dtype).view(values.shape)
            copy.copy_(values, non_blocking=True)
            copies.append(replace(fragment, values=copy))
        for device in {fragment.values.device for fragment in given if fragment.values.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return copies


def _places(fragments: Sequence[Fragment]) -> tuple[list[int], int]:
    """Return the first byte of each fragment in the memory, and the size of it all."""
    starts, end = [], 0
    for fragment in fragments:
        starts.append(end)
        end += -(-fragment.values.nbytes // _ALIGNMENT) * _ALIGNMENT
    return starts, end


def _allocate(size: int, pinned: bool) -> Tensor:
    """Allocate bytes of host memory.

    Torch's allocator of pinned memory rounds sizes up to a power of two, up to twice what a checkpoint needs. So
    ordinary memory is registered with the driver; where that is not permitted (a limit on locked memory), the copy is
    slower and just as correct.
    """
    memory = torch.empty(size, dtype=torch.uint8)
    if pinned:
        runtime = torch.cuda.cudart()
        address = memory.data_ptr()
        if int(runtime.cudaHostRegister(address, size, 0)) == 0:
            weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    return memory


def share_of(fragments: Iterable[Fragment], rank: int, world_size: int) -> Iterator[Fragment]:
    """Yield the part of a list of fragments that one of several ranks writes, where every rank holds them all.

    The ranks get equal numbers of bytes, up to one element, as one run of the list each.
    """
    given = list(fragments)
    total, begin = sum(f.values.nbytes for f in given), 0
    low_byte, high_byte = total * rank // world_size, total * (rank + 1) // world_size
    for fragment in given:
        values, size = fragment.values, fragment.values.element_size()
        low, high = (min(max((edge - begin) // size, 0), values.numel()) for edge in (low_byte, high_byte))
        begin += values.nbytes
        if low < high or (not values.numel() and rank == 0):
            part = values if high - low == values.numel() else values.reshape(-1)[low:high]
            yield replace(fragment, start=fragment.start + low, values=part)
