"""An error reaches the person who needs it: from the rank where it happened, once, with the exit code it deserves."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import main
from pretrain.processes import failures
from pretrain.processes.errors import PeerError, UserError
from pretrain.processes.failures import Failure, is_first_to_say, read_failures, report
from pretrain.processes.torchrun import free_port, judge
from tests.conftest import REPOSITORY
from tests.processes.launching import FAULTS, TIMEOUT_SECONDS, environment, launch, launch_with_fault, write_config

HOST = socket.gethostname()
LONG = pytest.mark.long

# On rank 1 of two, in the second step: what its output shows, and what the launcher's last line says of it.
ON_ONE_RANK = [
    pytest.param("memory", "MemoryError: no memory for 12 bytes", "failed first: MemoryError: no memory", marks=LONG),
    pytest.param("kill", None, "was killed by signal 9 (SIGKILL)", id="kill"),
    pytest.param("out of memory", "tried to allocate 20.00 GiB", "failed first: OutOfMemoryError", marks=LONG),
    pytest.param("runtime", "RuntimeError: kernel failed", "failed first: RuntimeError: kernel", marks=LONG),
    pytest.param("plain value", "ValueError: trying to init", "failed first: ValueError: trying to init", marks=LONG),
    pytest.param("exit", "SystemExit: 3", "failed first: SystemExit: 3", marks=LONG),
    pytest.param("exit 0", "SystemExit: 0", "failed first: SystemExit: 0", marks=LONG),
    pytest.param("silent exit", None, "ended with exit code 5", marks=LONG),
]


@pytest.mark.parametrize(("fault", "shown", "named"), ON_ONE_RANK)
def test_an_error_on_one_rank_is_shown_there_and_named_first_by_the_launcher(
    fault: str, shown: str | None, named: str, tmp_path: Path
) -> None:
    done = launch_with_fault("train", write_config(tmp_path), "--processes", "2", fault=fault)
    assert done.returncode == 1, done.stderr
    lines = done.stderr.splitlines()
    assert lines[-1].startswith(f"error: rank 1 on {HOST} "), done.stderr
    assert named in lines[-1]
    assert done.stderr.count("error: rank") == 1
    if shown is not None:
        of_rank_1 = [line for line in lines if line.startswith(f"[rank 1 on {HOST}] ")]
        assert "Traceback" in of_rank_1[0]
        assert shown in of_rank_1[-1]
        # The other rank noticed only because rank 1 was gone; it does not spread a traceback of its own.
        assert done.stderr.count("Traceback") == 1, done.stderr


@LONG
def test_torchrun_itself_names_the_rank_that_failed_first(tmp_path: Path) -> None:
    done = launch_with_fault("train", write_config(tmp_path), fault="memory", launcher="torchrun", count=2)
    assert done.returncode == 1
    root_cause = done.stderr.split("Root Cause (first observed failure)")[1]
    assert re.search(r"rank +: 1 ", root_cause)
    assert "MemoryError: no memory for 12 bytes" in root_cause


@LONG
def test_of_two_nodes_each_says_what_it_knows(tmp_path: Path) -> None:
    """Two launchers on this machine, one process each; the second one fails."""
    port = free_port()
    command = [sys.executable, "-m", "pretrain.processes", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-id", "1", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    command += ["--local-addr", "127.0.0.1"]
    started = []
    fault = {"AURORA_TEST_FAULT": "memory", "AURORA_TEST_FAULT_RANK": "1", "PYTHONPATH": f"{FAULTS}:{REPOSITORY}"}
    for node in (0, 1):
        options = ["--rdzv-conf", f"is_host={int(node == 0)}", "-m", "pretrain", "train", str(write_config(tmp_path))]
        started.append(
            subprocess.Popen(
                [*command, *options], stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment(**fault)
            )
        )
    said = [node.communicate(timeout=TIMEOUT_SECONDS)[1] for node in started]
    assert [node.returncode for node in started] == [1, 1], said
    last = sorted(text.splitlines()[-1] for text in said)
    assert last[0].startswith(f"error: rank 0 on {HOST} lost the connection to another rank"), said
    assert last[1] == f"error: rank 1 on {HOST} failed first: MemoryError: no memory for 12 bytes"


BAD_INPUT = "error: data/part-7.jsonl: line 3 is not JSON\n  it reads: {\nerror: data/part-8.jsonl: empty\n"


@pytest.mark.parametrize("step", [pytest.param(0, marks=LONG), 2], ids=["before the ranks meet", "in training"])
def test_bad_input_that_one_rank_sees_is_printed_once_and_is_exit_code_2(step: int, tmp_path: Path) -> None:
    done = launch_with_fault("train", write_config(tmp_path), "--processes", "2", fault="bad input", step=step)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(BAD_INPUT)
    assert done.stderr.count("part-7") == 1
    assert "Traceback" not in done.stderr


def test_bad_input_that_all_ranks_see_is_printed_once(tmp_path: Path) -> None:
    file = write_config(tmp_path)
    done = launch("train", file, "optimizer.lr=-1", "train.typo=1", launcher="pretrain.processes", count=2)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("optimizer.lr") == 1, done.stderr
    assert done.stderr.count("train.typo") == 1
    wrong = launch("fly", launcher="torchrun", count=2)
    assert wrong.stderr.count("usage: aurora") == 1


def test_the_parent_of_several_processes_refuses_a_wrong_config_before_it_starts_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*arguments: Any) -> int:
        raise AssertionError("processes were started")

    monkeypatch.setattr("pretrain.processes.torchrun.torchrun", start)
    assert main(["train", str(write_config(tmp_path)), "optimizer.lr=-1", "--processes", "2"]) == 2
    assert capsys.readouterr().err.count("optimizer.lr") == 1
    # A right one would start them.
    assert main(["train", str(write_config(tmp_path)), "--processes", "2"]) == 1
    assert "processes were started" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("our own bug"), 1, "ValueError: our own bug"),
        (RuntimeError("kernel failed"), 1, "RuntimeError: kernel failed"),
        (OSError(28, "No space left on device"), 1, "OSError: [Errno 28]"),
        (SystemExit(0), 1, "SystemExit: 0"),
        (BrokenPipeError(32, "Broken pipe"), 1, "BrokenPipeError"),
    ],
)
def test_only_bad_input_loses_its_traceback(
    error: BaseException,
    code: int,
    text: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    fail_with(error, monkeypatch)
    assert main(["export", "a", str(tmp_path / "b")]) == code
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last)")
    assert text in shown.splitlines()[-1]


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("pretrain.export.run.export_checkpoint", fail)


def test_bad_input_is_a_line_per_problem_and_an_interruption_is_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(UserError("one\ntwo"), monkeypatch)
    assert main(["export", "a", "b"]) == 2
    assert capsys.readouterr().err == "error: one\nerror: two\n"
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert main(["export", "a", "b"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_main_works_in_a_thread(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["export", str(tmp_path / "no"), "out"])))
    thread.start()
    thread.join()
    assert codes == [2]
    assert "neither a checkpoint nor a run" in capsys.readouterr().err


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log folder of a launch of two ranks; this process is rank 1."""
    be_rank(1, tmp_path, monkeypatch)
    return tmp_path


