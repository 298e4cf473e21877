"""What is tested on every node before a job starts, so that a broken node costs a minute instead of a night.

``python -m pretrain.slurm.health`` runs once on each node. It tests the node's GPUs, its local disk and its connection
to the first node, and writes what it found into a folder that all nodes see. `pretrain.slurm.verdict` reads the reports
and decides which nodes are bad.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import ipaddress
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from pretrain.files import replace_text

if TYPE_CHECKING:
    import torch

Kind = Literal["name", "network", "gpu", "disk"]
"""name: the first node's name cannot be resolved. The other kinds say what does not work."""

FREE_BYTES = 1 << 30
"""Space that the compile caches may need on the local disk."""
PAYLOAD_BYTES = 32 << 20
"""Bytes that each node sends to the first one."""
PEER_SECONDS = 20.0
"""How long the first node waits for a node that has connected and sends nothing."""
MATRIX = 4096
"""Rows and columns of the products that test a GPU."""
REPEATS = 50
MEMORY_SHARE = 0.8
"""Share of a GPU's free memory that is written and read back."""
CHUNK = 1 << 28
"""Elements of int32 that are written at a time: 1 GiB."""


FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk or a quota that is full. On a folder that all nodes see, no node is to blame for them."""
CANNOT_REPORT = 73
"""Exit code of a node that cannot write its report because of one of these (EX_CANTCREAT of sysexits.h). It is above
those of other problems, and srun returns the highest one."""
PROBE_BYTES = 1 << 16
"""More than a report."""


class Problem(TypedDict):
    """One thing that does not work on a node."""

    kind: Kind
    text: str


class Report(TypedDict):
    """What a node found out about itself."""

    node: str
    """Its name in Slurm."""
    host: str
    """Its own name."""
    problems: list[Problem]
    gpu_tflops: list[float]
    """For each GPU, the rate of matrix products in bfloat16."""
    network_mbytes: float | None
    """MB/s at which the first node received from this one; None for the first node itself, and without a connection."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Test this node and write its report; return 0 if nothing is wrong, `CANNOT_REPORT` if there is no room for it."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.slurm.health", description="Test one node of a job.")
    parser.add_argument("--folder", type=Path, required=True, help="where the report goes; all nodes see it")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs that the job uses on this node")
    parser.add_argument("--host", required=True, help="a name or address of the first node")
    parser.add_argument("--port", type=int, required=True, help="where the first node listens during the test")
    parser.add_argument("--disk", type=Path, required=True, help="a folder on the local disk")
    parser.add_argument("--seconds", type=float, required=True, help="how long nodes wait for each other")
    options = parser.parse_args(arguments)
    name = os.environ["SLURMD_NODENAME"]
    report = Report(node=name, host=socket.gethostname(), problems=[], gpu_tflops=[], network_mbytes=None)
    # The network first: the other nodes wait for the first one.
    if int(os.environ["SLURM_JOB_NUM_NODES"]) > 1:
        token = hashlib.sha256(f"aurora {os.environ['SLURM_JOB_ID']}".encode()).digest()[:16]
        found = _network(options.host, options.port, token, time.monotonic() + options.seconds)
        report["problems"] += found[0]
        report["network_mbytes"] = found[1]
    report["problems"] += disk_problems(options.disk)
    if options.gpus:
        problems, report["gpu_tflops"] = gpu_problems(options.gpus)
        report["problems"] += problems
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        replace_text(options.folder / f"{name}.json", json.dumps(report, indent=1) + "\n")
    except OSError as error:
        if error.errno in FULL:
            return CANNOT_REPORT  # one process says it for all nodes: see `unwritable`
        print(f"error: node {name}: {options.folder}: {error.strerror}", file=sys.stderr)
        return 1
    return 1 if report["problems"] else 0


def unwritable(folder: Path, was_full: bool = False) -> str:
    """Why nodes cannot leave their reports in a folder, seen from here, in a line; empty if they can.

    Args:
        folder: where the reports go; created if absent.
        was_full: whether a node has found it full.
    """
    probe, reason = folder / "probe", os.strerror(errno.ENOSPC) if was_full else ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(probe, " " * PROBE_BYTES)
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
    return f"{folder}: the nodes cannot leave their reports there: {reason}. No node is to blame" if reason else ""


