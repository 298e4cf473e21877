"""Arguments that several verbs share, and types of their values."""

from __future__ import annotations

import argparse
from collections.abc import Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[Any]


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG and its overrides."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="values that take precedence over the file's, for example optimizer.lr=0.01",
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add RUN, as `path`."""
    parser.add_argument("path", metavar="RUN", type=Path, help="the folder of a run")


def add_run_or_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add RUN_OR_CHECKPOINT, as `path`."""
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT", type=Path, help="the folder of a run or a checkpoint")


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """Add the choice of evaluation tasks."""
    parser.add_argument(
        "--tasks",
        type=task_names,
        default="hellaswag,winogrande",
        metavar="NAMES",
        help="tasks, separated by commas (default: %(default)s)",
    )


def add_texts(parser: argparse.ArgumentParser) -> None:
    """Add the held-out texts of an evaluation."""
    parser.add_argument(
        "--bits-per-byte",
        action="append",
        metavar="TEXT",
        help="also measure bits per byte on a held-out text: lambada (packaged passages), validation (the validation "
        "split of a run), a .txt or .jsonl file or a folder of .txt files, or NAME=FILE; may be repeated. With --tasks "
        "'' nothing else is measured",
    )
    parser.add_argument(
        "--stride",
        type=positive,
        metavar="N",
        help="tokens that the window advances over a text longer than the context (default: half of the context)",
    )


def add_marks(parser: argparse.ArgumentParser) -> None:
    """Add what marks items of an evaluation, and the format of its files."""
    parser.add_argument(
        "--overlap",
        type=Path,
        metavar="REPORT",
        help="mark the items that occur in the training text, by the JSON of `aurora data overlap`, and show scores "
        "without them",
    )
    parser.add_argument(
        "--subset",
        action="append",
        metavar="NAME[=FILE]",
        help="also show scores on a subset of the items: goldenswag from the Hub, or a list of items in a file (.txt, "
        ".jsonl, .parquet); TASK:NAME=FILE for other tasks than hellaswag; may be repeated",
    )
    parser.add_argument(
        "--format",
        choices=("aurora", "lm-eval"),
        default="aurora",
        help="layout of the files; lm-eval: results_*.json and samples_*.jsonl, as the lm_eval command writes them "
        "(default: %(default)s)",
    )


def add_margin(parser: argparse.ArgumentParser) -> None:
    """Add the margin of the test of equivalence."""
    parser.add_argument(
        "--margin",
        type=_margin,
        default=0.02,
        metavar="M",
        help="differences of scores below M count as equivalent (default: %(default)s, 2 percentage points)",
    )


def add_series(parser: argparse.ArgumentParser) -> None:
    """Add the evaluation of a run's checkpoints one after another, and the logging of results."""
    parser.add_argument(
        "--every-checkpoint",
        action="store_true",
        help="MODEL is a run: evaluate each of its checkpoints that has no result yet, oldest first; a result is "
        "written to DIR/step-N, where DIR is eval/ of the run folder by default",
    )
    parser.add_argument(
        "--every-steps",
        type=positive,
        metavar="N",
        help="with --every-checkpoint: only checkpoints whose step is a multiple of N, and the last one of a finished "
        "run (default: every checkpoint)",
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="with --every-checkpoint: continue while the run trains, until its last checkpoint is evaluated",
    )
    parser.add_argument(
        "--idle-minutes",
        type=above_0,
        default=10.0,
        metavar="N",
        help="with --follow: end when no process has trained the run for so long, for example because it was stopped "
        "and not requeued (default: %(default)s)",
    )
    parser.add_argument(
        "--log",
        choices=("wandb",),
        help="also log the scores to the Weights & Biases run of the training run, against the step of the checkpoint",
    )


class Marks(NamedTuple):
    """What marks items of an evaluation."""

    overlap: Path | None
    """The report of `aurora data overlap`."""
    subsets: Sequence[str]
    """Each NAME or [TASK:]NAME=FILE."""

    @classmethod
    def of(cls, options: argparse.Namespace) -> Marks:
        """Return those of a command line that has the arguments of `add_marks`."""
        return cls(options.overlap, options.subset or [])

    def __bool__(self) -> bool:
        return bool(self.overlap or self.subsets)


def command_line(parser: argparse.ArgumentParser, options: argparse.Namespace, without: Container[str]) -> list[str]:
    """Return a command line that the parser turns into the same options.

    Args:
        parser: of a verb.
        options: what it made of a command line.
        without: arguments to leave out, by their `dest`.
    """
    words: list[str] = []
    places: list[str] = []
    for action in parser._actions:
        value = None if action.dest == "help" or action.dest in without else getattr(options, action.dest)
        if value is None or value is False:
            continue
        if not action.option_strings:
            places += value if isinstance(value, list) else [str(value)]
        elif action.nargs == 0:
            words.append(action.option_strings[-1])
        else:
            for one in value if isinstance(action, argparse._AppendAction) else [value]:
                text = ",".join(one) if isinstance(one, list) else str(one)
                name = action.option_strings[-1]
                words += [f"{name}={text}"] if text.startswith("-") else [name, text]
    separated = any(place.startswith("-") for place in places)
    return [*words, *["--"] * separated, *places]


def task_names(text: str) -> list[str]:
    """Names separated by commas; a comma too many does no harm."""
    return [name.strip() for name in text.split(",") if name.strip()]


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text!r}")
    return value


def above_0(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _margin(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a difference of scores above 0 and below 1, got {text!r}")
    return value
