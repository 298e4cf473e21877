"""Planted failures. Python imports this module at its start when this folder is on PYTHONPATH.

AURORA_TEST_FAULT names the failure, AURORA_TEST_FAULT_RANK the rank it happens on (every rank without it), and
AURORA_TEST_FAULT_STEP the call of the optimizer's step at which it happens; 0: when `optimizers` is imported, before
the ranks have met.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys
from types import ModuleType
from typing import Any


def _fail() -> None:
    import torch

    from pretrain.processes.errors import UserError

    match os.environ["AURORA_TEST_FAULT"]:
        case "memory":
            raise MemoryError("no memory for 12 bytes")
        case "out of memory":
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        case "runtime":
            raise RuntimeError("kernel failed")
        case "value":
            torch.zeros(2, 3).view(5, 7).reshape(-1)  # a RuntimeError of torch
        case "plain value":
            torch.distributed.init_process_group("no such backend", init_method="no://where")  # a ValueError of torch
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            sys.exit(3)
        case "exit 0":
            sys.exit(0)
        case "silent exit":
            os._exit(5)
        case "bad input":
            raise UserError("data/part-7.jsonl: line 3 is not JSON\n  it reads: {\ndata/part-8.jsonl: empty")
        case "interrupt":
            raise KeyboardInterrupt
        case other:
            raise AssertionError(other)


def _plant(optimizers: Any) -> None:
    wanted = int(os.environ.get("AURORA_TEST_FAULT_STEP", "2"))
    if wanted == 0:
        _fail()
    step, calls = optimizers.Aurora.step, 0

    def failing(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == wanted:
            _fail()
        return step(self, *arguments, **options)

    optimizers.Aurora.step = failing


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != "optimizers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_plant(module: ModuleType) -> None:
            load(module)
            _plant(module)

        spec.loader.exec_module = load_and_plant  # type: ignore[method-assign]
        return spec


_rank = os.environ.get("AURORA_TEST_FAULT_RANK")
if "AURORA_TEST_FAULT" in os.environ and "RANK" in os.environ and _rank in (None, os.environ["RANK"]):
    sys.meta_path.insert(0, _Finder())