def _network(host: str, port: int, token: bytes, deadline: float) -> tuple[list[Problem], float | None]:
    if os.environ["SLURM_NODEID"] == "0":
        return receive_from_all(host, port, token, int(os.environ["SLURM_JOB_NUM_NODES"]) - 1, deadline), None
    return send_to_first(host, port, token, deadline)


def receive_from_all(host: str, port: int, token: bytes, others: int, deadline: float) -> list[Problem]:
    """On the first node: receive from each other node in turn, and tell it what arrived and how fast."""
    try:
        # A name may mean another address here than on the other nodes; an address is where they will look.
        address = host if _is_address(host) else ""
        both = not address and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if ":" in address or both else socket.AF_INET
        listener = socket.create_server((address, port), family=family, backlog=others, dualstack_ipv6=both)
    except OSError as error:
        return [Problem(kind="network", text=f"cannot listen on {host}:{port}: {error.strerror}")]
    served = 0
    with listener:
        while served < others and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                peer, _ = listener.accept()
            except TimeoutError:
                break
            with peer:
                served += _receive(peer, token)
    return []


def _receive(peer: socket.socket, token: bytes) -> bool:
    """Receive one payload; whether it came from a node of this job."""
    peer.settimeout(PEER_SECONDS)
    try:
        if _read(peer, len(token)) != token:
            return False
        peer.sendall(b"\n")  # now it is this node's turn
        began = time.monotonic()
        content = _read(peer, PAYLOAD_BYTES)
        rate = len(content) / max(time.monotonic() - began, 1e-9) / 1e6
        peer.sendall(hashlib.sha256(content).digest() + struct.pack("!d", rate))
        return True
    except OSError:
        return False


def send_to_first(host: str, port: int, token: bytes, deadline: float) -> tuple[list[Problem], float | None]:
    """On the other nodes: send to the first one; returns problems, and the rate in MB/s at which it received."""
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return [Problem(kind="name", text=f"{host}, the first node, cannot be resolved: {error.strerror}")], None
    problem = "no time left"
    content = hashlib.sha256(token).digest() * (PAYLOAD_BYTES // 32)
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as first:
                first.settimeout(max(left, PEER_SECONDS))
                first.sendall(token)
                _read(first, 1)
                first.sendall(content)
                answer = _read(first, 40)
        except OSError as error:
            problem = error.strerror or str(error) or type(error).__name__
            time.sleep(min(0.5, left))
            continue
        if answer[:32] != hashlib.sha256(content).digest():
            return [Problem(kind="network", text=f"what {host} received is not what was sent")], None
        return [], float(struct.unpack("!d", answer[32:])[0])
    return [Problem(kind="network", text=f"{host}:{port}, the first node, cannot be reached: {problem}")], None


def _read(connection: socket.socket, count: int) -> bytes:
    """Read exactly `count` bytes; OSError if the connection ends before."""
    content = bytearray()
    while len(content) < count:
        part = connection.recv(min(count - len(content), 1 << 20))
        if not part:
            raise ConnectionError("the connection was closed")
        content += part
    return bytes(content)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def disk_problems(folder: Path) -> list[Problem]:
    """Whether the local disk takes the compile caches."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return [Problem(kind="disk", text=f"{folder}: expected a folder of this user")]
        (folder / "test").write_bytes(bytes(1 << 20))
        (folder / "test").unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return [Problem(kind="disk", text=f"{folder}: {error.strerror}")]
    if free < FREE_BYTES:
        return [
            Problem(kind="disk", text=f"{folder}: {free / 1e9:.1f} GB free, at least {FREE_BYTES / 1e9:.1f} needed")
        ]
    return []


def gpu_problems(count: int) -> tuple[list[Problem], list[float]]:
    """Test the GPUs of this node; returns problems, and each GPU's rate of matrix products in TFLOP/s."""
    import torch  # takes seconds, and nodes without GPUs do without

    texts = list(_counted_errors())
    found = torch.cuda.device_count()
    if found < count:
        texts.append(f"{found} GPUs are visible, {count} are needed")
    rates = []
    for index in range(min(found, count)):
        device = torch.device("cuda", index)
        rate = 0.0
        try:
            texts += [f"GPU {index}: {text}" for text in memory_problems(device, *torch.cuda.mem_get_info(device))]
            rate, wrong = product_rate(device)
            texts += [f"GPU {index}: {wrong}"] * bool(wrong)
            if count > 1:
                neighbour = torch.device("cuda", (index + 1) % min(found, count))
                texts += [f"GPU {index}: {text}" for text in _copy_problems(device, neighbour)]
        except RuntimeError as error:  # what CUDA reports, out of memory included
            texts.append(f"GPU {index}: {str(error).splitlines()[0]}")
        rates.append(rate)
    return [Problem(kind="gpu", text=text) for text in texts], rates


def product_rate(
    device: torch.device, size: int = MATRIX, multiply: Callable[..., torch.Tensor] | None = None
) -> tuple[float, str]:
    """Multiply matrices in bfloat16; return TFLOP/s, and what was wrong with the products (empty if nothing).

    The matrices hold small whole numbers, of which every sum is exact in fp32 in any order: the product has exactly one
    right value.

    Args:
        device: where.
        size: rows and columns; at most 2^24 / 64, for the sums to be exact.
        multiply: the product, `torch.matmul` unless a test breaks it.
    """
    import torch

    multiply = multiply or torch.matmul
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-8, 9, (size, size), generator=generator).float() for _ in range(2))
    rows = min(64, size)
    expected = (left[:rows] @ right).bfloat16()
    a, b = left.bfloat16().to(device), right.bfloat16().to(device)
    first = multiply(a, b)
    if not torch.equal(first[:rows].cpu(), expected):
        return 0.0, "a matrix product is wrong"
    _wait(device)
    began = time.monotonic()
    products = [multiply(a, b) for _ in range(REPEATS)]
    _wait(device)
    rate = 2 * size**3 * REPEATS / max(time.monotonic() - began, 1e-9) / 1e12
    if not all(torch.equal(product, first) for product in products):
        return rate, "the same matrix product has different results"
    return rate, ""


