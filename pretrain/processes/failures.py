"""How an error reaches the person who needs it: what a process prints, and what it leaves for its launcher.

Bad input (`UserError`) is printed as one line per problem. Every other error is printed with its traceback, by the
process in which it happened; with several processes each line starts with rank and host. A process started by torchrun
also writes the error to the file that torchrun asks for, in torchrun's format with our own fields under ``aurora``:
the launcher reads there which process failed first (`pretrain.processes.torchrun`).

This module loads no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Literal, TypedDict

from pretrain.files import replace_text
from pretrain.processes.environment import world
from pretrain.processes.errors import HangError, PeerError, UserError
from pretrain.processes.exit_codes import FAILED, INTERRUPTED

ERROR_FILE = "error.json"
EXIT_FILE = "exit-code"
PID_FILE = "pid"
_REPORTED = "_aurora_exit_code"  # an error's attribute: it has been reported, and this is the exit code

LOST_CONNECTION = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL error")
"""Parts of the error messages of a collective that fails because another process has died."""
LOST_CONNECTION_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError"}


class Failure(TypedDict):
    """What a failed process tells its launcher."""

    kind: Literal["own", "peer", "lost"]
    """own: this process failed; peer: another process failed and reported it; lost: another process has died."""
    time: float
    """Seconds since the epoch."""
    rank: int
    host: str
    text: str
    """The error in one line."""
    exit_code: int


def report(error: BaseException) -> int:
    """Print an error once, leave it for the launcher, and return the exit code.

    Call it before this process leaves its process group: the others then fail later than this one.
    """
    code: int | None = getattr(error, _REPORTED, None)
    if code is not None:
        return code
    failure = _describe(error)
    _write(failure, error)
    if isinstance(error, UserError):
        # Every process may see the same bad input; the first one on each host prints it.
        if is_first_to_say(str(error)):
            _print("\n".join(line if line.startswith(" ") else f"error: {line}" for line in str(error).splitlines()))
    elif isinstance(error, KeyboardInterrupt):
        if is_first_to_say("interrupted"):
            _print("error: interrupted")
    elif isinstance(error, HangError):
        if is_first_to_say(f"launch {error.launch} hangs"):
            _print(f"error: {error}")
    elif isinstance(error, PeerError):
        # On its own host the other process has printed its error itself.
        if error.host != socket.gethostname() and is_first_to_say(str(error)):
            _print(f"error: {error}")
    elif failure["kind"] == "lost" and _another_failed_here():
        _print(_prefixed(f"lost the connection to another rank: {failure['text']}"))
    else:
        _print(_prefixed("".join(traceback.format_exception(error)).rstrip("\n")))
    with contextlib.suppress(AttributeError):
        setattr(error, _REPORTED, failure["exit_code"])
    return failure["exit_code"]


def note_exit(code: int) -> None:
    """Tell the launcher the code with which this process is about to end."""
    folder = _elastic_folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            (folder / EXIT_FILE).write_text(str(code))


def note_ready() -> None:
    """Tell the launcher that this process can be asked to stop, and which process it is."""
    folder = _elastic_folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            replace_text(folder / PID_FILE, str(os.getpid()))


def is_first_to_say(text: str) -> bool:
    """Whether this process is the first, of those that its launcher started on this host, to print `text`."""
    here = world()
    if here.size == 1:
        return True
    own = _elastic_folder()
    folder = own.parent if own else Path(tempfile.gettempdir())
    key = hashlib.sha256(f"{_launcher_on_this_host()}\n{text}".encode()).hexdigest()[:16]
    try:
        (folder / f"aurora-said-{key}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return here.local_rank == 0
    return True


def read_failures(folder: Path) -> list[Failure]:
    """What the processes left in a launcher's log folder of one attempt, those that failed first first."""
    found: list[Failure] = []
    for file in folder.glob(f"*/{ERROR_FILE}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.append(json.loads(file.read_text(encoding="utf-8"))["aurora"])
    return sorted(found, key=lambda failure: (failure["kind"] == "lost", failure["kind"] == "peer", failure["time"]))


def _describe(error: BaseException) -> Failure:
    failure = Failure(
        kind="own",
        time=time.time(),
        rank=world().rank,
        host=socket.gethostname(),
        text=_one_line(error),
        exit_code=FAILED,
    )
    if isinstance(error, UserError):
        failure["exit_code"] = error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        failure["exit_code"] = INTERRUPTED
    elif isinstance(error, HangError):
        failure["rank"], failure["host"] = error.rank, error.host
    elif isinstance(error, PeerError):
        of_peer = {"rank": error.rank, "host": error.host, "text": error.text, "exit_code": error.exit_code}
        failure |= Failure(kind="peer", time=failure["time"], **of_peer)  # type: ignore[typeddict-item]
    elif type(error).__name__ in LOST_CONNECTION_TYPES or any(part in str(error) for part in LOST_CONNECTION):
        failure["kind"] = "lost"
    return failure


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _write(failure: Failure, error: BaseException) -> None:
    """Write torchrun's error file, once: the first error of a process is the one that counts."""
    folder = _elastic_folder()
    if folder is None or (folder / ERROR_FILE).exists():
        return
    stack = "".join(traceback.format_exception(error))
    extra = {"py_callstack": stack, "timestamp": str(int(failure["time"]))}
    content: dict[str, Any] = {"message": {"message": failure["text"], "extraInfo": extra}, "aurora": failure}
    with contextlib.suppress(OSError):
        replace_text(folder / ERROR_FILE, json.dumps(content))


def _another_failed_here() -> bool:
    """Whether another process of this host has failed by itself: then its traceback is the one that matters."""
    own = _elastic_folder()
    return own is not None and any(failure["kind"] == "own" for failure in read_failures(own.parent))


def _elastic_folder() -> Path | None:
    """Where torchrun expects the error file of this process; None under other launchers and without one."""
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    return file.parent if file.name == ERROR_FILE and file.parent.is_dir() else None


def _launcher_on_this_host() -> str:
    """The parent process, in a form that no other process has had since the machine started."""
    parent = os.getppid()
    try:
        started = Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        started = ""
    return f"{parent} {started}"


def _prefixed(text: str) -> str:
    here = world()
    if here.size == 1:
        return text
    prefix = f"[rank {here.rank} on {socket.gethostname()}] "
    return "\n".join(prefix + line for line in text.splitlines())


def _print(text: str) -> None:
    """Write to standard error in one call; ignore errors, so that a closed stream does not hide the failure."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
