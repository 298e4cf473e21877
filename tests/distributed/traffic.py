"""Counts what the collectives of a training step move, whoever calls them.

The counter sits in torch's dispatcher, below torch.distributed: it sees the calls of Python code and those that C++
makes, such as the reductions of DistributedDataParallel.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.engine import deepspeed
from pretrain.planning.traffic import small_bytes
from pretrain.training.trainer import Trainer
from tests.distributed.scenarios import run


class Call(NamedTuple):
    """One call of a collective."""

    operation: str
    dtype: torch.dtype
    elements: int
    """That are summed, of the gathered whole, or received in an all-to-all."""
    ranks: int
    """Of the process group."""

    @property
    def payload(self) -> int:
        """Bytes."""
        return self.elements * self.dtype.itemsize


# Operator -> (operation, place among the arguments of the tensors that make up the payload).
OPERATORS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "allgather_coalesced_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 0),
    "alltoall_": ("all_to_all", 0),
    "gather_": ("gather", 0),
    "scatter_": ("scatter", 0),
    "send": ("send", 0),
    "recv_": ("receive", 0),
    "recv_any_source_": ("receive", 0),
}


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, list | tuple) else []


class TrafficCounter(TorchDispatchMode):
    """Notes every collective that is called while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the call and make it."""
        name = func._schema.name.removeprefix("c10d::")
        if func.namespace == "c10d" and name != "barrier":
            operation, place = OPERATORS[name]
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            tensors = _tensors(args[place])
            elements = sum(t.numel() for t in tensors)
            self.calls.append(Call(operation, tensors[0].dtype, elements, group.size()))
        return func(*args, **(kwargs or {}))


def count_steps(root: str, changes: dict[str, Any], zero: dict[str, Any] | None = None) -> list[list[Call]]:
    """Train the tiny config; the collectives of each step from its forward pass to its loss, but for the first's.

    Args:
        root: of the run.
        changes: of the config.
        zero: changes of the section zero_optimization that DeepSpeed is given.
    """
    steps: list[list[Call]] = []
    counter: TrafficCounter | None = None
    forward_backward, measure, generate = Trainer.forward_backward, Trainer.measure, deepspeed.deepspeed_config

    def begin(self: Trainer, batch: Any) -> Tensor:
        nonlocal counter
        counter = TrafficCounter()
        counter.__enter__()
        return forward_backward(self, batch)

    def end(self: Trainer, *arguments: Any) -> Any:
        found = measure(self, *arguments)
        assert counter is not None
        counter.__exit__(None, None, None)
        steps.append(counter.calls)
        return found

    def generated(*arguments: Any) -> dict[str, Any]:
        settings = generate(*arguments)
        settings["zero_optimization"] |= zero or {}
        return settings

    with (
        mock.patch.object(Trainer, "forward_backward", begin),
        mock.patch.object(Trainer, "measure", end),
        mock.patch.object(deepspeed, "deepspeed_config", generated),
    ):
        run(root, changes)
    return steps[1:]  # the first is checked by DeepSpeed and by us, which moves more


def totals(calls: list[Call], parameters: int) -> tuple[dict[tuple[str, str, int], int], int]:
    """(operation, dtype, ranks) -> elements of the calls that a plan states, and the bytes of the small all-reduces."""
    small, stated = 0, Counter[tuple[str, str, int]]()
    for call in calls:
        if call.ranks == 1 or not call.elements:
            continue
        if call.operation == "all_reduce" and call.payload <= small_bytes(parameters):
            small += call.payload
            continue
        name = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(call.dtype, str(call.dtype))
        stated[call.operation, name, call.ranks] += call.elements
    return dict(stated), small
