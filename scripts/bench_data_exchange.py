#!/usr/bin/env python
"""What the distribution of a batch over the ranks costs: time of a step, and bytes between ranks.

    python scripts/bench_data_exchange.py [--steps 60] [--delay-ms 5] [--json FILE]

1. The step does not wait. Four processes with a worker each train by sleeping 150 ms a step, on a mixture of three
   sources whose rows have to be exchanged. Every message and collective of the data is delayed by 5 ms. Measured on
   each rank: the time that `Prefetcher.next_batch` takes in the loop, as a share of the step.
2. The bytes of 64 ranks. Three sources of 128 lanes at the shares 0.6, 0.3 and 0.1 give batches of 256 sequences; the
   ranks are threads of this process that exchange rows through mailboxes, by the same code as in a run. Counted: the
   bytes that each rank sends. At least to be sent are the rows that a rank has read beyond its part.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data import TokenStream
from pretrain.data.exchange import assign, exchange
from pretrain.data.mixture import Schedule, Stage
from pretrain.data.order import Ring
from pretrain.data.prefetch import Prefetcher
from pretrain.data.rings import RingPosition, take_turns
from pretrain.data.state import LaneState, SourceState
from pretrain.engine.ranks import Ranks
from pretrain.processes.torchrun import free_port

ASSETS = Path(__file__).parents[1] / "assets"
STEP_SECONDS = 0.15
RANKS, GLOBAL_ROWS = 4, 32


def data_section() -> dict[str, Any]:
    """Return the `data` section of a config with a mixture of the three vendored books."""
    shares = {"austen": 0.6, "moby_dick": 0.3, "sotu": 0.1}
    return {
        "sources": [
            {"path": str(ASSETS / f"corpus/{name}.parquet"), "name": name, "max_epochs": None, "split_units": 8}
            for name in shares
        ],
        "mixture": shares,
        "lanes": 8,
        "workers": 1,
        "validation_fraction": 0.0,
    }


def train(rank: int, port: int, data: dict[str, Any], steps: int, delay: float, results: Any) -> None:
    """Sleep through the steps on one rank; put the seconds that each waited for its batch, and the bytes sent."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    sent = [0]
    with mock.patch.multiple(dist, **{name: delayed(name, delay, sent) for name in ("isend", "irecv", "all_reduce")}):
        tokenizer = TokenizerConfig(path=str(ASSETS / "tokenizer/tokenizer.json"))
        ranks = Ranks(rank, RANKS, dist.new_group(backend="gloo"))
        stream = TokenStream(DataConfig(**data), tokenizer, 512, group=ranks.group)
        batches = Prefetcher(stream, GLOBAL_ROWS, steps + 5, ranks, Ranks(rank, RANKS, dist.group.WORLD))
        waits = []
        for _ in range(steps + 5):
            begin = time.perf_counter()
            batches.next_batch()
            waits.append(time.perf_counter() - begin)
            time.sleep(STEP_SECONDS)
        dist.barrier()
        batches.close()
    results.put((rank, waits[5:], sent[0] / (steps + 5)))  # the first steps wait for the workers to start
    dist.destroy_process_group()


