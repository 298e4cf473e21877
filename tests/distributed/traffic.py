from __future__ import annotations
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from pretrain.training.trainer import Trainer
from tests.distributed.scenarios import run


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.seen.append((str(func), [(str(type(a)), [tuple(t.shape) for t in flat(a)], [str(t.dtype) for t in flat(a)]) for a in args]))
        return func(*args, **(kwargs or {}))

def flat(x):
    if isinstance(x, torch.Tensor): return [x]
    if isinstance(x, (list, tuple)): return [t for y in x for t in flat(y)]
    return []

def probe(root, changes):
    found = []
    def wrap(name, cls):
        call = getattr(cls, name)
        def w(self, *a, **k):
            c = Counter()
            with c:
                out = call(self, *a, **k)
            found.append((name, c.seen))
            return out
        return mock.patch.object(cls, name, w)
    import pretrain.engine.deepspeed as D
    extra = changes.pop("zero", {})
    orig = D.deepspeed_config
    def cfg(*a, **k):
        c = orig(*a, **k)
        c["zero_optimization"] |= extra
        return c
    D.deepspeed_config = cfg
    from pretrain.engine.deepspeed import DeepSpeedEngine
    from pretrain.engine.base import PlainEngine
    with wrap("forward_backward", Trainer), wrap("measure", Trainer), wrap("step", DeepSpeedEngine), wrap("step", PlainEngine):
        run(root, changes)
    return found
