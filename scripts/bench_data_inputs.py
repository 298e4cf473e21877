"""Text for the benchmarks of the data pipeline, put together from paragraphs of the vendored books."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

_CORPUS = Path(__file__).parents[1] / "assets" / "corpus"


def documents(megabytes: float, seed: int = 0) -> Iterator[str]:
    """Yield about this much text in documents of the lengths of web pages.

    Lengths are log-normal with a median of 2,000 characters and a mean of about 3,700, at most 100,000. A document is
    put together from paragraphs that are drawn at random, and cut at its length.
    """
    chooser = random.Random(seed)
    paragraphs = _paragraphs()
    left = megabytes * 1e6
    while left > 0:
        length = min(100_000, int(chooser.lognormvariate(math.log(2000), 1.1)) + 1)
        parts: list[str] = []
        while length > 0:
            parts.append(chooser.choice(paragraphs)[:length])
            length -= len(parts[-1]) + 2
        text = "\n\n".join(parts)
        left -= len(text.encode())
        yield text


@lru_cache(maxsize=1)
def _paragraphs() -> list[str]:
    return [
        paragraph
        for path in sorted(_CORPUS.glob("*.parquet"))
        for text in pq.read_table(path, columns=["text"])["text"].to_pylist()
        for paragraph in text.split("\n\n")
        if len(paragraph) > 100
    ]


def write_files(folder: Path, suffix: str, megabytes: float, files: int, rows_per_group: int = 1000) -> Path:
    """Write about `megabytes` of text into `files` files of one format; return the folder."""
    folder.mkdir(parents=True)
    for number in range(files):
        texts = documents(megabytes / files, number)
        path = folder / f"{number:05}{suffix}"
        if suffix == ".parquet":
            _write_parquet(path, texts, rows_per_group)
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


def _write_parquet(path: Path, texts: Iterator[str], rows_per_group: int) -> None:
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        waiting: list[str] = []
        for text in texts:
            waiting.append(text)
            if len(waiting) == rows_per_group:
                writer.write_table(pa.table({"text": waiting}, schema))
                waiting = []
        if waiting:
            writer.write_table(pa.table({"text": waiting}, schema))
