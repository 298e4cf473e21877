"""Environment variables that decide who this process is, or that would change training without the config's say.

Launchers describe a process by RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Shells, job scripts and MPI
leave similar variables behind, and Accelerate reads about fifty of its own. The tables below say what happens to
each, and why. This module loads neither torch nor Accelerate.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from pretrain.processes.errors import UserError
from pretrain.processes.redaction import redact

LAUNCHER = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "TORCHELASTIC_USE_AGENT_STORE",  # the process group's store is torchrun's: one process opens a store of its own
)
"""What torchrun, `accelerate launch` and deepspeed set. There are several processes only with RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT; anything less is left over from something else. A single process does without all of them,
so that it does not matter what started it."""

MPI = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
"""Prefixes of what MPI launchers and srun set. Accelerate takes sizes and ranks from them, but processes that were
started that way do not find each other here."""

HARMLESS = {
    "ACCELERATE_CPU_AFFINITY": "binds a process to cores near its GPU",
    "ACCELERATE_DEBUG_MODE": "checks the shapes that collectives exchange",
    "ACCELERATE_DEBUG_RDV_FILE": "names a file of Accelerate's notebook launcher",
    "ACCELERATE_DISABLE_RICH": "changes how tracebacks look",
    "ACCELERATE_ENABLE_RICH": "changes how tracebacks look",
    "ACCELERATE_LOG_LEVEL": "selects log messages",
    "ACCELERATE_NUM_PROCESSES": "is read by Accelerate's own commands only",
}
"""Variables of Accelerate that stay, with what they do."""

NEUTRAL = ("", "0", "no", "none", "false", "off", "strict")
"""Values, in lower case, that ask for nothing."""


class Rule(NamedTuple):
    """What happens to a variable of Accelerate while a run trains."""

    why: str
    """What it would change, and what decides that here."""
    neutral: tuple[str, ...] = NEUTRAL
    """Values, in lower case, that are dropped without a warning: launchers set them on their own."""


OVERRIDDEN = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": Rule(
        "it would divide every gradient; train.global_batch_tokens and train.micro_batch_sequences decide",
        (*NEUTRAL, "1"),
    ),
    "ACCELERATE_GRADIENT_CLIPPING": Rule("train.grad_clip decides"),
    "ACCELERATE_MIXED_PRECISION": Rule("train.precision decides"),
    "ACCELERATE_DOWNCAST_BF16": Rule("train.precision decides"),
    "ACCELERATE_USE_CPU": Rule("there is a GPU, which is used; hide GPUs with CUDA_VISIBLE_DEVICES=''"),
    "ACCELERATE_TORCH_DEVICE": Rule("the rank decides the device; choose GPUs with CUDA_VISIBLE_DEVICES"),
    "ACCELERATE_BYPASS_DEVICE_MAP": Rule("this program does not use device maps"),
    "ACCELERATE_DYNAMO_BACKEND": Rule("it would compile the model; train.compile decides"),
    "ACCELERATE_USE_DEEPSPEED": Rule("engine.kind decides", (*NEUTRAL, "1", "true")),
}
"""Variables of Accelerate that are unset while a run trains."""

PARTS = {
    "ACCELERATE_DYNAMO_": "options of ACCELERATE_DYNAMO_BACKEND",
    "ACCELERATE_DEEPSPEED_": "DeepSpeed's settings; engine.* decides",
    "ACCELERATE_CONFIG_DS_FIELDS": "lists the settings of DeepSpeed that Accelerate's config file holds",
    "ACCELERATE_FP8_": "options of ACCELERATE_MIXED_PRECISION=fp8",
    "PARALLELISM_CONFIG_": "options of ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_SAGEMAKER_": "options of ACCELERATE_USE_SAGEMAKER",
}
"""Prefixes of options that have no effect without the switch they belong to. Unset without a warning."""

REFUSED = {
    "ACCELERATE_USE_FSDP": "it asks for FSDP, which is not supported; choose the engine with engine.kind",
    "ACCELERATE_USE_MEGATRON_LM": "it asks for Megatron-LM, which is not supported",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "it asks for model parallelism, which is not supported",
    "ACCELERATE_USE_SAGEMAKER": "it asks for SageMaker's data parallelism, which is not supported",
    "ACCELERATE_IN_TPU_POD": "it asks for TPUs, which are not supported",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "it would round fp32 matrix products to TF32, whatever train.precision says",
    "NVIDIA_TF32_OVERRIDE": "it would round fp32 matrix products to TF32, whatever train.precision says",
    "ONEDNN_DEFAULT_FPMATH_MODE": "it may round fp32 matrix products on CPUs, whatever train.precision says",
    "DNNL_DEFAULT_FPMATH_MODE": "it may round fp32 matrix products on CPUs, whatever train.precision says",
}
"""Switches that contradict every config, or that torch has read before this program can unset them."""


class LaunchError(UserError):
    """The environment asks for something that this program would not do."""


class World(NamedTuple):
    """The processes that a launcher started together."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1


