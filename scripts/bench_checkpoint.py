#!/usr/bin/env python
"""What a save costs: the copy into host memory, ten saves behind the training, and the speed of the writer.

    python scripts/bench_checkpoint.py FOLDER [--megabytes 256] [--saves 10] [--rounds 3] [--json FILE]

FOLDER lies on the disk to be measured, which must have room for three checkpoints. Three figures, each the median of
the rounds, in which both sides do their work one after the other:

    copy    the snapshot of an asynchronous save, over a plain copy of the same bytes into a buffer used before
    saves   what N asynchronous saves add to the time of a training, over what N synchronous ones add. The training is
            a loop of matrix products in one thread; between two saves it takes `--interval` times as long as a save
    writer  bytes a second of the writer while nothing else runs, over those of a plain loop that hashes and writes
            the same bytes in blocks of the same size and syncs the file
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.format import Fragment
from pretrain.checkpoint.host_copy import HostCopy
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.tensor_file import BLOCK_BYTES
from pretrain.checkpoint.writer import Snapshot, save_checkpoint
from pretrain.config.checkpoint import CheckpointConfig
from pretrain.engine.ranks import Ranks

SLOTS = ("weight", "momentum", "exp_avg_sq")
GENERATORS = {"torch": torch.get_rng_state()}


def make_state(megabytes: int, device: str) -> list[Fragment]:
    """Tensors as a small model has them: matrices of 4 MB, and a vector for each."""
    found = []
    for index in range(max(1, megabytes // (4 * len(SLOTS)))):
        for name, shape in ((f"layer.{index}.matrix", (1024, 1024)), (f"layer.{index}.norm", (1024,))):
            found += [Fragment(name, slot, shape, 0, torch.randn(shape, device=device)) for slot in SLOTS]
    return found


def seconds(work: Callable[[], object]) -> float:
    """Wall time of some work, with what a device still has to do."""
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def snapshot(step: int) -> Snapshot:
    """What a checkpoint holds besides tensors: next to nothing."""
    return Snapshot(step, {"step": step}, {}, {}, {}, [], {})


def copy_ratio(state: list[Fragment], rounds: int) -> tuple[float, float, float]:
    """Seconds of a snapshot, of a plain copy, and the median of their ratios."""
    host, flat = HostCopy(), torch.cat([fragment.values.reshape(-1) for fragment in state])
    plain = torch.empty_like(flat, device="cpu", pin_memory=flat.is_cuda)
    pairs = [(seconds(lambda: host.take(state)), seconds(lambda: plain.copy_(flat))) for _ in range(rounds + 1)]
    ours, theirs = zip(*pairs[1:], strict=True)  # the first copies allocate
    ratio = statistics.median(a / b for a, b in pairs[1:])
    return statistics.median(ours), statistics.median(theirs), ratio


def plain_write(state: list[Fragment], folder: Path) -> None:
    """Hash and write the bytes of a state to one file, and sync it."""
    digest = hashlib.sha256()
    with (folder / "plain").open("wb", buffering=0) as file:
        for fragment in state:
            content = memoryview(fragment.values.cpu().reshape(-1).numpy()).cast("B")
            for start in range(0, len(content), BLOCK_BYTES):
                block = content[start : start + BLOCK_BYTES]
                digest.update(block)
                file.write(block)
        os.fsync(file.fileno())


def writer_ratio(state: list[Fragment], folder: Path, rounds: int) -> tuple[float, float, float]:
    """Seconds of our writer, of a plain loop, and the median of their speeds' ratios."""
    pairs = []
    for step in range(rounds):
        ours = seconds(lambda step=step: save_checkpoint(folder, snapshot(step), state, GENERATORS, Ranks()))
        pairs.append((ours, seconds(lambda: plain_write(state, folder))))
        shutil.rmtree(folder)
        folder.mkdir()
    ours, theirs = zip(*pairs, strict=True)
    return statistics.median(ours), statistics.median(theirs), statistics.median(b / a for a, b in pairs)


def train(state: list[Fragment], folder: Path, saves: int, products: int, asynchronous: bool | None) -> float:
    """Seconds of a training with saves of this kind, or without any."""
    settings = CheckpointConfig(asynchronous=bool(asynchronous))
    saver = Saver(folder, settings, Ranks(), finish=lambda path, _: shutil.rmtree(path))
    matrix = torch.randn(512, 512)

    def work() -> None:
        for step in range(saves):
            for _ in range(products):
                torch.mm(matrix, matrix)
            if asynchronous is not None:
                saver.save(snapshot(step), state, GENERATORS, Ranks())
        saver.settle()

    if asynchronous:
        saver.save(snapshot(saves), state, GENERATORS, Ranks())  # allocates the memory of the copy
        saver.settle()
    return seconds(work)


def saves_ratio(
    state: list[Fragment], folder: Path, saves: int, rounds: int, interval: float
) -> tuple[float, float, float]:
    """Seconds that asynchronous and synchronous saves add, and the median of their ratios."""
    one = seconds(lambda: save_checkpoint(folder, snapshot(0), state, GENERATORS, Ranks()))
    matrix = torch.randn(512, 512)
    product = seconds(lambda: [torch.mm(matrix, matrix) for _ in range(100)]) / 100
    products = max(1, round(interval * one / product))
    added = []
    for _ in range(rounds):
        without, behind, blocking = (train(state, folder, saves, products, kind) for kind in (None, True, False))
        added.append((behind - without, blocking - without))
    ratio = statistics.median(a / b for a, b in added)
    return statistics.median(a for a, _ in added), statistics.median(b for _, b in added), ratio


def disk_of(folder: Path) -> str:
    """The device and file system that a folder lies on."""
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    device, _, kind = max(
        (mount for mount in mounts if folder.resolve().is_relative_to(mount[1])), key=lambda mount: len(mount[1])
    )
    return f"{device} ({kind})"


def main() -> None:
    """Measure, and print a line a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder on the disk to be measured")
    parser.add_argument("--megabytes", type=int, default=256, help="size of a checkpoint (default: %(default)s)")
    parser.add_argument("--saves", type=int, default=10, help="saves of a training (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=3.5, help="see above (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="device of the state (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder / "bench-checkpoint"
    folder.mkdir(parents=True)
    try:
        state = make_state(options.megabytes, options.device)
        found: dict[str, Any] = {
            "copy": copy_ratio(state, max(5, options.rounds)),
            "writer": writer_ratio(state, folder, options.rounds),
            "saves": saves_ratio(state, folder, options.saves, options.rounds, options.interval),
        }
        disk = disk_of(folder)
    finally:
        shutil.rmtree(folder)
    size = sum(fragment.values.nbytes for fragment in state)
    print(f"{size / 1e6:,.0f} MB on {disk}, load {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors")
    print("copy    {:.3f} s, plain copy {:.3f} s: ratio {:.2f}".format(*found["copy"]))
    print("writer  {:.3f} s, plain write with sha256 {:.3f} s: speed ratio {:.2f}".format(*found["writer"]))
    print(
        f"saves   {options.saves} saves add " + "{:.2f} s, synchronous {:.2f} s: ratio {:.2f}".format(*found["saves"])
    )
    if options.json:
        options.json.write_text(json.dumps({"bytes": size, "disk": disk, **found}, indent=1))


if __name__ == "__main__":
    main()
