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
from collections.abc import Iterator, Sequence
from math import prod

from torch import Tensor, nn

from pretrain.config import Config

LIVE_ELEMENTS = 10**9
"""DeepSpeed's default of stage3_max_live_parameters."""
REUSE_ELEMENTS = 10**9
"""DeepSpeed's default of stage3_max_reuse_distance."""

CALLED = {
    "embed_tokens": -2,
    "rotary_emb": -1,
    "input_layernorm": 1,
    "self_attn": 2,
    "post_attention_layernorm": 3,
    "mlp": 4,
    "up_proj": 1,
    "down_proj": 2,
}
"""Place among its siblings at which a module of a Llama is called, where transformers lists it at another; 0 for those
that are called in their order."""

Visits = list[tuple[Tensor, ...]]


def padded(shape: Sequence[int], ranks: int) -> int:
    """Elements of a weight once it is filled up to equal chunks for all ranks."""
    return -(-prod(shape) // ranks) * ranks


def gathered_elements(config: Config, model: nn.Module, ranks: int) -> int:
    """Elements gathered in the forward and backward pass of one micro-batch, padding included.

    Args:
        config: for the size of prefetches and activation checkpointing.
        model: with whole parameters, on any device.
        ranks: over which weights are cut.
    """
    calls = visits(config, model)
    prefetch = config.engine.gather_bucket_elements
    return sum(padded(p.shape, ranks) for p in _gatherings(calls, prefetch))


def _gatherings(calls: Visits, prefetch: int) -> list[Tensor]:
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
        room, fetched = min(LIVE_ELEMENTS - available, prefetch), 0
        while upcoming and fetched < room:
            p, use = upcoming.popleft()
            seen[p] = max(seen[p], use)
            fetched += gather(p) if p not in held else 0
        available += fetched
        for p in own:
            following = next((use for use in uses[p] if use > index), None)
            near = following is not None and traversed[following] - traversed[index + 1] < REUSE_ELEMENTS
            if seen[p] <= index + 1 and not near:
                del held[p]
                available -= p.numel()
    return found


def visits(config: Config, model: nn.Module) -> Visits:
    """The own weights of each module (none for a container), in the order of a forward and backward pass.

    Modules are called in the order in which the model lists them, but for those in `CALLED`.
    """
    every = config.train.activation_checkpointing
    step = None if every == "none" else 1 if every == "full" else every

    def walk(module: nn.Module, name: str, backward: bool) -> Iterator[tuple[Tensor, ...]]:
        if not isinstance(module, nn.ModuleList):
            yield tuple(module.parameters(recurse=False))
        named = sorted(module.named_children(), key=lambda item: CALLED.get(item[0], 0))
        children = [(f"{name}.{key}", child) for key, child in named]
        layer = re.search(r"\.layers\.(\d+)$", name)
        if backward and layer and step and int(layer[1]) % step == 0:
            for key, child in children:  # the forward pass of the layer, again
                yield from walk(child, key, False)
        for key, child in reversed(children) if backward else children:
            yield from walk(child, key, backward)

    return [*walk(model, "", False), *walk(model, "", True)]
