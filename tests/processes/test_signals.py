"""Requests to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from pretrain.processes import signals
from pretrain.processes.signals import PASSED_ON, SIGNALS, SignalCount, StopRequests, stop_requests
from tests.conftest import REPOSITORY


def test_the_signals_of_people_terminals_and_schedulers_ask_for_a_stop() -> None:
    assert set(SIGNALS) == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}


def test_repetitions_of_a_signal_are_not_counted() -> None:
    """At a time limit without notice, Slurm sends SIGTERM twice in a row."""
    clock = [100.0]
    received = SignalCount(lambda: clock[0])
    near, far = 0.6 * signals.REPEAT_SECONDS, 1.1 * signals.REPEAT_SECONDS
    counted = []
    for wait, number in [
        (0.0, signal.SIGTERM),
        (0.0, signal.SIGTERM),
        (near, signal.SIGTERM),
        (near, signal.SIGTERM),  # whoever keeps sending it is heard
        (0.0, signal.SIGINT),  # another signal is another request
        (near, signal.SIGTERM),
        (far, signal.SIGTERM),
    ]:
        clock[0] += wait
        counted.append(received.add(number))
    assert counted == [True, False, False, True, True, False, True]
    assert received.count == 4


TERM, USR1, INT, HUP = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP


@pytest.mark.parametrize(
    ("received", "requests"),
    [
        ([USR1, TERM], 1),  # --signal=USR1@90, and the limit itself
        ([TERM, USR1], 1),  # preempted with a grace period, into which the notice of the limit falls
        ([USR1, TERM, TERM], 2),
        ([USR1, TERM, USR1], 2),
        ([USR1, TERM, INT], 2),
        ([USR1, USR1, TERM], 2),  # two requests already, and the limit is not a third
        ([TERM, TERM], 2),
        ([USR1, USR1], 2),
        ([INT, INT], 2),
        ([INT, TERM], 2),
        ([USR1, INT, TERM], 3),
        ([HUP, TERM], 2),
        ([TERM, HUP], 2),
        ([TERM, PASSED_ON, PASSED_ON], 1),  # to a launcher, from one above it that was asked as well
    ],
)
def test_the_end_that_a_notice_announced_is_the_same_request(received: list[signal.Signals], requests: int) -> None:
    """Well apart from each other: Slurm sends SIGTERM a minute or more after its notice, while the run still saves."""
    clock = [0.0]
    counted = SignalCount(lambda: clock[0])
    for number in received:
        clock[0] += 60
        counted.add(number)
    assert counted.count == requests


@pytest.mark.parametrize("wait", [0.0, 2 * signals.REPEAT_SECONDS])
def test_a_process_is_ended_by_a_later_signal_and_not_by_a_repetition(wait: float) -> None:
    """By the signal itself, as if it had never been handled."""
    code = (
        "import os, signal, sys, time\n"
        "from pretrain.processes.signals import StopRequests, stop_requests\n"
        "requests = StopRequests()\n"
        "with stop_requests(requests, None, first_only=True):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(float(sys.argv[1]))\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert requests.count == 1\n"
    )
    command = [sys.executable, "-c", code, str(wait)]
    done = subprocess.run(command, cwd=REPOSITORY, timeout=60, check=False)
    assert done.returncode == (-signal.SIGTERM if wait else 0)


def test_a_process_lives_through_the_end_that_a_notice_announced() -> None:
    code = (
        "import os, signal\n"
        "from pretrain.processes.exit_timer import exit_timer\n"
        "from pretrain.processes.signals import StopRequests, stop_requests\n"
        "requests = StopRequests()\n"
        "with exit_timer(requests), stop_requests(requests, None, first_only=True):\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(requests.count, requests.reason)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60, check=False, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"1 SIGUSR1\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_requests_are_counted_and_the_handlers_return(
    number: signal.Signals, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.0)
    before = [signal.getsignal(each) for each in (*SIGNALS, PASSED_ON)]
    requests = StopRequests()
    with stop_requests(requests, "stopping soon"):
        assert not requests
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert requests
        assert requests.count == 2
        assert requests.reason == number.name
    assert [signal.getsignal(each) for each in (*SIGNALS, PASSED_ON)] == before
    assert capfd.readouterr().err == f"\n{number.name}: stopping soon\n" * 2


def test_a_second_request_does_what_it_did_before(capfd: pytest.CaptureFixture[str]) -> None:
    def asked_twice() -> None:
        requests = StopRequests()
        with stop_requests(requests, None, first_only=True):
            os.kill(os.getpid(), signal.SIGTERM)
            assert requests.count == 1
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        asked_twice()
    assert capfd.readouterr().err == ""


def test_what_the_launcher_passes_on_counts_once_and_is_no_second_signal(capfd: pytest.CaptureFixture[str]) -> None:
    """Slurm signals the launcher and its processes alike."""
    requests = StopRequests()
    with stop_requests(requests, "stopping soon", first_only=True):
        for _ in range(3):
            os.kill(os.getpid(), PASSED_ON)
        assert requests.count == 1
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), PASSED_ON)
        assert requests.count == 2
    assert capfd.readouterr().err == "\nSIGTERM: stopping soon\n"


@pytest.mark.parametrize(
    ("number", "asks"), [(signal.SIGHUP, False), (signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGUSR1, True)]
)
def test_what_nohup_and_shells_ignore_stays_ignored(number: signal.Signals, asks: bool) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        requests = StopRequests()
        with stop_requests(requests, None):
            os.kill(os.getpid(), number)
            assert bool(requests) is asks
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_thread_says_that_it_cannot_be_asked() -> None:
    said: list[str] = []
    before = [signal.getsignal(each) for each in SIGNALS]

    def work() -> None:
        requests = StopRequests()
        with stop_requests(requests, "stopping", warn=said.append):
            said.append(str(requests.count))
            assert [signal.getsignal(each) for each in SIGNALS] == before

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(said) == 2
    assert "main thread" in said[0]
    assert said[1] == "0"
