"""What a run does, counted outside of our code: torch's operators, modules, collectives, and Python's audit events.

None of the counters knows a module of ours, so they measure the same thing whatever the code under test looks like.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

_listeners: list[Callable[[str, tuple[Any, ...]], None]] = []
_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for listener in _listeners:
        listener(event, arguments)


@contextlib.contextmanager
def audited(*events: str, on_event: Callable[[str, tuple[Any, ...]], None] | None = None) -> Iterator[list[Any]]:
    """Collect (event, arguments) of these audit events (``os.rename``, ``subprocess.Popen``, ...).

    `on_event` is called when the event is about to happen.
    """
    global _installed
    if not _installed:  # a hook cannot be removed
        sys.addaudithook(_hook)
        _installed = True
    found: list[Any] = []

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if event in events:
            found.append((event, arguments))
            if on_event is not None:
                on_event(event, arguments)

    _listeners.append(listen)
    try:
        yield found
    finally:
        _listeners.remove(listen)


@dataclass
class Operator:
    """One call of an operator of torch."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    """Of the tensor arguments."""
    elements: int
    """Of the largest result."""


class Operators(TorchDispatchMode):
    """Records every operator that runs in this thread (on a CPU the backward pass does too)."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names, self.calls = names, list[Operator]()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [value.numel() for value in _tensors([result])]
        # A file is written from views of bytes.
        self.largest = max([self.largest, *(v.numel() for v in _tensors([result]) if v.dtype != torch.uint8)])
        name = func.overloadpacket.__name__
        if name in self.names:
            self.calls.append(Operator(name, tuple(t.dtype for t in _tensors(args)), max(sizes, default=0)))
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


@contextlib.contextmanager
def saved_for_backward() -> Iterator[dict[int, tuple[int, ...]]]:
    """Collect the storages that autograd keeps for backward passes: data pointer to shape, bytes in `total_bytes`."""
    found: dict[int, tuple[int, ...]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel():
            found[tensor.data_ptr()] = (*tensor.shape, tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def total_bytes(saved: dict[int, tuple[int, ...]]) -> int:
    """Bytes of what `saved_for_backward` found."""
    return sum(torch.Size(shape).numel() for shape in saved.values())


@dataclass
class Forward:
    """One call of a module."""

    module: nn.Module
    shape: tuple[int, ...]
    """Of its first argument."""
    training: bool
    autocast: bool


@contextlib.contextmanager
def forwards(kind: type[nn.Module]) -> Iterator[list[Forward]]:
    """Collect the calls of every module of a kind, recomputations included."""
    found: list[Forward] = []

    def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, kind):
            shape = tuple(inputs[0].shape) if inputs else ()
            found.append(Forward(module, shape, module.training, torch.is_autocast_enabled("cpu")))

    handle = nn.modules.module.register_module_forward_pre_hook(see)
    try:
        yield found
    finally:
        handle.remove()


@dataclass
class Collective:
    """One call of torch.distributed."""

    name: str
    dtype: torch.dtype
    elements: int
    bytes: int


@dataclass
class Collectives:
    """The collectives of one rank; those of Python objects and of the wait for other ranks are not among them."""

    calls: list[Collective] = field(default_factory=list)

    def of(self, *names: str, least: int = 0) -> list[Collective]:
        """The calls by name that move at least so many elements."""
        return [call for call in self.calls if call.name in names and call.elements >= least]

    def add(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Take in a call."""
        elements = sum(tensor.numel() for tensor in tensors)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.calls.append(Collective(name, tensors[0].dtype, elements, size))


_NAMED = ("all_reduce", "reduce", "broadcast", "reduce_scatter_tensor", "all_gather_into_tensor", "all_to_all_single")
BUCKET = "bucket"
"""The name of a reduction of gradients by DistributedDataParallel, which runs below Python."""


@contextlib.contextmanager
def collectives() -> Iterator[Collectives]:
    """Count torch.distributed's collectives on this rank, by the first tensor argument, and DDP's buckets.

    Those of other threads, which prepare batches at the same time, are left out.

    Enter it before the process group is made: DeepSpeed keeps references to the functions.
    """
    found, thread = Collectives(), threading.current_thread()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if threading.current_thread() is thread:
                tensors = list(_tensors((*arguments, *named.values())))
                # The output of a scatter is the small side.
                found.add(name, [max(tensors, key=Tensor.numel)])
            return function(*arguments, **named)

        return call

    def reduce_bucket(state, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations
        found.add(BUCKET, [bucket.buffer()])
        buffer = bucket.buffer().div_(dist.get_world_size())
        work: Any = reduce(buffer, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    reduce, wrap = dist.all_reduce, DistributedDataParallel.__init__

    def wrapped(self: DistributedDataParallel, *arguments: Any, **named: Any) -> None:
        wrap(self, *arguments, **named)
        self.register_comm_hook(None, reduce_bucket)

    with contextlib.ExitStack() as patches:
        for name in _NAMED:
            patches.enter_context(mock.patch.object(dist, name, counting(name, getattr(dist, name))))
        patches.enter_context(mock.patch.object(DistributedDataParallel, "__init__", wrapped))
        yield found
