"""``aurora data resolve``: list remote sources once, and write the lock from which runs read."""

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
        "resolve",
        help="list remote sources and write their lock file",
        description="List the files of every remote source of CONFIG, pin the revisions, and write the lock file from "
        "which runs read: the files with their sizes and versions, the row groups of parquet files, the licences. "
        "A tokenizer on the Hub is pinned and fetched as well. An interrupted resolve continues where it stopped when "
        "it is started again.",
    )
    add_config(parser)
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="the lock to write (default: data.lock, or CONFIG with the suffix .lock.json)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the lock."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.config import load_config
    from pretrain.config.validate import lock_beside
    from pretrain.data.catalog import resolve_sources
    from pretrain.data.hub_tokenizer import resolve
    from pretrain.data.lock import journal_of, lock_of, remote_paths, save_lock

    whole = load_config(options.config, options.overrides)
    config = whole.data
    tokenizer = resolve(whole.tokenizer, config)
    if tokenizer:
        print(f"{tokenizer.pinned}: {tokenizer.bytes:,} bytes, fetched")
    if not remote_paths(config):
        print("nothing to resolve: all sources are local, and local sources need no lock")
        return 0
    path = options.out or Path(config.lock or lock_beside(Path(options.config)))
    journal = journal_of(path)
    lock = resolve_sources(config, journal, say=print)
    if tokenizer:
        lock = lock_of([*lock.sources.values(), tokenizer])
    save_lock(lock, path)
    journal.unlink(missing_ok=True)
    print(f"{path}: {len(lock.files):,} files, digest {lock.digest[:16]}")
    return 0