def be_rank(rank: int, attempt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in here.items():
        monkeypatch.setenv(name, str(value))
    (attempt / str(rank)).mkdir(exist_ok=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(attempt / str(rank) / "error.json"))


def test_the_first_error_of_a_process_counts_and_is_printed_once(
    attempt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = MemoryError("first")
    assert report(error) == report(error) == 1
    assert capsys.readouterr().err == f"[rank 1 on {HOST}] MemoryError: first\n"
    report(RuntimeError("while cleaning up"))
    assert [failure["text"] for failure in read_failures(attempt)] == ["MemoryError: first"]
    content = json.loads((attempt / "1" / "error.json").read_text())
    assert content["message"]["message"] == "MemoryError: first"  # as torchrun reads it


def test_a_peer_that_failed_elsewhere_is_one_line_on_each_host(
    attempt: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert report(PeerError(5, HOST, "DataError: gone", 2)) == 2
    assert capsys.readouterr().err == ""  # it has printed its error here
    assert report(PeerError(5, "far", "DataError: gone", 2)) == 2
    be_rank(0, attempt, monkeypatch)
    assert report(PeerError(5, "far", "DataError: gone", 2)) == 2
    assert capsys.readouterr().err == "error: rank 5 on far failed: DataError: gone\n"
    assert [failure["kind"] for failure in read_failures(attempt)] == ["peer", "peer"]


def test_a_lost_connection_is_blamed_after_every_other_failure(attempt: Path) -> None:
    report(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"))
    (attempt / "0").mkdir()
    later = Failure(kind="own", time=2e12, rank=0, host="n", text="MemoryError", exit_code=1)
    (attempt / "0" / "error.json").write_text(json.dumps({"aurora": later}))
    (attempt / "2").mkdir()
    (attempt / "2" / "error.json").write_text("{not JSON")
    assert [failure["kind"] for failure in read_failures(attempt)] == ["own", "lost"]


def test_each_message_is_said_by_one_process_of_a_launch(attempt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_first_to_say("a")
    assert not is_first_to_say("a")
    assert is_first_to_say("b")
    be_rank(0, attempt, monkeypatch)
    assert not is_first_to_say("a")
    monkeypatch.setattr(failures, "_launcher_on_this_host", lambda: "another launch")
    assert is_first_to_say("a")


def test_a_left_over_rank_swallows_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "PMI_RANK": "1", "OMPI_COMM_WORLD_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


@dataclass
class Ended:
    """What torchrun records of a process that did not end with 0."""

    exitcode: int
    pid: int = 1


def told(kind: Any, rank: int, code: int = 1) -> Failure:
    return Failure(kind=kind, time=1.0, rank=rank, host="n", text="Oops", exit_code=code)


@pytest.mark.parametrize(
    ("ended", "reports", "by_launcher", "code", "line"),
    [
        ({0: Ended(1), 1: Ended(1)}, [told("own", 1), told("lost", 0)], set(), 1, "rank 1 on n failed first: Oops"),
        # A rank that the launcher ended is never blamed, even if it is the only one that torchrun lists.
        ({0: Ended(-15)}, [told("own", 1)], {1}, 1, "rank 1 on n failed first: Oops"),
        ({0: Ended(-15, 10), 1: Ended(-9, 11)}, [], {10}, 1, "rank 1 on {host} was killed by signal 9"),
        ({0: Ended(-9, 10), 1: Ended(-11, 11)}, [], {10}, 1, "rank 1 on {host} was killed by signal 11"),
        ({0: Ended(1, 10), 1: Ended(-9, 11)}, [told("lost", 0)], set(), 1, "rank 1 on {host} was killed by signal 9"),
        ({0: Ended(-15, 10)}, [], {10}, 1, "before they could say why"),
        ({0: Ended(75), 1: Ended(75)}, [], set(), 75, None),
        ({0: Ended(75), 1: Ended(-15, 11)}, [], {11}, 75, None),
        ({0: Ended(75), 1: Ended(-9, 11)}, [], set(), 1, "rank 1 on {host} was killed by signal 9"),
        ({0: Ended(75), 1: Ended(7)}, [], set(), 1, "rank 1 on {host} ended with exit code 7"),
        ({1: Ended(2)}, [told("own", 1, code=2)], set(), 2, None),
        ({0: Ended(2), 1: Ended(2)}, [], set(), 2, None),
        ({0: Ended(2)}, [told("peer", 5, code=2)], set(), 2, None),
        # On another node than the one where rank 5 failed.
        ({0: Ended(1), 1: Ended(1)}, [told("peer", 5), told("peer", 5)], set(), 1, None),
        ({0: Ended(7), 1: Ended(1)}, [told("peer", 5)], set(), 1, "rank 0 on {host} ended with exit code 7"),
        ({0: Ended(1)}, [told("lost", 0)], set(), 1, "rank 0 on n lost the connection to another rank"),
    ],
)
def test_the_launcher_judges(
    ended: dict[int, Ended], reports: list[Failure], by_launcher: set[int], code: int, line: str | None
) -> None:
    found, said = judge(ended, reports, by_launcher)
    assert found == code
    assert (said is None) == (line is None)
    assert line is None or line.format(host=HOST) in str(said)


@pytest.mark.parametrize(
    ("codes", "code"), [((-15, -15), 75), ((-10, 75), 75), ((-15, -9), 1), ((-15, 1), 1), ((-11, -15), 1)]
)
def test_a_signal_that_comes_before_the_processes_can_handle_it_is_a_stop(codes: tuple[int, int], code: int) -> None:
    """Slurm signals the launcher and its processes alike; before they handle signals they have trained nothing."""
    ended = {rank: Ended(number, 10 + rank) for rank, number in enumerate(codes)}
    assert judge(ended, [], set(), asked=True)[0] == code
    assert judge(ended, [], set())[0] == 1
    assert judge(ended, [told("own", 1)], set(), asked=True)[0] == 1


def test_the_launcher_names_the_rank_that_it_ended_because_it_was_frozen() -> None:
    """The others lost the connection to it, or were ended by torchrun."""
    ended = {0: Ended(1, 10), 5: Ended(-9, 11), 6: Ended(-15, 12)}
    code, said = judge(ended, [told("lost", 0)], {11, 12}, frozen=11)
    assert code == 1
    assert said is not None
    assert said.startswith(f"rank 5 on {HOST} was frozen (stopped, as by SIGSTOP) for 60 seconds")
