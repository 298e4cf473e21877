"""The batch step of a job under Slurm, which the scripts in `slurm/` start.

    python -m pretrain.cli.slurm_job [--ranks N] -- srun ... -m pretrain VERB ARGUMENTS

What comes after ``-m pretrain`` is a command of `aurora`; it is parsed and its config validated here, on one node and
before anything else starts.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence

from pretrain.cli.arguments import positive
from pretrain.processes.failures import report
from pretrain.processes.output import output_may_fail
from pretrain.slurm.heard import Heard
from pretrain.slurm.supervisor import Job, Supervisor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the batch step; return the exit code of the job.

    Raises:
        SystemExit: for a command line, also that of the work, that cannot be parsed, and for ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.cli.slurm_job", description="Run the batch step of a job."
    )
    parser.add_argument(
        "--ranks", type=positive, default=1, help="processes on all nodes together (default: %(default)s)"
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    options, command = parser.parse_args(given[:end]), given[end + 1 :]
    say = functools.partial(print, flush=True)
    heard = Heard()
    try:
        with heard.listening(), output_may_fail("the job"):  # its log may be on a disk that is full
            # Imported here: it loads torch, and signals may come meanwhile.
            from pretrain.cli.slurm_work import work_of

            job = Job.from_environment(os.environ)
            return Supervisor(job, work_of(command, options.ranks), say, heard).run(command)
    except SystemExit:
        raise  # argparse has said why
    except BaseException as error:
        return report(error)


if __name__ == "__main__":
    sys.exit(main())
