"""The engine of DeepSpeed's ZeRO, set up through Accelerate.

DeepSpeed reduces, clips and shards the gradients, and calls the optimizer with flat fp32 shards. Where each parameter
lies in those shards is read once after set-up. Everything else stays with us: its configuration is generated here, its
step is called where the trainer steps, and checkpoints and the schedule are ours.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

# DeepSpeed reads this when it is imported; otherwise it looks for a GPU on machines that have none.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from deepspeed.utils import groups
from torch import Tensor

from optimizers import Aurora, has_fast_bf16
from optimizers.directions import treats
from optimizers.sharded import Held, ShardedMatrices, shard
from optimizers.sharded.engines.deepspeed import read_layout
from optimizers.sharded.matrices import doubts
from pretrain.config import Config, ConfigError
from pretrain.engine.base import Engine, patience
from pretrain.engine.precision import resolve_precision
from pretrain.model.loss import LossModel
from pretrain.processes.torchrun import free_port

# An inference kernel that DeepSpeed would compile for half a minute at its first start on a CPU.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

NO_GROUPS = {name: copy.copy(value) for name, value in vars(groups).items() if value is None or value == {}}
"""DeepSpeed's globals for process groups, as they are before the first run."""

WRAPPERS = {
    (0, False): "Aurora",
    (0, True): "FP16_UnfusedOptimizer",
    (1, False): "DeepSpeedZeroOptimizer",
    (1, True): "BF16_Optimizer",
    (2, False): "DeepSpeedZeroOptimizer",
    (2, True): "DeepSpeedZeroOptimizer",
    (3, False): "DeepSpeedZeroOptimizer_Stage3",
    (3, True): "DeepSpeedZeroOptimizer_Stage3",
}
"""The class in which DeepSpeed must wrap the optimizer, by (stage, bf16 weights). Stage 1 with bf16 weights uses the
class of stage 2 if gradients are accumulated in bf16 as well."""

# Larger than any group, so that a group is one sub-group and the optimizer gets all its matrices in one call.
ONE_SUB_GROUP = 10**12
# The share of a step that the rounding of fp32 weights may hide; above it, the check of the first step is skipped.
LARGEST_NOISE = 0.02
# Steps between DeepSpeed's reports of throughput; ours is in the metrics.
NEVER = 2**31


