"""An engine on Accelerate with whole parameters on every rank: one process, or data parallelism over several."""

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
from pretrain.engine.base import Engine, patience
from pretrain.engine.ranks import keep_group
from pretrain.model.loss import LossModel


class PlainEngine(Engine):
    """Trains in one process, or data-parallel in several started by torchrun (gloo on CPUs, NCCL on GPUs)."""

    def __init__(self, config: Config) -> None:
        on_cpu = not torch.cuda.is_available()
        # Unless DDP looks for unused parameters, it re-sorts its buckets after the first backward pass, by the order
        # in which the gradients were ready. With three or more ranks this changes the order of summation, so the first
        # step after a resume would differ from the uninterrupted run. So keep the order of the parameters.
        ddp = DistributedDataParallelKwargs(
            find_unused_parameters=True, gradient_as_bucket_view=True, broadcast_buffers=False
        )
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        # On CPUs Accelerate detects the other processes only with cpu=True.
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="no",
            kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=patience(config))],
        )
        super().__init__(config, accelerator, DistributedType.MULTI_CPU if on_cpu else DistributedType.MULTI_GPU)

    def prepare(self, module: LossModel, optimizer: Aurora) -> None:
        """Move the model to the device, compile it if asked, and wrap it for data parallelism."""
        module.to(self.device)
        if self.config.train.compile:
            module.compile()  # in place, so the parameters keep their names
        self.module = module
        self.model = self.accelerator.prepare(module) if self.world_size > 1 else module
        if isinstance(self.model, DistributedDataParallel) != (self.world_size > 1):
            raise RuntimeError(f"Accelerate made a {type(self.model).__name__} of the model on {self.world_size} ranks")

    def close(self) -> None:
        """Leave the process group, which the model outlives."""
        keep_group()
        super().close()

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass; DDP averages over ranks, and the factor turns that into a sum."""
        self.accelerator.backward(loss * self.world_size)

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Reduce gradients only in the last micro-batch."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
            yield

    def step(self, optimizer: Aurora) -> Tensor:
        """Clip the gradients, step, and free them."""
        norm = self.clip_gradients(self.config.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm
