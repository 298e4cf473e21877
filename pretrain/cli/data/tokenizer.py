"""``aurora data tokenizer``: train a tokenizer on the sources."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.cli.arguments import positive
from pretrain.cli.data.sources import refuse_unwritable

if TYPE_CHECKING:
    from pretrain.cli.arguments import Verbs
    from pretrain.config.data import DataConfig
    from pretrain.data.catalog import Locked


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "tokenizer",
        help="train a tokenizer on the sources of a config, or on files",
        description="Train a byte-level BPE tokenizer on a sample of the sources of a config, or of some files. The "
        "same data and options give the same tokenizer.",
    )
    parser.add_argument("inputs", nargs="+", metavar="CONFIG|FILE", help="a YAML file, or files of text as in a config")
    parser.add_argument(
        "--vocab-size", type=positive, required=True, metavar="N", help="entries, including the separator"
    )
    parser.add_argument("--to", required=True, metavar="FILE", help="the tokenizer.json to write")
    parser.add_argument(
        "--eos-token", metavar="TEXT", help="the separator of documents (default: the config's, or <|endoftext|>)"
    )
    parser.add_argument(
        "--text-field", default="text", metavar="NAME", help="what holds the text in files (default: %(default)s)"
    )
    parser.add_argument(
        "--sample-mb",
        type=positive,
        default=256,
        metavar="N",
        help="train on this many MB of text, of each source by its share of the mixture (default: %(default)s). Takes "
        "several times as much memory",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the sample's order (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train, check and write the tokenizer."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.config.tokenizer import TokenizerConfig
    from pretrain.data import load_tokenizer, vocabulary_rows
    from pretrain.data.train_tokenizer import refuse_existing, sample_texts, save_tokenizer, train_tokenizer

    path = Path(options.to)
    refuse_existing(path)
    refuse_unwritable(path)
    data, eos_token, locked = _inputs(options)
    texts = sample_texts(data, options.sample_mb * 1_000_000, options.seed, locked)
    tokenizer = train_tokenizer(texts, options.vocab_size, eos_token)
    save_tokenizer(tokenizer, path)
    rows = vocabulary_rows(load_tokenizer(TokenizerConfig(path=str(path), eos_token=eos_token)))
    print(f"{path}: {rows:,} entries")
    if rows < options.vocab_size:
        print(f"The text has no more pairs to merge: {options.vocab_size:,} entries were asked for.")
    print(f"\nTo use it:\n\nmodel:\n  vocab_size: {rows} # or a multiple of 64 above\ntokenizer:\n  path: {path}")
    print(f"  eos_token: {eos_token!r}")
    return 0


def _inputs(options: argparse.Namespace) -> tuple[DataConfig, str, Locked]:
    """The sources, the separator, and the lock of the remote ones."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.config import ConfigError, load_config
    from pretrain.config.data import DataConfig
    from pretrain.config.validate import validate_section
    from pretrain.run.data_lock import lock_of_check
    from pretrain.run.folder import RunFolder

    first, *rest = options.inputs
    if first.endswith((".yaml", ".yml")):
        config = load_config(first, rest)
        locked = lock_of_check(config.data, RunFolder(config.run_folder), online=True)
        return config.data, options.eos_token or config.tokenizer.eos_token, locked
    sources = [{"path": path, "text_field": options.text_field} for path in options.inputs]
    data, problems = validate_section(DataConfig, {"sources": sources, "lanes": 1}, "data")
    if problems:
        raise ConfigError(problems)
    return data, options.eos_token or "<|endoftext|>", {}
