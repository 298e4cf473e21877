"""Parts: the tokens of consecutive read units, each written by a single worker.

    00000.tokens               token ids of all documents, each followed by the separator
    00000.bad.json             the rows that were skipped, if there are any
    00000.npz                  written last: `PartTable`, and the number of documents of each read unit

A part whose table exists is complete. Parts are an intermediate form, from which `assembly` makes the shards.
"""

import hashlib
import json
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.config.data import TokenizerConfig
from pretrain.data.bad_rows import BadRow, BadRowBudget
from pretrain.data.errors import DataError
from pretrain.data.formats import read_unit
from pretrain.data.reading import REFILL_BYTES
from pretrain.data.sources.retries import set_patience
from pretrain.data.split import Hashes, text_hash
from pretrain.data.tokenizer import DocumentEncoder
from pretrain.data.units import Unit
from pretrain.files import replace_text, replacing

_READ_AHEAD_BYTES = 4 << 20
_PARENT_SECONDS = 0.2
"""How often a worker looks for its parent."""


@dataclass(frozen=True, slots=True)
class Part:
    """The work that makes a part. Can be pickled."""

    number: int
    """Among the parts of all sources."""
    source: int
    units: tuple[Unit, ...]
    bytes: int
    """Size of what the units cover of their files; an estimate."""


class PartTable(NamedTuple):
    """The documents of a part, without those that have no tokens; the first five are arrays [documents]."""

    tokens: npt.NDArray[np.uint64]
    """Including the separator."""
    text_bytes: npt.NDArray[np.uint64]
    characters: npt.NDArray[np.uint64]
    hashes: Hashes
    """`text_hash`."""
    keys: Hashes
    """A second hash of the text; texts with the same two hashes count as equal."""
    units: npt.NDArray[np.uint64]
    """[read units], the number of documents of each."""


@dataclass(frozen=True)
class Encoding:
    """How parts are made; the same for all of them. Can be pickled."""

    folder: Path
    tokenizer: TokenizerConfig
    dtype: str
    max_bad_rows: int = 0
    """Bad rows that may be skipped in all parts together; one more is an error."""

    def tokens_file(self, part: int) -> Path:
        """Path of the tokens of a part."""
        return self.folder / f"{part:05d}.tokens"

    def table_file(self, part: int) -> Path:
        """Path of the table of a part, whose existence shows that the part is complete."""
        return self.folder / f"{part:05d}.npz"

    def bad_rows_file(self, part: int) -> Path:
        """Path of the list of the rows of a part that were skipped; there is no file if there are none."""
        return self.folder / f"{part:05d}.bad.json"

    def bad_rows(self, part: int) -> list[BadRow]:
        """Load the rows of a complete part that were skipped."""
        file = self.bad_rows_file(part)
        return [BadRow(**row) for row in json.loads(file.read_bytes())] if file.is_file() else []

    def table(self, part: int) -> PartTable:
        """Load the table of a part."""
        with np.load(self.table_file(part)) as arrays:
            return PartTable(**{name: arrays[name] for name in PartTable._fields})


def write_part(part: Part, encoding: Encoding, encoder: DocumentEncoder, spent: int = 0) -> None:
    """Write a part.

    Args:
        part: what to read.
        encoding: how and where to.
        encoder: the tokenizer.
        spent: bad rows that were skipped in other parts.

    Raises:
        DataError: see `read_unit` and `DocumentEncoder.encode`; or there are too many bad rows.

    """
    columns: tuple[list[int], ...] = ([], [], [], [], [])
    units: list[int] = []
    budget = BadRowBudget(encoding.max_bad_rows, spent)
    skipped: list[BadRow] = []
    with replacing(encoding.tokens_file(part.number)) as partial, partial.open("wb") as file:
        for unit in part.units:
            before = len(columns[0])
            with closing(_batches(unit, budget, skipped)) as batches:
                for texts in batches:
                    _append(file, texts, columns, encoding.dtype, encoder)
            units.append(len(columns[0]) - before)
        file.flush()
    if skipped:
        replace_text(encoding.bad_rows_file(part.number), json.dumps([asdict(row) for row in skipped]))
    table = PartTable(*(np.array(column, np.uint64) for column in (*columns, units)))
    with replacing(encoding.table_file(part.number)) as partial, partial.open("wb") as file:
        np.savez(file, **table._asdict())


def _batches(unit: Unit, budget: BadRowBudget, skipped: list[BadRow]) -> Generator[list[str]]:
    """Yield the texts of a unit, about `REFILL_BYTES` at a time; add its bad rows to `skipped`."""
    texts: list[str] = []
    size = 0
    for _, text in read_unit(unit, 0, _READ_AHEAD_BYTES):
        if isinstance(text, BadRow):
            budget.spend(text)
            skipped.append(text)
        elif text:
            texts.append(text)
            size += len(text)
        if size >= REFILL_BYTES:
            yield texts
            texts, size = [], 0
    yield texts


def _append(
    file: IO[bytes], texts: list[str], columns: tuple[list[int], ...], dtype: str, encoder: DocumentEncoder
) -> None:
    for text, tokens in zip(texts, encoder.encode(texts), strict=True):
        if len(tokens) == 1:
            continue  # as in a stream of text, a text without tokens is left out
        encoded = text.encode()
        key = int.from_bytes(hashlib.blake2b(encoded, digest_size=8, person=b"duplicates").digest(), "big")
        facts = (len(tokens), len(encoded), len(text), text_hash(encoded), key)
        for column, value in zip(columns, facts, strict=True):
            column.append(value)
        file.write(tokens.astype(dtype).data)


def main() -> None:
    """Run a worker: read the encoding, how long to wait for servers, and then parts, each with the bad
    rows of others, from standard input.

    Each part is answered with None, or with its error.

    The worker ends when its parent does, even while it waits for a server.
    """
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the main process decides when to stop
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output of libraries must not end up among the answers

    def send(answer: object) -> None:
        pickle.dump(answer, pipe)
        pipe.flush()

    try:
        encoding: Encoding
        encoding, limits = pickle.load(sys.stdin.buffer)
        set_patience(limits)
        encoder = DocumentEncoder.load(encoding.tokenizer)
        while True:
            part: Part
            part, spent = pickle.load(sys.stdin.buffer)
            try:
                write_part(part, encoding, encoder, spent)
                send(None)
            except (DataError, OSError) as error:
                if isinstance(error, BrokenPipeError):
                    raise
                send(error)
    except (EOFError, BrokenPipeError):
        os._exit(0)  # there is no more work, or nobody who wants it


def _end_with(parent: int) -> None:
    """End this process once its parent has ended."""
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    os._exit(0)
