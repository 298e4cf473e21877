"""``aurora data fetch``: copy the files of a lock into a folder, for machines without internet."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.cli.arguments import add_config

if TYPE_CHECKING:
    from pretrain.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "fetch",
        help="copy the files of remote sources into a folder",
        description="Copy the files of the lock of CONFIG (see `aurora data resolve`), the tokenizer included, into a "
        "folder and verify them. "
        "With data.mirror set to that folder, runs read the copies; they are the same runs as with the remote files. "
        "An interrupted copy continues where it stopped when the command is started again.",
    )
    add_config(parser)
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="the folder; created if needed")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Copy what the folder lacks."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from tqdm import tqdm

    from pretrain.config import load_config
    from pretrain.data import DataError
    from pretrain.data.hub_tokenizer import locked_tokenizer, parse
    from pretrain.data.lock import Lock, load_lock, locked_sources, remote_paths
    from pretrain.data.mirror import fetch, missing_files
    from pretrain.data.sources.retries import set_retry_minutes

    whole = load_config(options.config, options.overrides)
    config = whole.data
    if not remote_paths(config):
        print("nothing to copy: all sources are local")
        return 0
    if config.lock is None:
        raise DataError(f"{options.config}: has no lock file yet: run `aurora data resolve` with this config first")
    files = Lock(locked_sources(load_lock(Path(config.lock)), config, config.lock)).files
    if parse(whole.tokenizer.path):
        files += locked_tokenizer(whole.tokenizer.path, config.lock).files
    set_retry_minutes(config.retry_minutes)
    missing = missing_files(files, options.to)
    total = sum(file.bytes for file in missing)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        fetch(missing, options.to, bar.update)
    print(f"{options.to}: {len(missing):,} of {len(files):,} files copied, {total:,} bytes; all are there")
    return 0
