#!/usr/bin/env python
"""Time of attention within documents without a dense mask, over the time with one and over causal attention.

    python scripts/bench_document_attention.py [--device cuda] [--rounds 7]

Forward and backward pass of one layer of attention, on documents of exponentially distributed lengths. The ways take
turns, so that other load on the machine affects all of them; a figure is the median of the ratios of the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain.data.masks import attention_inputs
from pretrain.model.attention import attend, choose_kernel

EOS = 0
SHAPES = ((4, 512), (2, 2048))
"""Sequences and their tokens; 8 heads of 64 dimensions."""
MEANS = (64, 256, 700)
"""Mean tokens of a document."""


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the time of a call, after all work on the device."""
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def ratios(rows: int, length: int, mean: int, dtype: torch.dtype, device: torch.device, rounds: int) -> list[str]:
    """Return a row of the table."""
    kernel = choose_kernel("auto", device, dtype, 64, length).kernel
    tokens = torch.randint(1, 50, (rows, length))
    tokens[torch.rand(rows, length) < 1 / mean] = EOS
    drawn = [torch.randn(rows, 8, length, 64, dtype=dtype, device=device, requires_grad=True) for _ in range(4)]
    options: Any = {"document_mask": True, "reset_positions": False, "device": device}

    def way(masks: bool, **kernels: Any) -> Callable[[], None]:
        def work() -> None:
            mask = attention_inputs(tokens, EOS, **options, **kernels)[0] if masks else None
            mixed: Tensor = attend(*drawn[:3], mask)
            mixed.backward(drawn[3].detach())

        return work

    ways = {kernel: way(True, kernel=kernel), "dense": way(True, kernel="dense"), "causal": way(False)}
    for work in ways.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            times[name].append(seconds(work, device))
    over = [
        statistics.median(a / b for a, b in zip(times[kernel], times[other], strict=True))
        for other in ("dense", "causal")
    ]
    return [kernel, str(dtype).removeprefix("torch."), f"{rows} x {length}", str(mean), *(f"{x:.2f}" for x in over)]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    print("| kernel | dtype | sequences x tokens | mean document | over dense | over causal |")
    print("|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for rows, length in SHAPES:
            for mean in MEANS:
                print("|", " | ".join(ratios(rows, length, mean, dtype, device, options.rounds)), "|", flush=True)


if __name__ == "__main__":
    main()
