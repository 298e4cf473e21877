"""Standard output and error that cannot be written to end nothing; these processes load no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

WORK = """
import contextlib, logging, os, sys
from pretrain.processes.output import drop_what_cannot_be_written, open_closed_streams, output_may_fail

open_closed_streams()
logging.basicConfig()
with open(sys.argv[1], "w") as result, output_may_fail("training"):
    assert result.fileno() > 2, "a file in the place of a standard stream"
    for step in range(3):
        print("step", step, "é")
        print("flushed", flush=True)
        sys.stderr.write("half a line")
        logging.getLogger("a").warning("logged")
    result.write("whole")
with contextlib.suppress(OSError):
    sys.stderr.write("at the end")
with contextlib.suppress(OSError):
    print("at the end", end="")
drop_what_cannot_be_written()
sys.exit(75)
"""
WARNING = "warning: standard output failed ({}); training continues silently\n"


@pytest.mark.parametrize(
    ("redirection", "shown"),
    [
        ("", None),
        (">&-", None),
        ("2>&-", None),
        ("<&- >&- 2>&-", ""),
        (">/dev/full", WARNING.format("No space left on device")),
        (">/dev/full 2>/dev/full", ""),
        ("| true", WARNING.format("Broken pipe")),
        ("2>&1 | true", ""),
    ],
)
def test_work_continues_to_its_own_exit_code(redirection: str, shown: str | None, tmp_path: Path) -> None:
    wait = "sleep 0.3; " if "|" in redirection else ""  # until the reader is gone
    command = f'({wait}exec "$0" -c "$1" "$2") {redirection}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, WORK, str(tmp_path / "result")],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=60,
    )
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "result").read_text() == "whole"
    if redirection == "":
        assert done.stdout == "".join(f"step {step} é\nflushed\n" for step in range(3)) + "at the end"
    if shown is not None:
        assert done.stderr.count("warning: ") == shown.count("warning: ")
        assert shown in done.stderr
    assert "Traceback" not in done.stderr


def test_output_without_buffers_has_none() -> None:
    """As in the batch scripts (PYTHONUNBUFFERED): a process that is killed must not take its last lines along."""
    code = (
        "import os\n"
        "from pretrain.processes.output import output_may_fail\n"
        "with output_may_fail('training'):\n"
        "    print('the last line')\n"
        "    os._exit(0)\n"
    )
    kept = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=kept, timeout=60, check=True)
    assert done.stdout == "the last line\n"


def test_what_an_encoding_does_not_know_is_escaped() -> None:
    """A document, or the name of a file, may hold anything."""
    code = (
        "from pretrain.processes.output import open_closed_streams\n"
        "open_closed_streams()\n"
        "print('naïve 鯨 \\ud800 \\udcff')\n"
    )
    for encoding, shown in {
        "ascii": r"na\xefve \u9be8",
        "utf-8": "naïve 鯨",
        "utf-8:surrogateescape": "naïve 鯨",
    }.items():
        kept = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": encoding}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, cwd=REPOSITORY, env=kept, timeout=60, check=True)
        assert done.stdout.decode() == f"{shown} \\ud800 \\udcff\n"
