"""The engine on torch's fully_shard (FSDP2): weights, gradients and optimizer state are divided among the ranks.

Every parameter becomes a DTensor of which each rank stores some rows, in fp32. The blocks of the model are sharded one
by one, and what is left of it together. Accelerate only sets up the processes: on CPUs it ignores a plugin for FSDP2
without a word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from optimizers import Aurora
from optimizers.dtensors import dense_grad
from optimizers.sharded import DTensorMatrices, Held
from optimizers.sharded.engines.fully_shard import read_layout
from optimizers.sharded.rows import RowShards
from pretrain.config import Config
from pretrain.engine.base import Engine, patience
from pretrain.model.loss import LossModel


class Fsdp2Engine(Engine):
    """Shards parameters over the processes that a launcher started (gloo on CPUs, NCCL on GPUs), or over a single one.

    Raises:
        ConfigError: `engine.shard_ranks` does not divide the number of processes.
    """

    def __init__(self, config: Config) -> None:
        on_cpu = not torch.cuda.is_available()
        # On CPUs Accelerate detects the other processes only with cpu=True.
        accelerator = Accelerator(
            cpu=on_cpu, mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=patience(config))]
        )
        super().__init__(config, accelerator, DistributedType.MULTI_CPU if on_cpu else DistributedType.MULTI_GPU)
        config.engine.sharding_ranks(self.world_size)  # before there is a process group to be left behind
        if not dist.is_initialized():
            dist.init_process_group("gloo" if on_cpu else "nccl", store=dist.HashStore(), rank=0, world_size=1)
        self.mesh = self._make_mesh()
        self.sharded: RowShards | None = None
        self._matrices: dict[str, Any] = {}
        self._held: Held | None = None

    def _make_mesh(self) -> DeviceMesh:
        """One dimension, over which parameters are sharded; with several replicas another one before it."""
        shards = self.config.engine.sharding_ranks(self.world_size)
        replicas = self.world_size // shards
        shape, names = (replicas, shards), ("replicate", "shard")
        first = 0 if replicas > 1 else 1
        return init_device_mesh(self.device.type, shape[first:], mesh_dim_names=names[first:])

    @property
    def held(self) -> Held | None:
        """The layout as read from the DTensors."""
        return self._held

    def shard(self, module: LossModel) -> None:
        """Shard the parameters of a model in place, moving a block at a time to the device; compile blocks if asked."""
        policy = MixedPrecisionPolicy()
        if self.precision.is_bf16:
            reduced = torch.bfloat16 if self.config.engine.communication_dtype == "bf16" else torch.float32
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduced)
        for part in [*_blocks(module), module]:
            if self.config.train.compile and part is not module:
                # Not the hooks of fully_shard, which gather the weights before this call.
                part.forward = torch.compile(part.forward)
            sharded = fully_shard(
                part,
                mesh=self.mesh,
                # The root too: otherwise a validation would leave weights gathered that the next step changes.
                reshard_after_forward=self.config.engine.reshard_after_forward or part is module,
                mp_policy=policy,
            )
            # Gradients are summed. Gloo knows sums only.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)

    def prepare(self, module: LossModel, optimizer: Aurora) -> None:
        """Find out where everything lies, and who works on which matrix; a collective."""
        self.module = self.model = module
        holder = DTensorMatrices(self.config.engine.wire_dtype)
        optimizer.bind(holder)
        self._held = read_layout(optimizer.param_groups)
        for group in optimizer.param_groups:
            if group["kind"] == "matrix":
                self._matrices, self.sharded = group, holder.sharded(group)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass; the gradients of the ranks are summed."""
        loss.backward()

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Reduce gradients only in the last micro-batch; until then each rank sums its own, of all parameters."""
        for part in self._parts():
            part.set_requires_gradient_sync(last, recurse=False)
        yield

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """As the base class does, from the sums of squares of all ranks over which parameters are sharded."""
        gradients = [dense_grad(p) for p in self.module.parameters() if p.grad is not None]
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        norms = [torch.linalg.vector_norm(gradient, dtype=dtype) for gradient in gradients]
        squares = torch.stack(norms).square().sum()
        dist.all_reduce(squares, group=self.mesh["shard"].get_group())
        norm, agreed = self.agree_on_norm(squares.sqrt().float())
        factor = torch.ones_like(norm) if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, torch.where(agreed, factor, torch.nan))
        return norm

    def step(self, optimizer: Aurora) -> Tensor:
        """Clip the gradients, step, and free them."""
        norm = self.clip_gradients(self.config.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def whole_parameters(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def refresh(self, load: Callable[[nn.Module], None]) -> None:
        """Drop what is still gathered of the weights from before."""
        for part in self._parts():
            part.reshard()

    def _parts(self) -> list[FSDPModule]:
        """The blocks and the root, each of which gathers its own weights."""
        return [part for part in self.module.modules() if isinstance(part, FSDPModule)]

    def describe(self) -> list[str]:
        """The mesh, and who owns which matrices."""
        shards, replicas = self.mesh["shard"].size(), self.world_size // self.mesh["shard"].size()
        blocks = len(_blocks(self.module))
        lines = [
            *super().describe(),
            f"FSDP2     {blocks} blocks and the rest, each over {shards} ranks, in {replicas} "
            f"{'replica' if replicas == 1 else 'replicas'}",
        ]
        if self.sharded is not None:
            lines += self.describe_owners(self.sharded.plan, max(self.sharded.planned_bytes(self._matrices)))
        return lines


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The layers of a language model."""
    layers = next(part for part in module.modules() if isinstance(part, nn.ModuleList))
    return list(layers)
