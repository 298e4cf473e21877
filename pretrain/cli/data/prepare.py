"""``aurora data prepare``: tokenize the sources of a config once."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli.arguments import add_config, positive

if TYPE_CHECKING:
    from pretrain.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "prepare",
        help="tokenize the sources of a config once, into shards that runs read",
        description="Tokenize the sources of a config once, into memory-mapped shards that runs read. Repeat the "
        "command after an interruption: it continues, and the result is the same, whatever the number of workers.",
    )
    add_config(parser)
    parser.add_argument("--to", required=True, metavar="DIR", help="the folder for the shards")
    parser.add_argument(
        "--workers",
        type=positive,
        default=1,
        metavar="N",
        help="processes that read and tokenize (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=positive,
        default=100_000_000,
        metavar="N",
        help="begin a new shard after this many tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--remove-duplicates",
        action="store_true",
        help="leave out a document if an earlier one has the same text. Takes a byte of memory per document, and 48 "
        "bytes per document of up to 16 million that are compared at a time",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prepare, and print how to use the result."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.config import load_config
    from pretrain.data.prepared.plan import LOCK_FILE, PrepareOptions
    from pretrain.data.prepared.prepare import prepare
    from pretrain.run.data_lock import lock_of_folder

    config = load_config(options.config, options.overrides)
    folder = Path(options.to)
    prepared = prepare(
        config.data,
        config.tokenizer,
        folder,
        workers=options.workers,
        options=PrepareOptions(options.shard_tokens, options.remove_duplicates),
        locked=lock_of_folder(config.data, folder / LOCK_FILE, print),
        say=_Occasionally(5.0),
    )
    for one in prepared:
        _print_totals(one.path, one.index)
        for file, rows in one.index.bad_rows.items():
            first = next((f", the first: {row}" for row in one.skipped if row.path == file), "")
            print(f"  {file}: {rows:,} bad {'row' if rows == 1 else 'rows'} skipped{first}")
    print("\nTo use it:\n")
    print("tokenizer:")
    print(f"  path: {prepared[0].folder / 'tokenizer.json'}")
    print(f"  eos_token: {config.tokenizer.eos_token!r}")
    print("data:\n  sources:")
    for one in prepared:
        print(f"    - path: {one.folder}")
    return 0


def _print_totals(path: str, index: Any) -> None:
    per_token = index.characters / max(1, index.tokens - index.documents)
    duplicates = "" if index.duplicates_removed is None else f", {index.duplicates_removed:,} duplicates removed"
    print(
        f"{path}: {index.documents:,} documents, {index.tokens:,} tokens with separators, {index.text_bytes:,} bytes, "
        f"{per_token:.2f} characters per token, {len(index.shards):,} shards of {index.dtype}{duplicates}"
    )


class _Occasionally:
    """Prints the first line, and then one line every few seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = 0.0

    def __call__(self, line: str) -> None:
        if time.monotonic() >= self._next:
            print(line, flush=True)
            self._next = time.monotonic() + self._seconds
