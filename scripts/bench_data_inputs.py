"""Text for the benchmarks of the data pipeline: documents put together from paragraphs of the vendored books."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

_CORPUS = Path(__file__).parents[1] / "assets" / "corpus"
_ROWS_PER_GROUP = 1000
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")


def documents(megabytes: float, seed: int = 0) -> Iterator[str]:
    """Yield about this much text in documents of 1 to 12 paragraphs, which are drawn at random."""
    chooser = random.Random(seed)
    paragraphs = [
        paragraph
        for path in sorted(_CORPUS.glob("*.parquet"))
        for text in pq.read_table(path, columns=["text"])["text"].to_pylist()
        for paragraph in text.split("\n\n")
        if len(paragraph) > 100
    ]
    left = megabytes * 1e6
    while left > 0:
        text = "\n\n".join(chooser.choices(paragraphs, k=chooser.randint(1, 12)))
        left -= len(text.encode())
        yield text


def write_files(folder: Path, suffix: str, megabytes: float, files: int, seed: int = 0) -> Path:
    """Write about `megabytes` of text into `files` files of one format; return the folder."""
    folder.mkdir(parents=True)
    for number in range(files):
        texts = documents(megabytes / files, seed + number)
        path = folder / f"{number:05}{suffix}"
        if suffix == ".parquet":
            _write_parquet(path, texts)
        else:
            lines = (json.dumps({"text": text}).encode() + b"\n" for text in texts)
            with path.open("wb") as raw:
                if suffix.endswith(".gz"):
                    with gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=1) as packed:
                        packed.writelines(lines)
                elif suffix.endswith(".zst"):
                    with zstandard.ZstdCompressor().stream_writer(raw) as packed:
                        for line in lines:
                            packed.write(line)
                else:
                    raw.writelines(lines)
    return folder


def _write_parquet(path: Path, texts: Iterator[str]) -> None:
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        waiting: list[str] = []
        for text in texts:
            waiting.append(text)
            if len(waiting) == _ROWS_PER_GROUP:
                writer.write_table(pa.table({"text": waiting}, schema))
                waiting = []
        if waiting:
            writer.write_table(pa.table({"text": waiting}, schema))
