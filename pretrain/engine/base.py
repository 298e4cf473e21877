"""What carries out a training step: placement, precision, the backward pass and its reduction over ranks.

The trainer talks to an engine only through the methods of `Engine`; `PlainEngine` is one, `pretrain.engine.deepspeed`
has the other. Gradients arrive in the optimizer summed over every rank and micro-batch, never averaged: the loss is
divided by the global number of target tokens before the backward pass.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from optimizers import Aurora, has_fast_bf16
from optimizers.sharded import Held
from pretrain.config import Config
from pretrain.model.build import LossModel


@dataclass(frozen=True)
class Precision:
    """Two dtypes apart: that of the stored weights and that of the matrix products."""

    weights: torch.dtype
    autocast: torch.dtype | None

    def __str__(self) -> str:
        if self.weights != torch.float32:
            return f"{_name(self.weights)} weights beside fp32 ones"
        products = "no autocast" if self.autocast is None else f"{_name(self.autocast)} autocast"
        return f"{_name(self.weights)} weights, {products}"


TIMEOUT = timedelta(minutes=30)
"""How long a collective waits for the other ranks."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def resolve_precision(setting: str, device: torch.device) -> Precision:
    """The plain engine's dtypes for `train.precision` on `device`: fp32 weights, bf16 products where asked or fast."""
    bf16 = setting == "bf16" or (setting == "auto" and has_fast_bf16(device))
    return Precision(torch.float32, torch.bfloat16 if bf16 else None)


def accumulation(config: Config, world_size: int) -> int:
    """Micro-batches per rank and step.

    Raises:
        ValueError: the global batch does not divide over the ranks.
    """
    per_round = config.train.micro_batch_sequences * world_size
    sequences = config.global_batch_sequences
    if sequences % per_round:
        raise ValueError(
            f"train.micro_batch_sequences: {sequences} sequences of a global batch cannot be shared out over "
            f"{world_size} ranks in micro-batches of {config.train.micro_batch_sequences}; "
            "expected ranks x micro batch to divide the global batch"
        )
    return sequences // per_round


class Engine:
    """What every engine has.

    Args:
        config: the run's.
        accelerator: set up for the processes of this run.
        precision: dtypes of weights and products.

    Attributes:
        rank, world_size: of this process.
        device: where the model lives.
        precision: dtypes of weights and products.
        cpu_group: a process group for CPU tensors, None on a single process.
        model: what to call for training; set by `prepare`.
        module: the model with its loss, inside it.

    Raises:
        RuntimeError: the processes did not find each other (each would train alone without noticing).
    """

    model: torch.nn.Module
    module: LossModel
    say: Callable[[str], None] = staticmethod(lambda line: None)
    """Prints a line on rank 0."""

    def __init__(self, config: Config, accelerator: Accelerator, expected: DistributedType) -> None:
        self.config, self.accelerator = config, accelerator
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        self.precision = self.resolve_precision(config.train.precision)
        self._check_world(expected)
        self.cpu_group = self._make_cpu_group()

    def resolve_precision(self, setting: str) -> Precision:
        """The dtypes for `train.precision`."""
        raise NotImplementedError

    def _check_world(self, expected_type: DistributedType) -> None:
        expected = int(os.environ.get("WORLD_SIZE", "1"))
        kind = self.accelerator.distributed_type
        if self.world_size != expected or kind != expected_type:
            raise RuntimeError(
                f"{expected} processes were started, but Accelerate sees {self.world_size} (type {kind}, expected "
                f"{expected_type}): each would train alone. Start them with torchrun, without ACCELERATE_* variables"
            )

    def _make_cpu_group(self) -> dist.ProcessGroup | None:
        if self.world_size == 1:
            return None
        return dist.group.WORLD if self.device.type == "cpu" else dist.new_group(backend="gloo")

    def prepare(self, module: LossModel, optimizer: Aurora) -> None:
        """Take over a model and its optimizer, whose weights are those to start from."""
        raise NotImplementedError

    def describe(self) -> list[str]:
        """What was set up, for the start of a run, a line each."""
        return [f"device    {self.device}, {self.world_size} ranks, {self.precision}"]

    @property
    def held(self) -> Held | None:
        """What this rank holds of the optimizer's parameters; None where every rank holds them whole."""
        return None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of every forward pass."""
        dtype = self.precision.autocast
        return torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Backward pass of a micro-batch's share of the loss (already divided by the global target count)."""
        raise NotImplementedError

    def accumulate(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Context of a micro-batch's forward and backward pass: gradients are reduced only in the last."""
        raise NotImplementedError

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Scale all gradients down to a global 2-norm of at most `max_norm`; returns the norm before, no host sync.

        If the norm is not finite every gradient becomes NaN, so that the optimizer skips the step whole, even where
        only the norm overflowed.
        """
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        # On a CPU torch adds squares one after another: in fp32 the norm of an embedding comes out 1e-4 too small.
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        norms = [torch.linalg.vector_norm(gradient, dtype=dtype) for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms)).float()
        factor = torch.ones_like(norm) if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, torch.where(norm.isfinite(), factor, torch.nan))
        return norm

    def step(self, optimizer: Aurora) -> Tensor:
        """Clip the gradients, step, and drop them; returns their global 2-norm before clipping, no host sync."""
        raise NotImplementedError

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
        bits = [p.detach().float().view(torch.int32).sum(dtype=torch.int64) for p in self.whole_parameters()]
        weights = torch.stack(bits).tolist() if bits else []
        everyone = self.gather((weights, batch, list(rows)))
        if any(weights != everyone[0][0] for weights, _, _ in everyone):
            raise RuntimeError("the weights differ between ranks after the first step: gradients were not reduced")
        if any(other != batch for _, other, _ in everyone):
            raise RuntimeError("the global batch differs between ranks: they do not read the same data")
        trained = [row for _, _, share in everyone for row in share]
        if len(set(trained)) < len(trained):
            raise RuntimeError("two ranks trained on the same rows: the batch was not shared out")

    def whole_parameters(self) -> list[Tensor]:
        """The parameters that every rank holds whole, outside a forward pass."""
        return list(self.module.parameters())

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
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        several = DistributedType.MULTI_CPU if on_cpu else DistributedType.MULTI_GPU
        super().__init__(config, accelerator, DistributedType.NO if alone else several)

    def resolve_precision(self, setting: str) -> Precision:
        """fp32 weights, bf16 products where asked or fast."""
        return resolve_precision(setting, self.device)

    def prepare(self, module: LossModel, optimizer: Aurora) -> None:
        """Move the model to the device, compile it if asked, and wrap it for data parallelism."""
        module.to(self.device)
        if self.config.train.compile:
            module.compile()  # in place: the names of the parameters stay
        self.module = module
        self.model = self.accelerator.prepare(module)
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
