"""Requests to stop."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from pretrain.processes.signals import SIGNALS, StopRequests, stop_requests


@pytest.mark.parametrize("number", SIGNALS)
def test_requests_are_counted_and_the_handlers_return(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    requests = StopRequests()
    with stop_requests(requests, "stopping soon"):
        assert not requests
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert requests
        assert requests.count == 2
    assert [signal.getsignal(each) for each in SIGNALS] == before
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
