"""The interface of engines; the trainer uses only these methods.

Gradients reach the optimizer summed, not averaged, over all ranks and micro-batches: the loss is divided by the global
number of target tokens before the backward pass.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed import distributed_c10d

from optimizers import Aurora, has_fast_bf16
from optimizers.matrices import WholeMatrices
from optimizers.sharded import DividedMatrices, Held, Plan
from pretrain.config import Config
from pretrain.engine.precision import resolve_precision
from pretrain.engine.ranks import Ranks
from pretrain.model.attention import choose_kernel
from pretrain.model.build import build_model
from pretrain.model.loss import LossModel

# Relative difference of the norms of the same gradients on two ranks that different processors can explain.
NORM_TOLERANCE = 1e-3
# Elements whose bits are summed at the same time; bounds the memory of a comparison of weights.
HASHED_ELEMENTS = 1 << 22


class Replicas(WholeMatrices):
    """The holder of parameters that are whole on each of several processes, which step them alike or not at all."""

    def agree(self, finite: Tensor) -> Tensor:
        """Whether the flag is true on every rank."""
        flag = finite.to(torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return flag.bool()


def patience(config: Config) -> timedelta:
    """How long a collective waits for the other ranks, one of which may itself be waiting for a data server."""
    return timedelta(minutes=30 + config.data.retry_minutes)


def extend_timeouts(timeout: timedelta) -> None:
    """Set the timeout of every process group of this process.

    Libraries make groups of their own, with torch's default of 30 minutes (10 under NCCL): less than a rank may wait
    for a data server before it takes part in the next step.
    """
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timeout, group)


class Engine:
    """Base class of the engines.

    Args:
        config: the run's config.
        accelerator: an Accelerator, set up for the processes of this run.
        expected: the type of distribution that Accelerate should have detected.

    Attributes:
        ranks: the processes of the run, for exchanging values and errors on the CPU.
        rank, world_size: rank of this process and number of processes.
        device: the device of the model.
        precision: dtypes of weights and matrix products.
        document_kernel: how attention is computed if the config asks for document masks or restarted positions.
        model: the wrapped model, to be called in training; set by `build`.
        module: the model with its loss, inside `model`.

    Raises:
        RuntimeError: the processes did not find each other, so each would train on its own.
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
        fast_bf16 = has_fast_bf16(self.device)
        self.precision = resolve_precision(config.train, config.engine, fast_bf16=fast_bf16)
        dtype = torch.bfloat16 if self.precision.is_bf16 else torch.float32
        heads = config.model.hidden_size // config.model.num_heads
        wanted = config.train.document_attention
        self.document_kernel = choose_kernel(wanted, self.device, dtype, heads, config.sequence_length)
        self._check_world(expected)
        self.ranks = Ranks(self.rank, self.world_size, self._make_cpu_group())

    def _check_world(self, expected_type: DistributedType) -> None:
        expected = int(os.environ.get("WORLD_SIZE", "1"))
        kind = self.accelerator.distributed_type
        # Under a launcher Accelerate calls even a single process distributed, which does no harm.
        if self.world_size != expected or (self.world_size > 1 and kind != expected_type):
            raise RuntimeError(
                f"{expected} processes were started, but Accelerate sees {self.world_size} (type {kind}, expected "
                f"{expected_type}), so each would train on its own. Start them with torchrun and unset all "
                "ACCELERATE_* variables"
            )

    def _make_cpu_group(self) -> dist.ProcessGroup | None:
        if self.world_size == 1:
            return None
        return dist.group.WORLD if self.device.type == "cpu" else self.new_ranks().group

    def new_ranks(self) -> Ranks:
        """Return the processes of the run with a new group for CPU tensors; a collective.

        Collectives of one group may run at the same time as those of another.
        """
        if self.world_size == 1:
            return Ranks()
        group = dist.new_group(backend="gloo", timeout=patience(self.config))
        return Ranks(self.rank, self.world_size, group)

    def build(self, load: Callable[[torch.nn.Module], None] | None = None) -> Aurora:
        """Build the model and its optimizer, and prepare both for training.

        Args:
            load: loads weights into a language model; None keeps the initial weights.

        Returns:
            The optimizer of the parameters as this engine holds them.

        Raises:
            ConfigError: the optimizer section does not fit the model.
        """
        model = build_model(self.config.model, self.config.run.seed)
        if load is not None:
            load(model)
        module = LossModel(model, self.config.train)
        self.shard(module)
        optimizer = Aurora(self.config.optimizer.param_groups(model))
        self.prepare(module, optimizer)
        if self.world_size > 1:
            extend_timeouts(patience(self.config))
            if optimizer.matrices.is_whole and self.held is None:
                has_matrices = any(group["kind"] == "matrix" for group in optimizer.param_groups)
                divides = has_matrices and self.config.engine.divides_matrices(self.world_size)
                optimizer.bind(DividedMatrices() if divides else Replicas())
        return optimizer

    def shard(self, module: LossModel) -> None:
        """Divide the parameters of a model among the ranks, if that has to be done before its optimizer is made."""

    def prepare(self, module: LossModel, optimizer: Aurora) -> None:
        """Prepare a model and its optimizer for training that starts from the model's current weights."""
        raise NotImplementedError

    def describe(self) -> list[str]:
        """Return lines that describe the set-up, to be printed when a run starts."""
        lines = [f"device    {self.device}, {self.world_size} ranks, {self.precision}"]
        if self.config.data.document_mask or self.config.data.reset_positions:
            lines.append(f"attention {self.document_kernel.kernel}: {self.document_kernel.reason}")
        return lines

    def describe_owners(self, plan: Plan, received: int) -> list[str]:
        """Return lines that say who works on which matrices.

        Args:
            plan: of the matrices.
            received: bytes of momenta and steps that the rank that receives most receives in a step.
        """
        return [
            f"owners    {len(plan.units)} matrices, slowest rank {plan.imbalance:.3f} of an equal share, at most "
            f"{received:,} bytes received by a rank a step in {self.config.engine.wire_dtype}",
            *(f"          {line}" for line in plan.table()),
        ]

    @property
    def held(self) -> Held | None:
        """This rank's shards of the optimizer's parameters; None if every rank holds whole parameters."""
        return None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the autocast context of every forward pass."""
        dtype = self.precision.autocast
        return torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a micro-batch's loss, already divided by the global number of targets."""
        raise NotImplementedError

    def accumulate(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a micro-batch's forward and backward pass; gradients are reduced only in the last."""
        raise NotImplementedError

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Clip all gradients to a global 2-norm of at most `max_norm`; return the norm before, without a host sync.

        If the ranks' norms are not finite and equal, every gradient becomes NaN on every rank, so that all optimizers
        skip the whole step: even if only the norm overflowed, or if the memory or a link of one rank has corrupted what
        had been reduced.
        """
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        # On a CPU torch adds squares one after another: in fp32 the norm of an embedding comes out 1e-4 too small.
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        norms = [torch.linalg.vector_norm(gradient, dtype=dtype) for gradient in gradients]
        norm, agreed = self.agree_on_norm(torch.linalg.vector_norm(torch.stack(norms)).float())
        factor = torch.ones_like(norm) if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, torch.where(agreed, factor, torch.nan))
        return norm

    def agree_on_norm(self, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest norm of any rank, and whether all are finite and equal; without a host sync.

        For ranks that hold the same gradients and each take the norm by themselves.
        """
        if self.world_size == 1:
            return norm, norm.isfinite()
        # What the maximum of a NaN and a number is depends on their order.
        known = torch.where(norm.isfinite(), norm, torch.inf)
        ends = torch.stack([known, -known])
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        high, low = ends[0], -ends[1]
        return high, high.isfinite() & (high - low <= NORM_TOLERANCE * high)

    def step(self, optimizer: Aurora) -> Tensor:
        """Clip the gradients, step, and free them; return their global 2-norm before clipping, without a host sync."""
        raise NotImplementedError

    def to_device(self, values: Tensor) -> Tensor:
        """Return a CPU tensor on the engine's device, without waiting for what the device is doing."""
        if self.device.type != "cuda":
            return values
        return values.pin_memory().to(self.device, non_blocking=True)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Return the elementwise sum of a device tensor over the ranks."""
        return self.accelerator.reduce(values, "sum")

    def check_in_step(self, batch: str, rows: Sequence[int]) -> None:
        """Check that after the first step all ranks have equal weights and used different rows of the same batch.

        This is a collective.

        Args:
            batch: hash of the global batch.
            rows: the rows of it that this rank trained on.

        Raises:
            RuntimeError: the ranks do not train the same model together.
        """
        if self.world_size == 1:
            return
        everyone = self.ranks.gather((self.weight_hashes(), batch, list(rows)))
        if any(weights != everyone[0][0] for weights, _, _ in everyone):
            raise RuntimeError("the weights differ between ranks after the first step: gradients were not reduced")
        if any(other != batch for _, other, _ in everyone):
            raise RuntimeError("the global batch differs between ranks: they did not read the same data")
        trained = [row for _, _, share in everyone for row in share]
        if len(set(trained)) < len(trained):
            raise RuntimeError("two ranks trained on the same rows: the batch was not divided over the ranks")

    @torch.no_grad()
    def weight_hashes(self) -> dict[str, int]:
        """Return a hash of the bits of each parameter that every rank holds whole, by name; waits for the device."""
        hashes = {}
        for name, parameter in self.whole_parameters().items():
            total = torch.zeros((), dtype=torch.int64, device=parameter.device)
            for part in parameter.detach().reshape(-1).split(HASHED_ELEMENTS):
                bits = part.float().view(torch.int32).long()
                odd = torch.arange(1, 2 * len(bits), 2, device=bits.device)
                total = 31 * total + (bits * odd).sum()  # int64 wraps around
            hashes[name] = total
        values = torch.stack(list(hashes.values())).tolist() if hashes else []
        return dict(zip(hashes, values, strict=True))

    def differing_ranks(self) -> dict[int, str]:
        """Compare the weights that every rank holds whole; a collective.

        Returns:
            The ranks whose weights are not those of most ranks, or of rank 0 if there is no majority, each with its
            machine and the first parameter that differs.
        """
        everyone = self.ranks.gather((socket.gethostname(), self.weight_hashes()))
        hashes = [found for _, found in everyone]
        usual = max(hashes, key=hashes.count)
        return {
            rank: f"{host}, {next(name for name, value in found.items() if value != usual[name])}"
            for rank, (host, found) in enumerate(everyone)
            if found != usual
        }

    def refresh(self, load: Callable[[torch.nn.Module], None]) -> None:
        """Take over weights that were written into the tensors that the optimizer steps.

        Args:
            load: writes the same weights into a model that this rank holds whole.
        """

    def whole_parameters(self) -> dict[str, Tensor]:
        """Return the parameters that every rank holds whole outside a forward pass, by name."""
        return dict(self.module.named_parameters())

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()
        # Accelerate keeps its state for the life of the process, but the next run may use another engine.
        AcceleratorState._reset_state(reset_partial_state=True)
