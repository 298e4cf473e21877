"""Several processes: torchrun, with our exit codes; and what a training process owes its parent.

torchrun ends with code 1 and a traceback whatever its processes ended with; a stop on request (75) and bad input (2)
must stay what they are. ``python -m pretrain.processes`` takes torchrun's arguments, for one node of several.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Sequence

from pretrain.processes.exit_codes import BAD_INPUT, DONE, FAILED, STOPPED

PARENT_VARIABLE = "AURORA_PARENT"
"""Environment variable with the id of the process that a training process belongs to, for example a sweep's."""


def free_port() -> int:
    """A TCP port that is free on loopback."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def is_orphaned() -> bool:
    """Whether the process that started this one, and said so in `PARENT_VARIABLE`, is gone."""
    parent = os.environ.get(PARENT_VARIABLE)
    return parent is not None and parent != str(os.getppid())


def run_processes(count: int, arguments: Sequence[str]) -> int:
    """Run ``aurora ARGUMENTS`` on `count` processes that find each other on loopback; returns the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    return torchrun(["--standalone", "--nproc-per-node", str(count), "-m", "pretrain", *arguments])


def torchrun(arguments: Sequence[str]) -> int:
    """Run ``torchrun ARGUMENTS`` in this process; returns the exit code of the processes that it started here."""
    # Elastic's log repeats as errors what the processes have said themselves.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(list(arguments)))
    except ChildFailedError as error:
        return _exit_code({rank: failure.exitcode for rank, failure in error.failures.items()})
    except RendezvousError as error:
        # Also when the node that the others meet at has ended first; its own code says why.
        reason = f" ({error.__cause__})" if error.__cause__ else ""
        print(f"error: lost or never reached the other nodes: {error}{reason}", file=sys.stderr)
        return FAILED
    except SignalException as signal:
        print(f"{signal.sigval.name}: the processes were asked to stop", file=sys.stderr)
        return 128 + signal.sigval
    return DONE


def _exit_code(codes: dict[int, int]) -> int:
    """The code that the processes agree on; those that ended on their own tell, not those stopped because of them."""
    for code in (STOPPED, BAD_INPUT):
        if code in codes.values():
            return code
    for rank, code in codes.items():
        if code < 0:
            print(f"error: process {rank} was ended by signal {-code}", file=sys.stderr)
    return FAILED
