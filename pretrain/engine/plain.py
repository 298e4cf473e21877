"""Accelerate with whole parameters on every rank: one process, or data parallel over several."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from optimizers import Aurora
from pretrain.config import Config
from pretrain.engine.base import TIMEOUT, Engine
from pretrain.model.loss import LossModel


class PlainEngine(Engine):
    """Accelerate on one process, or data parallel over several started by torchrun (gloo on CPUs, NCCL on GPUs)."""

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
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="no",
            kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=TIMEOUT)],
        )
        super().__init__(config, accelerator, DistributedType.MULTI_CPU if on_cpu else DistributedType.MULTI_GPU)

    def prepare(self, module: LossModel, optimizer: Aurora) -> None:
        """Move the model to the device, compile it if asked, and wrap it for data parallelism."""
        module.to(self.device)
        if self.config.train.compile:
            module.compile()  # in place: the names of the parameters stay
        self.module = module
        self.model = self.accelerator.prepare(module) if self.world_size > 1 else module
        wrapped = isinstance(self.model, DistributedDataParallel)
        assert wrapped == (self.world_size > 1), f"{type(self.model)} on {self.world_size} ranks"

    def backward(self, loss: Tensor) -> None:
        """DDP averages over ranks; the factor makes it the sum."""
        self.accelerator.backward(loss * self.world_size)

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Gradients are reduced only in the last micro-batch."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
            yield

    def step(self, optimizer: Aurora) -> Tensor:
        """Clip, step, drop the gradients."""
        norm = self.clip_gradients(self.config.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm
