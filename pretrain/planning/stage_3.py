"""How often ZeRO 3 gathers each weight: DeepSpeed's coordinator of parameters, replayed on the order of modules.

DeepSpeed 0.19.8 gathers the weights of a module before its forward and before its backward pass, and looks ahead: with
every module it also gathers the next weights that are not there, `prefetch` elements at a time, while fewer than
`LIVE_ELEMENTS` are gathered. After the module it drops its weights, unless it has looked ahead to their next use, or
that is fewer than `REUSE_ELEMENTS` away. A model of up to a billion parameters is therefore gathered once in every
micro-batch, and a larger one up to twice.
"""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

from pretrain.config import Config

LIVE_ELEMENTS = 10**9
"""DeepSpeed's default of stage3_max_live_parameters."""
REUSE_ELEMENTS = 10**9
"""DeepSpeed's default of stage3_max_reuse_distance."""

Visits = list[tuple[Tensor, ...]]


def padded(shape: Sequence[int], ranks: int) -> int:
    """Elements of a weight once it is filled up to equal chunks for all ranks."""
    return -(-prod(shape) // ranks) * ranks


def gathered_elements(
    config: Config, model: nn.Module, ranks: int, *, live: int = LIVE_ELEMENTS, reuse: int = REUSE_ELEMENTS
) -> int:
    """Elements gathered in the forward and backward pass of one micro-batch, padding included.

    Args:
        config: for the size of prefetches and activation checkpointing.
        model: with whole parameters, on any device.
        ranks: over which weights are cut.
        live: see `LIVE_ELEMENTS`.
        reuse: see `REUSE_ELEMENTS`.
    """
    calls = visits(config, model)
    prefetch = config.engine.gather_bucket_elements
    return sum(padded(p.shape, ranks) for p in _gatherings(calls, prefetch, live, reuse))


def _gatherings(calls: Visits, prefetch: int, live: int, reuse: int) -> list[Tensor]:
    """Each weight as often as it is gathered."""
    traversed = list(itertools.accumulate((sum(p.numel() for p in own) for own in calls), initial=0))
    upcoming = deque((p, index) for index, own in enumerate(calls) for p in own)
    uses: dict[Tensor, list[int]] = {}
    for p, index in upcoming:
        uses.setdefault(p, []).append(index)
    seen = dict.fromkeys(uses, -1)  # the last use that fetching has come to
    held: dict[Tensor, None] = {}
    found: list[Tensor] = []

    def gather(p: Tensor) -> int:
        held[p] = None
        found.append(p)
        return p.numel()

    available = 0
    for index, own in enumerate(calls):
        available += sum(gather(p) for p in own if p not in held)
        for _ in range(sum(seen[p] < index for p in own)):
            p, use = upcoming.popleft()
            seen[p] = use
        room, fetched = min(live - available, prefetch), 0
        while upcoming and fetched < room:
            p, use = upcoming.popleft()
            seen[p] = max(seen[p], use)
            fetched += gather(p) if p not in held else 0
        available += fetched
        for p in own:
            following = next((use for use in uses[p] if use > index), None)
            near = following is not None and traversed[following] - traversed[index + 1] < reuse
            if seen[p] <= index + 1 and not near:
                del held[p]
                available -= p.numel()
    return found


def visits(config: Config, model: nn.Module) -> Visits:
    """The own weights of each module (none for a container), in the order of a forward and backward pass.

    Modules are taken in the order in which the model lists them. In a Llama the norms of a layer are called earlier
    than that; their few elements do not matter here.
    """
    every = config.train.activation_checkpointing
    step = None if every == "none" else 1 if every == "full" else every
    forward = [(_layer(name), tuple(module.parameters(recurse=False))) for name, module in model.named_modules()]
    backward: Visits = []
    for layer, run in itertools.groupby(reversed(forward), key=lambda call: call[0]):
        own = [weights for _, weights in run]
        if layer is not None and step is not None and layer % step == 0:
            backward += own[::-1]  # the forward pass of the layer, again
        backward += own
    return [weights for _, weights in forward] + backward


def _layer(name: str) -> int | None:
    found = re.search(r"layers\.(\d+)", name)
    return int(found[1]) if found else None