def world() -> World:
    """This process among those that were started with it: a single one unless a launcher says otherwise in full."""
    given = {name: os.environ.get(name, "") for name in LAUNCHER}
    if not (given["MASTER_ADDR"] and given["MASTER_PORT"]):
        return World()
    try:
        rank, size = int(given["RANK"]), int(given["WORLD_SIZE"])
        local_rank = int(given["LOCAL_RANK"] or 0)
    except ValueError:
        return World()
    return World(rank, local_rank, size) if 0 <= rank < size and size > 1 else World()


@contextlib.contextmanager
def settled(engine: str, on_gpu: bool) -> Iterator[None]:
    """Unset what would change a run with this engine without its config; put it back afterwards.

    Args:
        engine: the config's ``engine.kind``.
        on_gpu: whether the run uses a GPU.

    Warns:
        UserWarning: on rank 0, for each variable that asked for something and is ignored.

    Raises:
        LaunchError: for variables that can only be refused.
    """
    if problems := _problems(engine, on_gpu):
        raise LaunchError("\n".join(problems))
    several = world().size > 1
    before = {name: value for name, value in os.environ.items() if _is_ours(name)}
    dropped = [name for name in sorted(before) if name not in HARMLESS and not (several and name in LAUNCHER)]
    for name in dropped:
        del os.environ[name]
    for name in dropped:
        if (why := _warning(name, before, on_gpu)) and world().rank == 0:
            warnings.warn(
                f"{name}={redact(before[name])} in the environment is ignored: {why}", UserWarning, stacklevel=3
            )
    try:
        yield
    finally:
        for name in [name for name in os.environ if _is_ours(name)]:
            del os.environ[name]
        os.environ.update(before)


def set_defaults() -> None:
    """Variables that torch and OpenMP read when they are loaded, unless they are set already."""
    # DDP warns about the cost of find_unused_parameters, which is intended (see pretrain.engine.base).
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Waiting threads spin by default: next to any other busy process, a step on CPUs takes twice as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _is_ours(name: str) -> bool:
    """Whether `settled` looks after this variable."""
    return name in LAUNCHER or name.startswith(("ACCELERATE_", "PARALLELISM_CONFIG_", *MPI))


def _is_neutral(value: str) -> bool:
    return value.lower() in NEUTRAL


def _problems(engine: str, on_gpu: bool) -> list[str]:
    problems = [
        f"{name}={redact(os.environ[name])} in the environment: {why}; unset it"
        for name, why in REFUSED.items()
        if not _is_neutral(os.environ.get(name, ""))
    ]
    name = "ACCELERATE_USE_DEEPSPEED"
    if engine != "deepspeed" and not _is_neutral(os.environ.get(name, "")):
        problems.append(
            f"{name}={os.environ[name]} in the environment: it asks for DeepSpeed, but engine.kind is {engine}; "
            "set engine.kind=deepspeed, or launch without DeepSpeed"
        )
    device, found = "cuda" if on_gpu else "cpu", os.environ.get("DS_ACCELERATOR", "")
    if engine == "deepspeed" and found not in ("", device):
        problems.append(
            f"DS_ACCELERATOR={redact(found)} in the environment: expected {device}, on which this run trains; unset it"
        )
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if rank and size.isdecimal() and int(size) > 1:
        if missing:
            problems.append(
                f"RANK={rank} and WORLD_SIZE={size} in the environment, but not {' and '.join(missing)}: start "
                "several processes with torchrun; for a single one, unset RANK and WORLD_SIZE"
            )
        elif world().size == 1:
            problems.append(f"RANK={rank} in the environment: expected a number below WORLD_SIZE={size}")
    return problems


def _warning(name: str, environment: Mapping[str, str], on_gpu: bool) -> str | None:
    """Why a variable that is unset deserves a warning; None if it does not."""
    value = environment[name]
    if name == "ACCELERATE_USE_CPU" and not on_gpu:
        return None
    if rule := OVERRIDDEN.get(name):
        return None if value.lower() in rule.neutral else rule.why
    if name in REFUSED or name.startswith(tuple(PARTS)):
        return None
    # One warning for each launcher that left something: where it says how many processes there are.
    if name == "WORLD_SIZE" or (name.startswith(MPI) and name.endswith("_SIZE") and not name.endswith("_LOCAL_SIZE")):
        alone = world().size == 1 and value not in ("", "0", "1")
        return "this process trains alone; start several with torchrun or --processes" if alone else None
    if name in ("RANK", "MASTER_ADDR"):
        return None if "WORLD_SIZE" in environment else "WORLD_SIZE is not set, so this process trains alone"
    if name in LAUNCHER or name.startswith(MPI):
        return None
    return "this program does not know it"
