"""The entry point: parse the command line, run one verb, turn its outcome into an exit code."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import select
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn

from pretrain.cli import (
    check,
    checkpoint,
    compare,
    compare_page,
    config,
    data,
    evaluate,
    export,
    plan,
    report,
    result,
    slurm,
    status,
    sweep,
    train,
)
from pretrain.processes.environment import set_defaults
from pretrain.processes.exit_codes import BAD_INPUT, FAILED
from pretrain.processes.failures import is_first_to_say, note_exit
from pretrain.processes.failures import report as report_failure
from pretrain.processes.output import drop_what_cannot_be_written, open_closed_streams

VERBS = (
    *(check, config, data, train, status, checkpoint, slurm, plan, sweep),
    *(export, evaluate, result, compare, compare_page, report),
)
"""The modules of the verbs, in the order of the help. Each has a function ``add`` that declares its arguments; what
carries a verb out is imported when it runs."""

EXIT_CODES = """\
exit codes:
  0    done
  1    failed; a traceback says where
  2    bad input: one message per problem, nothing was trained or overwritten
  69   a data server did not answer for data.retry_minutes; what was trained is saved, and the same command continues
  75   stopped on request, with a checkpoint saved; the same command continues
  130  interrupted, with nothing to save"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code.

    Errors are printed here (see `pretrain.processes.failures`) and not raised.

    Args:
        arguments: the command line without the program's name; None: that of this process.

    Raises:
        SystemExit: for a command line that cannot be parsed, and for ``--help``.
    """
    open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: a name may hold what cannot be encoded
    set_defaults()
    with _our_warnings():
        options = parse(arguments)
        try:
            code = int(options.run(options))
            sys.stdout.flush()
        except BrokenPipeError as error:
            code = FAILED if _drop_closed_output() else report_failure(error)
        except BaseException as error:
            code = report_failure(error)
    note_exit(code)
    drop_what_cannot_be_written()
    return code


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. Overrides may follow options, which argparse does not provide for."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and hasattr(options, "overrides") and not any(word.startswith("-") for word in rest):
        options.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(
        prog="aurora",
        description="Pretrain, export and evaluate language models.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # deepspeed's launcher puts it first. The variable LOCAL_RANK, which it also sets, is what counts.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=_Parser)
    for verb in VERBS:
        verb.add(verbs)
    return parser


class _Parser(argparse.ArgumentParser):
    """Every process of a run may see the same mistake; the first one on each host prints it."""

    def error(self, message: str) -> NoReturn:
        if is_first_to_say(message):
            super().error(message)
        raise SystemExit(BAD_INPUT)


@contextlib.contextmanager
def _our_warnings() -> Iterator[None]:
    """Print a warning as one line, once however often the config is read and however many processes read it."""
    before = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.filterwarnings("once", message=r"optimizer\.", category=UserWarning)
        warnings.formatwarning = lambda message, *_: (
            f"warning: {message}\n" if is_first_to_say(f"warning: {message}") else ""
        )
        try:
            yield
        finally:
            warnings.formatwarning = before


def _drop_closed_output() -> bool:
    """Whether nobody reads standard output any more (``| head``); what Python still holds for it is dropped then."""
    try:
        output = sys.stdout.fileno()
        poll = select.poll()
        poll.register(output, 0)
        closed = any(events & select.POLLERR for _, events in poll.poll(0))
        if closed:
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    except (OSError, ValueError):  # not a file
        return False
    return closed
