"""What carries out a training step: placement, precision, the backward pass and its reduction over ranks.

The trainer talks to an engine only through the methods of `PlainEngine`; a second engine offers the same ones.
Gradients arrive in the optimizer summed over every rank and micro-batch, never averaged: the loss is divided by the
global number of target tokens before the backward pass.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from optimizers.precision import has_fast_bf16
from pretrain.config import Config
from pretrain.model import LossModel


@dataclass(frozen=True)
class Precision:
    """Two dtypes apart: that of the stored weights and that of the matrix products."""

    weights: torch.dtype
    autocast: torch.dtype | None

    def __str__(self) -> str:
        products = "no autocast" if self.autocast is None else f"{_name(self.autocast)} autocast"
        return f"{_name(self.weights)} weights, {products}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def resolve_precision(setting: str, device: torch.device) -> Precision:
    """The plain engine's dtypes for `train.precision` on `device`: fp32 weights, bf16 products where asked or fast."""
    bf16 = setting == "bf16" or (setting == "auto" and has_fast_bf16(device))
    return Precision(torch.float32, torch.bfloat16 if bf16 else None)


class PlainEngine:
    """Accelerate on one process, or data parallel over several started by torchrun (gloo on CPUs, NCCL on GPUs).

    Attributes:
        rank, world_size: of this process.
        device: where the model lives.
        precision: dtypes of weights and products.
        cpu_group: a process group for CPU tensors, None on a single process.

    Raises:
        RuntimeError: the processes did not find each other (each would train alone without noticing).
    """

    def __init__(self, config: Config) -> None:
        on_cpu = not torch.cuda.is_available()
        # DDP re-sorts its buckets after the first backward pass, by the order in which gradients came, unless it
        # looks for unused parameters. With three or more ranks that changes the order of summation, so the first
        # step after a resume would differ from the uninterrupted run: keep the order of the parameters.
        ddp = DistributedDataParallelKwargs(
            find_unused_parameters=True, gradient_as_bucket_view=True, broadcast_buffers=False
        )
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        # On CPUs Accelerate sees the other processes only with cpu=True.
        self.accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="no",
            kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=timedelta(minutes=30))],
        )
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.precision = resolve_precision(config.train.precision, self.device)
        self._check_world()
        self.cpu_group = self._make_cpu_group()
        self.model: torch.nn.Module
        self.module: LossModel

    def _check_world(self) -> None:
        expected = int(os.environ.get("WORLD_SIZE", "1"))
        kind = self.accelerator.distributed_type
        alone = kind == DistributedType.NO
        if self.world_size != expected or alone != (expected == 1):
            raise RuntimeError(
                f"{expected} processes were started, but Accelerate sees {self.world_size} (type {kind}): "
                "each would train alone. Start them with torchrun, and without ACCELERATE_* variables"
            )

    def _make_cpu_group(self) -> dist.ProcessGroup | None:
        if self.world_size == 1:
            return None
        return dist.group.WORLD if self.device.type == "cpu" else dist.new_group(backend="gloo")

    def prepare(self, module: LossModel, compile_model: bool) -> None:
        """Move the model to the device, compile it if asked, and wrap it for data parallelism."""
        module.to(self.device)
        if compile_model:
            module.compile()  # in place: the names of the parameters stay
        self.module = module
        self.model = self.accelerator.prepare(module)
        wrapped = isinstance(self.model, DistributedDataParallel)
        assert wrapped == (self.world_size > 1), f"{type(self.model)} on {self.world_size} ranks"

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of every forward pass."""
        dtype = self.precision.autocast
        return torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Backward pass of a micro-batch's share of the loss (already divided by the global target count).

        DDP averages over ranks; the factor makes it the sum.
        """
        self.accelerator.backward(loss * self.world_size)

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Context of a micro-batch's forward and backward pass: gradients are reduced only in the last."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
            yield

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Scale all gradients down to a global 2-norm of at most `max_norm`; returns the norm before, no host sync.

        If the norm is not finite every gradient becomes NaN, so that the optimizer skips the step whole, even where
        only the norm overflowed.
        """
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        factor = torch.ones_like(norm) if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, torch.where(norm.isfinite(), factor, torch.nan))
        return norm

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The elementwise sum of a device tensor over the ranks."""
        return self.accelerator.reduce(values, "sum")

    def check_in_step(self, batch: str, rows: range) -> None:
        """Collective check after the first step: equal weights on all ranks, which trained on other rows of one batch.

        Args:
            batch: hash of the global batch.
            rows: those of its rows that this rank trained on.

        Raises:
            RuntimeError: the ranks do not train one model together.
        """
        if self.world_size == 1:
            return
        bits = [p.detach().float().view(torch.int32).sum(dtype=torch.int64) for p in self.module.parameters()]
        everyone = self.gather((torch.stack(bits).tolist(), batch, list(rows)))
        if any(weights != everyone[0][0] for weights, _, _ in everyone):
            raise RuntimeError("the weights differ between ranks after the first step: gradients were not reduced")
        if any(other != batch for _, other, _ in everyone):
            raise RuntimeError("the global batch differs between ranks: they do not read the same data")
        trained = [row for _, _, share in everyone for row in share]
        if len(set(trained)) < len(trained):
            raise RuntimeError("two ranks trained on the same rows: the batch was not shared out")

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable value, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.cpu_group)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all ranks, by rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            # Gloo's threads need the interpreter's lock to release the tensors of the last collective, and DDP's
            # destructor holds it while it waits for those threads: without a pause some runs hang at their end.
            time.sleep(0.2)
            dist.destroy_process_group()