def deepspeed_config(config: Config, world_size: int, bf16: bool, on_gpu: bool) -> dict[str, Any]:
    """Return the complete DeepSpeed configuration of a run; it comes only from our config."""
    engine, train = config.engine, config.train
    rounds = config.accumulation(world_size)
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "reduce_bucket_size": engine.reduce_bucket_elements,
        "allgather_bucket_size": engine.gather_bucket_elements,
        "contiguous_gradients": True,
        "round_robin_gradients": False,
        # Stages 1 and 2 reduce each gradient to its owner. DeepSpeed's default all-reduces, which moves twice as much.
        "use_multi_rank_bucket_allreduce": False,
        # On a CPU there is no second stream to overlap with.
        "overlap_comm": on_gpu,
    }
    if engine.zero_stage == 3:
        zero |= {
            "sub_group_size": ONE_SUB_GROUP,
            "stage3_prefetch_bucket_size": engine.gather_bucket_elements,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    # Stage 0 in fp32 is clipped by us, as under the plain engine: DeepSpeed would not say the norm.
    clips = train.grad_clip is not None and (engine.zero_stage > 0 or bf16)
    return {
        "train_batch_size": train.micro_batch_sequences * rounds * world_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_sequences,
        "gradient_accumulation_steps": rounds,
        "gradient_clipping": train.grad_clip if clips else 0.0,
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "fp16": {"enabled": False},
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": engine.accumulation_dtype},
        "communication_data_type": engine.communication_dtype,
        "zero_optimization": zero,
    }


class DeepSpeedEngine(Engine):
    """ZeRO over the processes that a launcher started (gloo on CPUs, NCCL on GPUs), or on a single one.

    Raises:
        ConfigError: a precision that this stage does not support.
    """

    def __init__(self, config: Config) -> None:
        self._on_gpu = torch.cuda.is_available()
        if "RANK" not in os.environ:
            alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            os.environ |= alone | {"MASTER_PORT": str(free_port())}
        device = "cuda" if self._on_gpu else "cpu"
        fast_bf16 = has_fast_bf16(device)
        bf16 = resolve_precision(config.train, config.engine, fast_bf16=fast_bf16).is_bf16
        if problems := config.engine.precision_problems("bf16" if bf16 else "fp32"):
            raise ConfigError([f"engine.{problem}" for problem in problems])
        # It warns about every optimizer that is not its own.
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
        self.settings = deepspeed_config(config, int(os.environ["WORLD_SIZE"]), bf16, self._on_gpu)
        # On CPUs, Accelerate uses DeepSpeed only without cpu=True.
        accelerator = Accelerator(
            mixed_precision="bf16" if bf16 else "no",
            gradient_accumulation_steps=self.settings["gradient_accumulation_steps"],
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=self.settings),
            kwargs_handlers=[
                InitProcessGroupKwargs(backend="nccl" if self._on_gpu else "gloo", timeout=patience(config))
            ],
        )
        super().__init__(config, accelerator, DistributedType.DEEPSPEED)
        self._held: Held | None = None
        self._wrapper: Any = None
        self.sharded: ShardedMatrices | None = None
        self._checked = False

    @property
    def held(self) -> Held | None:
        """The layout as read from DeepSpeed; None under stage 0."""
        return self._held

    def prepare(self, module: LossModel, optimizer: Aurora) -> None:
        """Hand both to DeepSpeed, then find out where everything lies.

        Raises:
            RuntimeError: DeepSpeed wrapped them in something unexpected.
        """
        parameters = dict(module.model.named_parameters())
        named = [{name: parameters[name] for name in group["param_names"]} for group in optimizer.param_groups]
        # Stage 0 with bf16 weights calls step() once during set-up.
        with optimizer.paused():
            self.model, _ = self.accelerator.prepare(module, optimizer)
        self.module = module
        self._wrapper = self.model.optimizer
        self._check_engine(optimizer)
        self._held = read_layout(self._wrapper, named, self.rank, self.world_size, self.ranks.group)
        if self._held is not None:
            wire_dtype = self.config.engine.wire_dtype
            self.sharded = shard(optimizer, self._held.layout, self.rank, wire_dtype=wire_dtype, device=self.device)

    def _check_engine(self, optimizer: Aurora) -> None:
        engine: Any = self.model
        stage, bf16 = self.config.engine.zero_stage, self.precision.weights == torch.bfloat16
        wanted = WRAPPERS[stage, bf16 and (stage != 1 or self.config.engine.accumulation_dtype == "fp32")]
        found = type(self._wrapper).__name__
        problems = []
        if not isinstance(engine, deepspeed.DeepSpeedEngine):
            problems.append(f"the engine is a {type(engine).__name__}, expected deepspeed.DeepSpeedEngine")
        elif engine.dp_world_size != self.world_size:
            problems.append(f"DeepSpeed sees {engine.dp_world_size} ranks of {self.world_size}")
        if found != wanted:
            problems.append(f"DeepSpeed put a {found} around the optimizer, expected {wanted}")
        if "muon" in type(optimizer).__name__.lower() or any(
            getattr(p, "use_muon", False) for p in self.module.parameters()
        ):
            # DeepSpeed would orthogonalise the gradients itself, and clip the result.
            problems.append("a class name with 'muon' or a parameter tagged use_muon: DeepSpeed would step it itself")
        if problems:
            raise RuntimeError("; ".join(problems))

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed averages over ranks; the factor makes it a sum. Its division by the accumulation steps is off."""
        self.model.backward(loss * self.world_size, scale_wrt_gas=False)  # type: ignore[operator]

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Tell DeepSpeed whether this is the last micro-batch."""
        self.model.set_gradient_accumulation_boundary(last)  # type: ignore[operator]
        yield

    def step(self, optimizer: Aurora) -> Tensor:
        """DeepSpeed's step. If it skips one because gradients are not finite, the optimizer is told."""
        engine: Any = self.model
        optimizer.reset_report()
        if self._wrapper is optimizer:
            norm = self.clip_gradients(self.config.train.grad_clip)
            engine.step()
            return norm
        self._agree()
        with self._first_step_checked(optimizer):
            engine.step()
        if self._wrapper.overflow:
            optimizer.last_step_finite.fill_(False)
        return torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)

    def _agree(self) -> None:
        """Make every rank overflow if one does, where each has all gradients and DeepSpeed does not ask the others."""
        match type(self._wrapper).__name__:
            case "FP16_UnfusedOptimizer":
                gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            case "BF16_Optimizer":
                gradients = self._wrapper.get_grads_for_norm()[0]
            case _:
                return
        if self.world_size > 1:
            norms = torch.stack(torch._foreach_norm(gradients)).float()
            _, agreed = self.agree_on_norm(torch.linalg.vector_norm(norms))
            gradients[0].mul_(torch.where(agreed, 1.0, torch.nan))

    @contextlib.contextmanager
    def _first_step_checked(self, optimizer: Aurora) -> Iterator[None]:
        """After the first step that changes anything, check from the weights that this optimizer can have made it."""
        sharded, held = self.sharded, self._held
        if self._checked or sharded is None or held is None:
            yield
            return
        flat, group = held.shards[sharded.shard].detach(), optimizer.param_groups[sharded.shard]
        before = flat.clone()
        yield
        if self._wrapper.overflow or not bool(optimizer.last_step_finite) or not group["lr"]:
            return
        self._checked = True
        longest = max(max(unit.shape) for unit in sharded.plan.units)
        noise = 2.0**-24 * before.square().mean().sqrt().item() / group["lr"] * 2 * longest**0.5
        if self.ranks.gather(noise > LARGEST_NOISE).count(True):
            return  # the rate is so small that the rounding of the weights hides the step
        own = sharded.applied(before, flat, group)
        measured = [applied for some in self.ranks.gather(own) for applied in some]
        if problems := doubts(measured, group):
            raise RuntimeError("the first step cannot have been made by this optimizer: " + "; ".join(problems[:5]))
        moved = [applied for applied in measured if applied.filled]
        balanced = [a.spread for a in moved if treats(group, *a.unit.shape)]
        if moved:
            largest = f"{min(a.largest for a in moved):.4f} to {max(a.largest for a in moved):.4f}"
            rows = f", row norms of balanced ones within {max(balanced):.2%}" if balanced else ""
            self.say(f"first step: {len(moved)} matrices, largest singular values {largest}{rows}")

    def describe(self) -> list[str]:
        """The generated configuration, what DeepSpeed made of it, and who owns which matrices."""
        lines = [*super().describe(), f"deepspeed {json.dumps(self.settings)}"]
        lines.append(f"ZeRO      stage {self.config.engine.zero_stage}, optimizer in a {type(self._wrapper).__name__}")
        if self.sharded is not None:
            plan = self.sharded.plan
            item = 2 if self.config.engine.wire_dtype == "bf16" else 4
            lines += self.describe_owners(plan, max(plan.received_elements) * item)
        return lines

    def close(self) -> None:
        """Leave the process group, and let go of it in DeepSpeed."""
        super().close()
        # DeepSpeed keeps process groups in globals, which a later run in this process would take up.
        deepspeed.comm.comm.cdb = None
        vars(groups).update({name: copy.copy(value) for name, value in NO_GROUPS.items()})

    def whole_parameters(self) -> dict[str, Tensor]:
        """None under stage 3."""
        return {} if self.config.engine.zero_stage == 3 else super().whole_parameters()

    def refresh(self, load: Callable[[torch.nn.Module], None]) -> None:
        """Write the weights of the forward pass anew, which are copies of those that the optimizer steps."""
        if self.config.engine.zero_stage < 3:
            load(self.module.model)
            return
        for group in range(len(self._wrapper.fp16_groups)):
            self._wrapper._reassign_or_swap_out_partitioned_parameters(group)
