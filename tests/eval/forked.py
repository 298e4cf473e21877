"""Processes that are forked from the test: they need no imports, and may be killed or meet as ranks."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

from pretrain.processes.torchrun import free_port

CONTEXT = multiprocessing.get_context("fork")
TIMEOUT_SECONDS = 240


def run_forked(work: Callable[[], Any]) -> int:
    """Run `work` in a new process; return its exit code, which is negative for a signal."""
    process = CONTEXT.Process(target=_alone, args=(work,))
    process.start()
    process.join(TIMEOUT_SECONDS)
    if process.is_alive():
        process.kill()
        raise AssertionError("it did not end in time")
    assert process.exitcode is not None
    return process.exitcode


def run_ranks(count: int, work: Callable[[], Any], per_node: int | None = None) -> list[tuple[Any, str | None]]:
    """Run `work` on `count` ranks, `per_node` of them on each simulated node; return (value, traceback) of each."""
    results, port = CONTEXT.Queue(), free_port()
    processes = [
        CONTEXT.Process(target=_rank, args=(rank, count, per_node or count, port, results, work))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    found: dict[int, tuple[Any, str | None]] = {}
    try:
        while len(found) < count:
            rank, value, error = results.get(timeout=TIMEOUT_SECONDS)
            found[rank] = value, error
    finally:
        for process in processes:
            process.join(timeout=10 if len(found) == count else 0.1)
            if process.is_alive():
                process.kill()
                process.join()
    return [found[rank] for rank in range(count)]


def _alone(work: Callable[[], Any]) -> None:
    _one_thread()
    work()


def _rank(rank: int, count: int, per_node: int, port: int, results: Any, work: Callable[[], Any]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % per_node),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(per_node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    _one_thread()
    try:
        results.put((rank, work(), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def _one_thread() -> None:
    """OpenMP's threads do not survive a fork."""
    import torch

    torch.set_num_threads(1)
