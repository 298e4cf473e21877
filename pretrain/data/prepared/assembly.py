"""Assembly: from parts to the shards of a prepared folder.

Which document goes into which shard follows from the tables of the parts alone, so an interrupted assembly makes the
same shards when it is repeated, and only those that are missing.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.prepared.layout import DOCUMENTS_SUFFIX, TOKENS_SUFFIX, DocumentTable, Shard, map_array
from pretrain.data.prepared.parts import Encoding, PartTable
from pretrain.files import replace_text, replacing

# A read unit with more tokens than this is divided: a lane reads a unit as a whole before it turns to another place.
MOST_UNIT_TOKENS = 1 << 24


@dataclass(frozen=True, slots=True)
class Piece:
    """A unit to be: the documents of a part that it consists of."""

    part: int
    rows: range
    """Documents of the part, including those that are not kept."""
    tokens: int
    """Of those that are kept."""


class Assembly:
    """Makes the shards of one source.

    Args:
        folder: of the shards.
        encoding: of the parts.
        parts: their numbers, in order.
        keep: for each part, which of its documents to keep; None for all.
        shard_tokens: a shard is complete when it holds this many tokens.

    """

    def __init__(
        self,
        folder: Path,
        encoding: Encoding,
        parts: Sequence[int],
        keep: Sequence[npt.NDArray[np.bool_]] | None,
        shard_tokens: int,
    ) -> None:
        self._folder, self._encoding, self._shard_tokens = folder, encoding, shard_tokens
        self._keep = dict(zip(parts, keep, strict=True)) if keep is not None else {}
        self._parts = parts

    def shards(self) -> Iterator[Shard]:
        """Yield the shards in order, writing those that are missing. The tokens of a part are deleted after use."""
        for number, pieces in enumerate(self._plan()):
            name = f"shard-{number:05d}"
            record = self._folder / f"{name}.json"
            if not record.is_file():
                replace_text(record, json.dumps(asdict(self._write(name, pieces))))
            contents = json.loads(record.read_bytes())
            yield Shard(**{**contents, "units": tuple(contents["units"])})
            for part in self._parts[: self._parts.index(pieces[-1].part)]:
                self._encoding.tokens_file(part).unlink(missing_ok=True)

    def _plan(self) -> list[list[Piece]]:
        """Return the pieces of each shard."""
        shards: list[list[Piece]] = []
        tokens = self._shard_tokens
        for part in self._parts:
            for piece in self._pieces(part, self._encoding.table(part)):
                if tokens >= self._shard_tokens and piece.tokens:
                    shards.append([])
                    tokens = 0
                if not shards:
                    shards.append([])
                    tokens = 0
                shards[-1].append(piece)
                tokens += piece.tokens
        return shards

    def _kept(self, part: int, table: PartTable) -> npt.NDArray[np.bool_]:
        return self._keep.get(part, np.ones(len(table.tokens), np.bool_))

    def _pieces(self, part: int, table: PartTable) -> Iterator[Piece]:
        """Yield the units of a part, dividing those that are too large at the borders of documents."""
        most = min(MOST_UNIT_TOKENS, self._shard_tokens)
        kept = np.where(self._kept(part, table), table.tokens, np.uint64(0))
        begin = 0
        for count in table.units.tolist():
            sizes = kept[begin : begin + count]
            before = np.cumsum(sizes) - sizes
            cuts = np.flatnonzero(np.diff(before // np.uint64(most), prepend=np.uint64(0))).tolist()
            borders = [0, *cuts, count]
            for low, high in pairwise(borders):
                yield Piece(part, range(begin + low, begin + high), int(sizes[low:high].sum()))
            begin += count

    def _write(self, name: str, pieces: Sequence[Piece]) -> Shard:
        """Write the files of a shard."""
        digest = hashlib.sha256()
        tables: list[DocumentTable] = []
        with replacing(self._folder / f"{name}{TOKENS_SUFFIX}") as partial, partial.open("wb") as file:
            for part in sorted({piece.part for piece in pieces}):
                table = self._encoding.table(part)
                kept = self._kept(part, table)
                ends = np.cumsum(table.tokens, dtype=np.uint64)
                tokens = map_array(
                    self._encoding.tokens_file(part), self._encoding.dtype, int(ends[-1]) if len(ends) else 0
                )
                for piece in (piece for piece in pieces if piece.part == part):
                    rows = np.arange(piece.rows.start, piece.rows.stop)[kept[piece.rows.start : piece.rows.stop]]
                    tables.append(DocumentTable(table.tokens[rows], table.text_bytes[rows], table.hashes[rows]))
                    for block in _blocks(tokens, ends, rows):
                        digest.update(block)
                        file.write(block)
            file.flush()
        lengths, sizes, hashes = (np.concatenate(column) for column in zip(*tables, strict=True))
        whole = DocumentTable(np.cumsum(lengths, dtype=np.uint64), np.cumsum(sizes, dtype=np.uint64), hashes)
        columns = [np.ascontiguousarray(column, "<u8").data for column in whole]
        with replacing(self._folder / f"{name}{DOCUMENTS_SUFFIX}") as partial:
            partial.write_bytes(b"".join(columns))
        return Shard(
            name=name,
            tokens=int(lengths.sum()),
            documents=len(lengths),
            text_bytes=int(sizes.sum()),
            tokens_sha256=digest.hexdigest(),
            documents_sha256=hashlib.sha256(b"".join(columns)).hexdigest(),
            units=tuple(len(table.ends) for table in tables),
        )


def _blocks(
    tokens: npt.NDArray[Any], ends: npt.NDArray[np.uint64], rows: npt.NDArray[np.int64]
) -> Iterator[memoryview]:
    """Yield the tokens of some documents, consecutive ones together."""
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        if len(run):
            begin = int(ends[run[0] - 1]) if run[0] else 0
            yield tokens[begin : int(ends[run[-1]])].data.cast("B")