def memory_problems(device: torch.device, free: int, total: int, chunk: int = CHUNK) -> Iterator[str]:
    """Look for another process in a GPU's memory, and for memory that does not keep what is written to it.

    Args:
        device: the GPU.
        free: bytes that can be allocated.
        total: bytes of the GPU.
        chunk: elements of int32 to write at a time.
    """
    import torch

    if free < MEMORY_SHARE * total:
        yield f"{(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB are in use by other processes"
        return
    pattern = torch.arange(chunk, dtype=torch.int32, device=device)
    count = int(MEMORY_SHARE * free / 4) // chunk - 2  # the pattern, and one for the comparison
    held = [pattern ^ number for number in range(count)]
    if not all(torch.equal(part, pattern ^ number) for number, part in enumerate(held)):
        yield "memory does not keep what is written to it"


def _copy_problems(source: torch.device, target: torch.device) -> Iterator[str]:
    """Copy from one GPU to the next."""
    import torch

    sent = torch.arange(1 << 24, dtype=torch.int32, device=source)
    if not torch.equal(sent.to(target).cpu(), sent.cpu()):
        yield f"a copy to GPU {target.index} is wrong"


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _counted_errors() -> Iterator[str]:
    """Memory errors that the driver has counted since it was loaded, by GPU; nothing without nvidia-smi."""
    fields = ("ecc.errors.uncorrected.volatile.total", "remapped_rows.pending", "remapped_rows.failure")
    command = ["nvidia-smi", f"--query-gpu=index,{','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return
    except subprocess.TimeoutExpired:
        yield "nvidia-smi does not answer"
        return
    if done.returncode:
        yield f"nvidia-smi ended with code {done.returncode}: {' '.join((done.stdout + done.stderr).split())[:200]}"
        return
    for line in done.stdout.splitlines():
        index, *values = (word.strip() for word in line.split(","))
        for field, value in zip(fields, values, strict=False):
            if value not in ("0", "No") and not value.startswith("["):  # [N/A], [Not Supported]
                yield f"GPU {index}: {field} is {value}"


if __name__ == "__main__":
    sys.exit(main())
