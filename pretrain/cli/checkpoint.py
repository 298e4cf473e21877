"""``aurora checkpoint``: list, verify and delete the checkpoints of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli.arguments import add_run, add_run_or_checkpoint, positive
from pretrain.text_tables import aligned

if TYPE_CHECKING:
    from pretrain.checkpoint.store import CheckpointReader
    from pretrain.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    """Declare the verb and its sub-verbs."""
    text = "list, verify and delete the checkpoints of a run"
    parser = verbs.add_parser("checkpoint", help=text, description=f"{text[0].upper()}{text[1:]}.")
    inner = parser.add_subparsers(required=True, metavar="VERB", parser_class=type(parser), help="what to do")
    listing = inner.add_parser(
        "list",
        help="list the checkpoints of a run",
        description="List the checkpoints of a run with their step, tokens, size and time, and whatever is not a "
        "complete checkpoint. Only indexes are read; `aurora checkpoint verify` reads everything.",
    )
    add_run(listing)
    listing.set_defaults(run=run_list)
    verify = inner.add_parser(
        "verify",
        help="read checkpoints and compare them with their checksums",
        description="Read every file of a checkpoint, or of all checkpoints of a run, and compare it with its "
        "checksum. The exit code is 0 if all are intact, and 2 otherwise.",
    )
    add_run_or_checkpoint(verify)
    verify.set_defaults(run=run_verify)
    prune = inner.add_parser(
        "prune",
        help="delete old checkpoints of a run",
        description="Delete all but the newest checkpoints of a run that is not training. The newest intact "
        "checkpoint always stays: checkpoints are verified, from the newest on, until one is found.",
    )
    add_run(prune)
    prune.add_argument(
        "--keep-last", type=positive, metavar="N", help="keep the newest N (default: the run's checkpoint.keep_last)"
    )
    prune.add_argument(
        "--keep-every-steps",
        type=positive,
        metavar="N",
        help="also keep the multiples of N (default: the run's checkpoint.keep_every_steps)",
    )
    prune.add_argument("--dry-run", action="store_true", help="print what would be deleted, and delete nothing")
    prune.set_defaults(run=run_prune)


def run_list(options: argparse.Namespace) -> int:
    """Print a table."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from datetime import UTC, datetime

    from pretrain.checkpoint.format import CheckpointError
    from pretrain.checkpoint.store import CheckpointReader, list_unfinished, step_folders
    from pretrain.run.folder import RunFolder

    root = _checkpoints(RunFolder(options.path))
    rows = [("checkpoint", "tokens", "ranks", "size", "saved", "")]
    for folder in step_folders(root):
        try:
            saved = datetime.fromtimestamp(folder.stat().st_mtime, UTC).isoformat(timespec="seconds")
            size = f"{sum(path.stat().st_size for path in folder.iterdir()) / 1e9:,.3f} GB"
            reader = CheckpointReader(folder)
            tokens, ranks = f"{reader.index['counters'].get('tokens', 0):,}", str(reader.index["world_size"])
            note = (reader.name_problem() or "").removeprefix(f"{folder}/")
        except FileNotFoundError:
            continue  # the run has just deleted it
        except OSError as error:  # also a file of this name
            size, saved, tokens, ranks, note = "", "", "", "", f"cannot be read: {error.strerror}"
        except CheckpointError as error:
            tokens, ranks, note = "", "", str(error).removeprefix(f"{folder}").lstrip("/: ")
        rows.append((folder.name, tokens, ranks, size, saved, note))
    rows += [(folder.name, "", "", "", "", "unfinished") for folder in list_unfinished(root)]
    print("\n".join(aligned(rows)))
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """Verify one checkpoint or all of a run, a line each."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.checkpoint.format import INDEX, CheckpointError
    from pretrain.checkpoint.store import CheckpointReader, is_checkpoint_name, step_folders
    from pretrain.run.folder import RunFolder

    one = (options.path / INDEX).is_file() or is_checkpoint_name(options.path.name)
    folders = [options.path] if one else step_folders(_checkpoints(RunFolder(options.path)))
    problems: list[str] = []
    for folder in folders:
        try:
            reader = CheckpointReader(folder)
            reader.verify()
        except CheckpointError as error:
            if one or folder.is_dir():  # else the run has just deleted it
                problems.append(str(error))
            continue
        print(f"{folder}: intact, {_content(reader)}", flush=True)
    if problems:
        raise CheckpointError("\n".join(problems))
    if not folders:
        raise CheckpointError(f"{options.path}: the run has no checkpoint")
    return 0


def run_prune(options: argparse.Namespace) -> int:
    """Delete what is not to be kept, under the lock of the run."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.checkpoint.store import clear_unfinished, list_unfinished, prunable, prune
    from pretrain.run.folder import RunFolder

    run = RunFolder(options.path)
    root = _checkpoints(run)
    keep_last, keep_every_steps = _kept(options)
    run.lock()
    try:
        unfinished = list_unfinished(root)
        if options.dry_run:
            removed = prunable(root, keep_last, keep_every_steps)
        else:
            clear_unfinished(root)
            removed = prune(root, keep_last, keep_every_steps)
    finally:
        run.unlock()
    for folder in [*unfinished, *removed]:
        print(f"{'would delete' if options.dry_run else 'deleted'} {folder}")
    if not unfinished and not removed:
        print(f"{root}: nothing to delete")
    return 0


def _checkpoints(run: Any) -> Path:
    """The folder of a run's checkpoints."""
    from pretrain.run.folder import RunError

    root: Path = run.checkpoints
    if not root.is_dir():
        raise RunError(f"{run.path}: not the folder of a run with checkpoints (it has no {root.name}/)")
    return root


def _kept(options: argparse.Namespace) -> tuple[int, int | None]:
    """How many checkpoints to keep, by the command line or else by the run's config."""
    from pretrain.config import parse_stored_config
    from pretrain.config.loader import read_yaml
    from pretrain.run.folder import CONFIG_FILE

    if options.keep_last is not None and options.keep_every_steps is not None:
        return options.keep_last, options.keep_every_steps
    settings = parse_stored_config(read_yaml(options.path / CONFIG_FILE)).checkpoint
    return options.keep_last or settings.keep_last, options.keep_every_steps or settings.keep_every_steps


def _content(reader: CheckpointReader) -> str:
    files = len(reader.index["files"]) + 1
    return f"{files} files, {len(reader.index['parameters'])} parameters"
