"""Run a function on several gloo ranks of this machine.

The processes come from a fork server that has imported the trainer once, so that a launch costs a fraction of a
second instead of the ten that the imports take.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable
from typing import Any

from pretrain.processes.torchrun import free_port

CONTEXT = multiprocessing.get_context("forkserver")
# The last ones are what DeepSpeed and the plain engine import only when a run starts; with them half of a short run's
# time is spared on every rank.
CONTEXT.set_forkserver_preload(
    [
        "pretrain.launch",
        "pretrain.engine.deepspeed",
        "tests.distributed.scenarios",
        "deepspeed.runtime.zero.muon.muon_optimizer",  # compiles its functions, which imports torch._inductor
        "deepspeed.runtime.zero.stage3",
        "deepspeed.runtime.superoffload.superoffload_stage3",
        "torch.profiler._cupti_monitor",
    ]
)
TIMEOUT_SECONDS = 240


def _rank(rank: int, world_size: int, port: int, results: Any, work: Callable[..., Any], arguments: Any) -> None:
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
    import torch

    torch.set_num_threads(1)
    try:
        results.put((rank, work(*arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def start_ranks(world_size: int, work: Callable[..., Any], *arguments: Any) -> tuple[list[Any], Any]:
    """Start `work(*arguments)` on each of `world_size` new processes; the processes by rank, and their results.

    The results are a queue of (rank, value, traceback of an error).
    """
    port, results = free_port(), CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=_rank, args=(rank, world_size, port, results, work, arguments), daemon=False)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes, results


def run_ranks(
    world_size: int, work: Callable[..., Any], *arguments: Any, timeout_seconds: float = TIMEOUT_SECONDS
) -> list[Any]:
    """`work(*arguments)` on each of `world_size` new processes; their results by rank.

    Raises:
        AssertionError: with the traceback of a rank that failed, or if one does not end in time.
    """
    processes, results = start_ranks(world_size, work, *arguments)
    found: dict[int, Any] = {}
    try:
        for _ in processes:
            try:
                rank, value, error = results.get(timeout=timeout_seconds)
            except queue.Empty:
                codes = {rank: processes[rank].exitcode for rank in range(world_size) if rank not in found}
                raise AssertionError(f"no result in {timeout_seconds} s; exit codes by rank: {codes}") from None
            assert error is None, f"rank {rank} of {world_size}:\n{error}"
            found[rank] = value
    finally:
        for process in processes:
            process.join(timeout=10 if len(found) == world_size else 0.1)
            if process.is_alive():
                process.kill()
                process.join()
    return [found[rank] for rank in range(world_size)]
