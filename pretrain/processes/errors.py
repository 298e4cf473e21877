"""The two kinds of errors that the command line treats specially; every other one is a bug and shows its traceback."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import ClassVar

from pretrain.processes.exit_codes import BAD_INPUT


class UserError(ValueError):
    """Bad input: something that the user can fix.

    Every error class of this project for bad input derives from it. The command line prints it as one
    line per problem, without a traceback, and exits with code 2. A plain `ValueError` is a bug instead.
    """

    exit_code: ClassVar[int] = BAD_INPUT
    """The code that the command exits with."""


class PeerError(RuntimeError):
    """Another rank failed, and has said why itself; see `pretrain.engine.ranks.Ranks.together`.

    Args:
        rank: the rank that failed first.
        host: its machine.
        text: its error, in one line.
        exit_code: the code that it exits with.
    """

    def __init__(self, rank: int, host: str, text: str, exit_code: int) -> None:
        self.rank, self.host, self.text, self.exit_code = rank, host, text, exit_code
        super().__init__(f"rank {rank} on {host} failed: {text}")

    def __reduce__(self) -> tuple[type[PeerError], tuple[int, str, str, int]]:
        return PeerError, (self.rank, self.host, self.text, self.exit_code)


class HangError(RuntimeError):
    """The run made no progress for too long; raised nowhere, since the thread that would raise it hangs.

    Args:
        text: which rank hangs, and where; further lines tell where the others are.
        rank: the rank that hangs.
        host: its machine.
        launch: identifies the launch of the run, in which every rank comes to the same conclusion.
    """

    def __init__(self, text: str, *, rank: int, host: str, launch: str) -> None:
        self.rank, self.host, self.launch = rank, host, launch
        super().__init__(text)


def nearest(got: object, known: Iterable[object], at_most: int = 1) -> list[str]:
    """Return the known names that resemble `got`, the nearest first."""
    return difflib.get_close_matches(str(got), [str(name) for name in known], n=at_most)


def did_you_mean(got: object, known: Iterable[object]) -> str:
    """Return the end of a message about an unknown name: the nearest known name, or all of them if none is near."""
    names = [str(name) for name in known]
    near = nearest(got, names)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(names)}"


@contextlib.contextmanager
def noted(error: BaseException) -> Iterator[None]:
    """Add what fails in this block to an error that is about to be raised, as a note, instead of raising it."""
    try:
        yield
    except Exception as other:
        if other is not error:
            error.add_note(f"after this error, another one: {type(other).__name__}: {other}")
