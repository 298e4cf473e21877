"""What every engine has; the trainer talks to an engine through these methods alone.

Gradients reach the optimizer summed over every rank and micro-batch, never averaged: the loss is divided by the global
number of target tokens before the backward pass.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor

from optimizers import Aurora
from optimizers.sharded import Held
from pretrain.config import Config
from pretrain.engine.precision import resolve_precision
from pretrain.engine.ranks import Ranks
from pretrain.model.build import build_model
from pretrain.model.loss import LossModel

TIMEOUT = timedelta(minutes=30)
"""How long a collective waits for the other ranks."""


class Engine:
    """What every engine has.

    Args:
        config: the run's.
        accelerator: set up for the processes of this run.
        precision: dtypes of weights and products.

    Attributes:
        ranks: the processes of the run, for values and errors on the CPU.
        rank, world_size: of this process.
        device: where the model lives.
        precision: dtypes of weights and products.
        model: what to call for training; set by `build`.
        module: the model with its loss, inside `model`.

    Raises:
        RuntimeError: the processes did not find each other (each would train alone without noticing).
    """

    model: torch.nn.Module
    module: LossModel
    is_deepspeed = False
    say: Callable[[str], None] = staticmethod(lambda line: None)
    """Prints a line on rank 0."""

    def __init__(self, config: Config, accelerator: Accelerator, expected: DistributedType) -> None:
        self.config, self.accelerator = config, accelerator
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        self.precision = resolve_precision(config.train.precision, self.device, deepspeed=self.is_deepspeed)
        self._check_world(expected)
        self.ranks = Ranks(self.rank, self.world_size, self._make_cpu_group())

    def _check_world(self, expected_type: DistributedType) -> None:
        expected = int(os.environ.get("WORLD_SIZE", "1"))
        kind = self.accelerator.distributed_type
        # Under a launcher Accelerate calls a single process distributed too; there is nothing to get wrong then.
        if self.world_size != expected or (self.world_size > 1 and kind != expected_type):
            raise RuntimeError(
                f"{expected} processes were started, but Accelerate sees {self.world_size} (type {kind}, expected "
                f"{expected_type}): each would train alone. Start them with torchrun, without ACCELERATE_* variables"
            )

    def _make_cpu_group(self) -> dist.ProcessGroup | None:
        if self.world_size == 1:
            return None
        return dist.group.WORLD if self.device.type == "cpu" else dist.new_group(backend="gloo")

    def build(self, load: Callable[[torch.nn.Module], None] | None = None) -> Aurora:
        """Build the model and its optimizer, and take both over.

        This is the door for an engine whose ranks never hold the whole model: it may build and load piece by piece.

        Args:
            load: fills the weights of a language model; None keeps the initial ones.

        Returns:
            The optimizer, over the parameters as this engine keeps them.

        Raises:
            ConfigError: the optimizer section does not fit the model.
        """
        model = build_model(self.config.model, self.config.run.seed)
        if load is not None:
            load(model)
        optimizer = Aurora(self.config.optimizer.param_groups(model))
        self.prepare(LossModel(model, self.config.train), optimizer)
        return optimizer

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
        everyone = self.ranks.gather((weights, batch, list(rows)))
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

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            # Gloo's threads need the interpreter's lock to release the tensors of the last collective, and DDP's
            # destructor holds it while it waits for those threads: without a pause some runs hang at their end.
            time.sleep(0.2)
            dist.destroy_process_group()
        # Accelerate keeps what it found for the life of the process; the next run may use another engine.
        AcceleratorState._reset_state(reset_partial_state=True)