def delayed(name: str, seconds: float, sent: list[int]) -> Any:
    """Wrap a function of torch.distributed so that it begins with a pause; rows that are sent are counted in bytes."""
    real = getattr(dist, name)

    def call(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        if name == "isend":
            sent[0] += tensor.numel() * tensor.element_size()
        return real(tensor, *arguments, **options)

    return call


def waiting(steps: int, delay: float) -> dict[str, float]:
    """Return the wait for a batch as shares of the step, over all ranks and steps; and the bytes sent per step."""
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), free_port()
    arguments = (port, data_section(), steps, delay, results)
    processes = [context.Process(target=train, args=(rank, *arguments)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    waits = sorted(wait / STEP_SECONDS for _, rank_waits, _ in found for wait in rank_waits)
    return {
        "median": statistics.median(waits),
        "p95": waits[int(0.95 * (len(waits) - 1))],
        "bytes": statistics.mean(sent for _, _, sent in found),
    }


def lanes_of_batches(shares: Sequence[float], lanes: int, rows: int, batches: int) -> list[list[int]]:
    """Return the lane of each row of the first batches of a mixture whose sources do not end."""
    rings = []
    for number in range(len(shares)):
        ring = Ring(str(number), {}, range(number * lanes, (number + 1) * lanes), None)
        begin = LaneState(epoch=0, unit=0, row=0, token=0)
        counts = dict.fromkeys(("epoch", "next_lane", "sequences", "tokens", "documents", "text_bytes", "bad_rows"), 0)
        saved = SourceState(**counts, left=[], lanes=[begin] * lanes)  # type: ignore[typeddict-item]
        rings.append(RingPosition.of(ring, saved, resumed=False))
    schedule = Schedule([Stage(tuple(Fraction(share) for share in shares), None)], 1)
    endless = [rows] * (lanes * len(shares))
    return [
        take_turns(schedule, rings, endless, {}, [0] * len(endless), rows)  # every lane has enough for a batch
        for _ in range(batches)
    ]


class Mailboxes:
    """Stands in for the point-to-point calls of torch.distributed between the threads of this process."""

    def __init__(self, size: int) -> None:
        self.boxes = {(a, b): queue.SimpleQueue[torch.Tensor]() for a in range(size) for b in range(size)}
        self.sent = [0] * size
        self.rank = threading.local()

    def isend(self, tensor: torch.Tensor, group: Any, group_dst: int) -> None:
        """Send, and count the bytes."""
        self.sent[self.rank.value] += tensor.numel() * tensor.element_size()
        self.boxes[self.rank.value, group_dst].put(tensor.clone())

    def irecv(self, tensor: torch.Tensor, group: Any, group_src: int) -> None:
        """Receive."""
        tensor.copy_(self.boxes[group_src, self.rank.value].get(timeout=60))


def bytes_sent(batches: list[list[int]], size: int, width: int) -> tuple[list[float], list[float]]:
    """Exchange the rows of batches between `size` ranks.

    Returns:
        For each batch and rank, the bytes sent, and those of the rows that the rank has read beyond its part.
    """
    sent: list[float] = []
    least: list[float] = []
    for lanes in batches:
        owners = [lane % size for lane in lanes]
        trainers = assign(owners, size)
        mailboxes = Mailboxes(size)
        checks: deque[bool] = deque()

        def run(rank: int, owners: list[int] = owners, trainers: list[int] = trainers, mail: Mailboxes = mailboxes,
                checks: deque[bool] = checks) -> None:  # fmt: skip
            mail.rank.value = rank
            own = np.array([[row] * width for row, owner in enumerate(owners) if owner == rank], dtype=np.int32)
            got = exchange(own.reshape(-1, width), owners, trainers, Ranks(rank, size, object()))  # type: ignore[arg-type]
            checks.append(got[:, 0].tolist() == [row for row, trainer in enumerate(trainers) if trainer == rank])

        with mock.patch.multiple(dist, isend=mailboxes.isend, irecv=mailboxes.irecv):
            threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if list(checks) != [True] * size:
            raise RuntimeError("a rank got other rows than it was assigned")
        part = len(lanes) // size
        least += [max(0, owners.count(rank) - part) * width * 4 for rank in range(size)]
        sent += mailboxes.sent
    return sent, least


def rows(steps: int, delay: float, batches: int, sequence_length: int) -> list[dict[str, Any]]:
    """Measure everything; return the rows of the table."""
    found = waiting(steps, delay)
    step = f"{RANKS} ranks, step of {STEP_SECONDS * 1000:.0f} ms, {delay * 1000:g} ms a message"
    table = [
        {"what": f"data phase, {name}, {step}", "value": 100 * found[key], "unit": "% of a step", "target": "<= 1 %",
         "detail": f"{found[key] * STEP_SECONDS * 1000:.2f} ms; {found['bytes'] / 1e3:.1f} kB sent a step and rank"}
        for name, key in (("median", "median"), ("95th percentile", "p95"))
    ]  # fmt: skip
    row = (sequence_length + 1) * 4
    for name, shares in (("3 sources at 0.6 / 0.3 / 0.1", (0.6, 0.3, 0.1)), ("one source", (1.0,))):
        sent, least = bytes_sent(lanes_of_batches(shares, 128, 256, batches), 64, sequence_length + 1)
        for kind, value, bound in (
            ("mean", statistics.mean(sent), statistics.mean(least)),
            ("maximum", max(sent), max(least)),
        ):
            detail = f"{value / row:.2f} of 4 rows; {bound / 1e3:.1f} kB must move"
            table.append(
                {"what": f"64 ranks, {name}, 128 lanes each, 256 sequences: sent per rank and batch, {kind}",
                 "value": value / 1e3, "unit": "kB", "target": f"<= {bound / 1e3:.1f} kB", "detail": detail}
            )  # fmt: skip
    return [{"number": 3, **line} for line in table]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="(default: %(default)s)")
    parser.add_argument("--delay-ms", type=float, default=5.0, help="of each message (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=50, help="of the 64 ranks (default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=4096, help="of the 64 ranks (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    found = rows(options.steps, options.delay_ms / 1000, options.batches, options.sequence_length)
    for line in found:
        print(f"{line['what']}: {line['value']:.2f} {line['unit']} ({line['target']}); {line['detail']}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
