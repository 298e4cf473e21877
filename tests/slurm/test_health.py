"""The check of the nodes before a start: what each test notices, and which nodes are then bad."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from pretrain.processes.torchrun import free_port
from pretrain.slurm import health
from pretrain.slurm.health import Kind, Problem, Report
from pretrain.slurm.verdict import examine, read_reports

CPU = torch.device("cpu")
NODES = ["n0", "n1", "n2", "n3", "n4"]
TOKEN = b"0123456789abcdef"


def reports(problems: dict[str, list[tuple[Kind, str]]], nodes: list[str] = NODES) -> dict[str, Report]:
    """Reports of all nodes, with the problems of some; None of a node that does not report."""
    return {
        node: Report(
            node=node,
            host=node,
            problems=[Problem(kind=kind, text=text) for kind, text in problems.get(node, [])],
            gpu_tflops=[600.0, 590.0],
            network_mbytes=None if node == nodes[0] else 1000.0,
        )
        for node in nodes
    }


UNREACHED: list[tuple[Kind, str]] = [("network", "cannot be reached")]
NAMELESS: list[tuple[Kind, str]] = [("name", "n0 cannot be resolved")]
BROKEN: list[tuple[Kind, str]] = [("gpu", "GPU 3: a matrix product is wrong")]


@pytest.mark.parametrize(
    ("problems", "bad"),
    [
        ({}, []),
        ({"n2": BROKEN}, ["n2"]),
        ({"n0": BROKEN, "n4": [("disk", "full")]}, ["n0", "n4"]),
        ({"n1": UNREACHED}, ["n1"]),
        ({"n1": NAMELESS}, ["n1"]),  # the others resolve it
        (dict.fromkeys(NODES[1:], UNREACHED), ["n0"]),  # what they have in common
        ({**dict.fromkeys(NODES[1:], UNREACHED), "n3": UNREACHED + BROKEN}, ["n0", "n3"]),
        ({"n0": [("network", "cannot listen")], **dict.fromkeys(NODES[1:], UNREACHED)}, ["n0"]),
    ],
)
def test_the_nodes_that_are_bad(problems: dict[str, list[tuple[Kind, str]]], bad: list[str]) -> None:
    found = examine(reports(problems), NODES, 60)
    assert sorted(found.bad) == bad
    assert not found.problem


def test_a_node_that_does_not_report_is_bad() -> None:
    found = reports({})
    del found["n3"]
    assert examine(found, NODES, 60).bad == {"n3": ["did not report within 60 s"]}


def test_no_report_at_all_blames_no_node() -> None:
    found = examine({}, NODES, 60)
    assert not found.bad
    assert found.problem == "no node has reported within 60 s"
    assert not found.hopeless


def test_what_all_nodes_have_is_not_a_matter_of_nodes() -> None:
    found = examine(reports(dict.fromkeys(NODES, BROKEN)), NODES, 60)
    assert not found.bad
    assert found.hopeless
    assert "all 5 nodes" in found.problem
    # A single node is one that can be replaced.
    assert examine(reports({"n0": BROKEN}, ["n0"]), ["n0"], 60).bad == {"n0": [BROKEN[0][1]]}


def test_of_two_nodes_that_do_not_reach_each_other_none_is_excluded() -> None:
    found = examine(reports({"n1": UNREACHED}, ["n0", "n1"]), ["n0", "n1"], 60)
    assert not found.bad
    assert "n1" in found.problem
    assert "n0" in found.problem
    assert not found.hopeless


def test_a_name_that_no_node_resolves_ends_the_job() -> None:
    found = examine(reports(dict.fromkeys(NODES[1:], NAMELESS)), NODES, 60)
    assert found.hopeless
    assert "AURORA_RENDEZVOUS_HOST" in found.problem


def test_slow_gpus_and_links_are_bad() -> None:
    found = reports({})
    found["n2"]["gpu_tflops"][1] = 300.0
    found["n4"]["network_mbytes"] = 110.0
    bad = examine(found, NODES, 60).bad
    assert bad == {
        "n2": ["GPU 1: 300 TFLOP/s, where the median of the job is 595"],
        "n4": ["sends 110 MB/s to the first node, where the median is 1000"],
    }
    # Of two GPUs or links nobody can say which is the usual one.
    two = reports({}, ["n0", "n1"])
    two["n0"]["gpu_tflops"], two["n1"]["gpu_tflops"] = [600.0], [100.0]
    assert not examine(two, ["n0", "n1"], 60).bad


def test_damaged_reports_count_as_silence(tmp_path: Path) -> None:
    (tmp_path / "n0.json").write_text("{")
    (tmp_path / "n1.json").write_text("[]")
    (tmp_path / "n2.json.abc.tmp").write_text("{}")
    (tmp_path / "n3.json").write_text('{"node": "n3"}')
    (tmp_path / "n4.json").write_text("[" * 100_000)
    assert read_reports(tmp_path) == {}


def first_node(port: int, others: int, seconds: float = 20) -> threading.Thread:
    deadline = time.monotonic() + seconds
    thread = threading.Thread(target=health.receive_from_all, args=("127.0.0.1", port, TOKEN, others, deadline))
    thread.start()
    return thread


def test_nodes_reach_the_first_one_and_strangers_are_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PAYLOAD_BYTES", 1 << 20)
    monkeypatch.setattr(health, "PEER_SECONDS", 0.5)
    port = free_port()
    thread = first_node(port, 2)
    time.sleep(0.1)
    with (
        socket.create_connection(("127.0.0.1", port)) as silent,
        socket.create_connection(("127.0.0.1", port)) as other,
    ):
        other.sendall(b"x" * 16)
        for _ in range(2):
            problems, rate = health.send_to_first("127.0.0.1", port, TOKEN, time.monotonic() + 20)
            assert problems == []
            assert rate is not None
            assert rate > 0
        assert silent.recv(1) == b""
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_bytes_that_arrive_changed_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PAYLOAD_BYTES", 1 << 16)
    port = free_port()
    read, flipped = health._read, []

    def reads(connection: socket.socket, count: int) -> bytes:
        content = read(connection, count)
        if count == 1 << 16:
            flipped.append(count)
            content = content[:100] + bytes([content[100] ^ 1]) + content[101:]
        return content

    monkeypatch.setattr(health, "_read", reads)
    thread = first_node(port, 1)
    problems, _ = health.send_to_first("127.0.0.1", port, TOKEN, time.monotonic() + 20)
    thread.join(timeout=5)
    assert flipped
    assert [problem["kind"] for problem in problems] == ["network"]
    assert "not what was sent" in problems[0]["text"]


def test_a_first_node_that_is_not_there_is_named_with_its_port() -> None:
    port = free_port()
    began = time.monotonic()
    problems, rate = health.send_to_first("127.0.0.1", port, TOKEN, began + 0.3)
    assert rate is None
    assert problems[0]["kind"] == "network"
    assert f"127.0.0.1:{port}" in problems[0]["text"]
    assert "refused" in problems[0]["text"]
    problems, _ = health.send_to_first("no-such-host.invalid", port, TOKEN, time.monotonic() + 0.3)
    assert problems[0]["kind"] == "name"


def test_a_port_that_is_taken_is_a_problem_of_the_first_node() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        problems = health.receive_from_all("127.0.0.1", taken.getsockname()[1], TOKEN, 1, time.monotonic() + 1)
    assert problems[0]["kind"] == "network"
    assert "cannot listen" in problems[0]["text"]


def test_the_local_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert health.disk_problems(tmp_path / "a/b") == []
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert "folder of this user" in health.disk_problems(tmp_path / "link")[0]["text"]
    (tmp_path / "file").touch()
    assert "file" in health.disk_problems(tmp_path / "file")[0]["text"]
    monkeypatch.setattr(health, "FREE_BYTES", 1 << 60)
    assert "GB free" in health.disk_problems(tmp_path / "a")[0]["text"]


def test_products_are_compared_with_their_exact_value() -> None:
    assert health.product_rate(CPU, 96)[1] == ""
    calls = []

    def flips(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        product = a @ b
        if len(calls) == 7:
            product[90, 5] += 1  # once, in a row that is not compared with the exact one
        return product

    assert "different results" in health.product_rate(CPU, 96, flips)[1]
    assert "is wrong" in health.product_rate(CPU, 96, lambda a, b: (a @ b) * 1.01)[1]
    assert "is wrong" in health.product_rate(CPU, 96, lambda a, b: (a @ b) * float("nan"))[1]


def test_memory_in_use_and_memory_that_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(health.memory_problems(CPU, 1 << 20, 1 << 20, chunk=1 << 10)) == []
    assert "in use by other processes" in next(health.memory_problems(CPU, 70 << 30, 100 << 30))
    equal, asked = torch.equal, []

    def forgets(one: torch.Tensor, two: torch.Tensor) -> bool:
        asked.append(1)
        return len(asked) != 20 and equal(one, two)

    monkeypatch.setattr(torch, "equal", forgets)
    assert "does not keep" in next(health.memory_problems(CPU, 1 << 20, 1 << 20, chunk=1 << 10))


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo '0, 0, No, No'; echo '1, 0, No, No'", []),
        ("echo '0, [N/A], [Not Supported], [N/A]'", []),
        ("echo '3, 2, No, No'", ["GPU 3: ecc.errors.uncorrected.volatile.total is 2"]),
        ("echo '1, 0, Yes, No'", ["GPU 1: remapped_rows.pending is Yes"]),
        ("echo 'Unable to determine the device handle'; exit 15", ["nvidia-smi ended with code 15: Unable to"]),
    ],
)
def test_errors_that_the_driver_has_counted(
    script: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/bash\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = list(health._counted_errors())
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))


def test_gpus_that_are_missing_are_counted() -> None:
    problems, _ = health.gpu_problems(torch.cuda.device_count() + 3)
    assert any("3 are needed" in problem["text"] for problem in problems) or torch.cuda.device_count()
