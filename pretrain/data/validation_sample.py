"""The validation set of remote and prepared sources: a bounded sample of the validation split.

Finding every document of the split would mean reading all text, so a sample is drawn once, when the run begins:

- A source gives its share of `validation.max_tokens`: the share that it has in the tokens of the run, over all stages.
  Its number of files plays no part: in a mix, one source may have nearly all of them.
- Within a source, files and row groups are visited in the order of a keyed hash over all of them, and of each only the
  beginning is read, so that the text comes from many places. About `validation.max_read_mib` are read in all, of which
  each source again has its share. Prepared data says which documents belong to the split without reading the others.
- Of what is read, the documents of the validation split are taken, which is decided by the hash of their text as
  everywhere: none of them is ever trained on.
- If a source that has more text gives less than its share, the others are cut down with it, so that the shares hold;
  sources that have 5 % of the tokens or less between them do not count for that.

Sources that are read to their end give exactly what the stream of the validation split gives, in the same order.
Everything depends on config, data and tokenizer alone: every machine draws the same sample.
"""

import hashlib
import io
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.config.data import DataConfig
from pretrain.data.bad_rows import BadRow, BadRowBudget
from pretrain.data.cache import open_file
from pretrain.data.catalog import Catalog
from pretrain.data.errors import DataError
from pretrain.data.formats import text_file
from pretrain.data.order import epoch_order
from pretrain.data.prepared.reading import holds_tokens, read_runs
from pretrain.data.sources.retries import stopping
from pretrain.data.split import is_validation
from pretrain.data.tokenizer import DocumentEncoder, Tokens, token_bytes
from pretrain.data.units import DataFile, Unit

MAX_UNITS = 256
"""Files or row groups of a text source that are opened at most."""
_SPREAD = 64
"""Places that a source is read at, if it has so many: of each, this part of what may be read of the source."""
_LEAST_BYTES = 64 << 10
_NEGLIGIBLE = 0.05
_CONCURRENT = 8
_BATCH_BYTES = 1 << 20
_BYTES_PER_DOCUMENT = 24  # of the table of a prepared shard


@dataclass(frozen=True, slots=True)
class SampledSource:
    """What one source gave to the sample."""

    name: str
    share: float
    """Of the tokens of the run."""
    tokens: int
    """Targets, separators included."""
    documents: int
    units: int
    """Files or row groups that were read, at least in part."""
    all_units: int
    read_bytes: int
    """Bytes of the files or of their text that were read, whichever is more."""

    def __str__(self) -> str:
        """One line for the start of a run."""
        return (
            f"{self.name}: {self.tokens:,} tokens in {self.documents:,} documents, from {self.units:,} of "
            f"{self.all_units:,} files or row groups"
        )


@dataclass(frozen=True)
class ValidationSample:
    """Packed sequences of the validation split. Can be pickled."""

    tokens: Tokens
    """int32 [sequences, T+1]."""
    lengths: Tokens
    """int32 [sequences]: valid targets; T except in the last one."""
    text_bytes: int
    """UTF-8 bytes of the text whose tokens are targets."""
    sources: tuple[SampledSource, ...]

    @cached_property
    def sha256(self) -> str:
        """Digest of the sequences."""
        digest = hashlib.sha256(repr((self.tokens.shape, self.text_bytes)).encode())
        digest.update(self.tokens.astype("<i4").tobytes())
        digest.update(self.lengths.astype("<i4").tobytes())
        return digest.hexdigest()


def is_sampled(catalog: Catalog) -> bool:
    """Return whether the validation set is a sample: a source is remote or prepared. Local text is read in full."""
    return any(source.pinned is not None or source.tokenizer is not None for source in catalog.sources)


def sample_validation(
    config: DataConfig,
    catalog: Catalog,
    encoder: DocumentEncoder,
    sequence_length: int,
    *,
    shares: Sequence[float],
    max_tokens: int,
    max_bytes: int,
) -> ValidationSample:
    """Draw the validation set of a run.

    Args:
        config: the sources.
        catalog: their files.
        encoder: the tokenizer of the run.
        sequence_length: T, targets per sequence.
        shares: of each source, in any unit; one of 0 is left out. If all are 0, because no sample of the sources found
            any text, they count as equal.
        max_tokens: targets at most, but at least one sequence.
        max_bytes: bytes to read at most, of files or of their text; what each place gives is rounded up to a document.

    Raises:
        DataError: a source cannot be read, or what was read holds no document of the split.

    """
    targets = max(1, max_tokens // sequence_length) * sequence_length
    whole = sum(shares)
    parts = [share / whole if whole else 1 / len(shares) for share in shares]
    units: list[list[tuple[int, Unit]]] = [[] for _ in parts]
    numbered = {
        source: [(source, unit) for unit in of_source] for source, of_source in enumerate(catalog.units(config))
    }
    for rank, (source, unit) in enumerate(epoch_order(numbered, seed=0, epoch=0)):
        units[source].append((rank, unit))
    budget = BadRowBudget(config.max_bad_rows)
    drawn = [
        _Source(own, round(part * targets), int(part * max_bytes), config.validation_fraction, encoder, budget).draw()
        for part, own in zip(parts, units, strict=True)
    ]
    most = _reached(parts, drawn, targets)
    kept = [_first(one.documents, round(part * most)) for part, one in zip(parts, drawn, strict=True)]
    chosen = sorted((document for documents in kept for document in documents), key=lambda document: document.rank)
    if not chosen:
        raise DataError(
            f"none of the {sum(one.read_bytes for one in drawn):,} bytes that were read of {', '.join(config.names)} "
            f"belong to the validation split (data.validation_fraction is {config.validation_fraction}): raise it or "
            "validation.max_read_mib, or set it to 0 and train without validation"
        )
    tokens, lengths = _pack([document.tokens for document in chosen], sequence_length, encoder.eos_id)
    sources = tuple(
        SampledSource(
            name, part, sum(len(d.tokens) for d in own), len(own), one.units_read, len(of_source), one.read_bytes
        )
        for name, part, own, one, of_source in zip(config.names, parts, kept, drawn, units, strict=True)
    )
    return ValidationSample(tokens, lengths, sum(document.text_bytes for document in chosen), sources)


class _Document(NamedTuple):
    """A document of the split."""

    rank: int
    """Of its unit, in the order of all units of all sources."""
    tokens: npt.NDArray[Any]
    """Its tokens and the separator, or the first of them."""
    text_bytes: int


@dataclass
class _Drawn:
    """What was found in one source."""

    documents: list[_Document] = field(default_factory=list)
    tokens: int = 0
    units_read: int = 0
    read_bytes: int = 0
    has_more: bool = False
    """Whether text of the source was left unread."""


class _Part(NamedTuple):
    """The beginning of a unit."""

    texts: list[str]
    """Its documents of the split, in order."""
    bad: list[BadRow]
    read_bytes: int
    complete: bool


@dataclass(frozen=True)
class _Source:
    """Reads one source until it has given enough, or enough of it was read."""

    units: Sequence[tuple[int, Unit]]
    """In the order in which they are visited, each with its rank."""
    wanted: int
    """Tokens."""
    max_bytes: int
    fraction: float
    encoder: DocumentEncoder
    budget: BadRowBudget

    def draw(self) -> _Drawn:
        """Read the source."""
        found = _Drawn()
        if not self.wanted or not self.units:
            return found
        prepared = holds_tokens(self.units[0][1].file.path)
        complete = 0
        with closing(self._prepared_units() if prepared else self._text_units()) as every:
            for documents, read_bytes, whole in every:
                found.documents += documents
                found.tokens += sum(len(document.tokens) for document in documents)
                found.units_read += 1
                found.read_bytes += read_bytes
                complete += whole
                if found.tokens >= self.wanted:
                    break
        found.has_more = complete < len(self.units)
        return found

    def _prepared_units(self) -> Generator[tuple[list[_Document], int, bool]]:
        left = max(_LEAST_BYTES, self.max_bytes)
        for rank, unit in self.units:
            if left <= 0:
                return
            documents, read = [], _BYTES_PER_DOCUMENT * (unit.rows or 0)
            for run in read_runs(unit, 0, self.fraction, "validation", self._token_bytes):
                begins = [0, *run.ends[:-1]]
                for begin, end, before, after in zip(begins, run.ends, run.sizes, run.sizes[1:], strict=False):
                    documents.append(_Document(rank, run.tokens[begin:end], after - before))
                read += run.tokens.nbytes
            left -= read
            yield documents, read, True

    def _token_bytes(self) -> npt.NDArray[np.uint32]:
        return token_bytes(self.encoder.tokenizer, self.encoder.eos_id)

    def _text_units(self) -> Generator[tuple[list[_Document], int, bool]]:
        """Read several units at a time; which ones are read depends on what was found in those before them alone."""
        most = max(_LEAST_BYTES, self.max_bytes // min(_SPREAD, len(self.units)))
        left, rest = self.max_bytes, iter(self.units[:MAX_UNITS])
        waiting: deque[tuple[int, Future[_Part]]] = deque()
        with ThreadPoolExecutor(_CONCURRENT) as pool:
            try:
                while True:
                    while len(waiting) < _CONCURRENT and (left >= most or (not waiting and left > 0)):
                        if (following := next(rest, None)) is None:
                            break
                        left -= most
                        waiting.append((following[0], pool.submit(_read_beginning, following[1], most, self.fraction)))
                    if not waiting:
                        return
                    rank, future = waiting.popleft()
                    part = future.result()
                    left += most - part.read_bytes
                    for bad in part.bad:
                        self.budget.spend(bad)
                    yield self._encoded(rank, part.texts), part.read_bytes, part.complete
            finally:
                with stopping():  # what was read ahead is not wanted, and a server may take long to give it
                    pool.shutdown(cancel_futures=True)

    def _encoded(self, rank: int, texts: list[str]) -> list[_Document]:
        pairs = zip(texts, self.encoder.encode(texts), strict=True)
        # As in the stream, a text without tokens, of which only the separator remains, is left out.
        return [_Document(rank, tokens, len(text.encode())) for text, tokens in pairs if len(tokens) > 1]


def _reached(parts: Sequence[float], drawn: Sequence[_Drawn], targets: int) -> float:
    """Return how many tokens there can be in all if the shares are to hold, at most `targets`.

    A source that was read to its end limits nothing, nor do those that gave the least for their share, up to a total
    share of `_NEGLIGIBLE`: of a rare source a bounded sample may hold a few documents or none.
    """
    passed = 0.0
    limits = [(one.tokens / part, part) for part, one in zip(parts, drawn, strict=True) if part and one.has_more]
    for limit, part in sorted(limits):
        passed += part
        if passed > _NEGLIGIBLE:
            return min(float(targets), limit)
    return float(targets)


class _Beginning(io.RawIOBase):
    """The first bytes of an open file: it ends after `most` of them have been read. Counts what is read."""

    def __init__(self, file: BinaryIO, most: int | None) -> None:
        self._file, self._most = file, most
        self.read_bytes = 0
        self.cut = False
        """Whether something was asked for that lies behind the end."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = len(buffer) if self._most is None else min(len(buffer), self._most - self.read_bytes)
        if left <= 0:
            self.cut = self.cut or bool(self._file.read(1))
            return 0
        data = self._file.read(left)
        buffer[: len(data)] = data
        self.read_bytes += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _read_beginning(unit: Unit, most: int, fraction: float) -> _Part:
    """Read about `most` bytes of a unit, of its file or of its text, and return the documents of the split.

    Of a file with row groups only the text is limited: a column of a row group is read as a whole.
    """
    texts: list[str] = []
    bad: list[BadRow] = []
    size, complete = 0, True
    # Not through the disk cache, which would copy whole files.
    whole = DataFile(unit.file.path, unit.file.bytes, unit.file.etag, unit.file.sha256)
    with open_file(whole) as opened:
        beginning = _Beginning(opened, most if unit.row_group is None else None)
        file = io.BufferedReader(beginning)
        try:
            for _, text in text_file(file, unit.file.path, unit.recipe).rows(unit, 0, min(most, _BATCH_BYTES)):
                if size >= most:  # there is another row
                    complete = False
                    break
                if isinstance(text, BadRow):
                    if not beginning.cut:  # otherwise most likely the row in which the beginning ends
                        bad.append(text)
                    continue
                encoded = text.encode()
                size += len(encoded)
                if encoded and is_validation(encoded, fraction):
                    texts.append(text)
        except DataError:
            if not beginning.cut:
                raise
        finally:
            file.detach()  # or its end would close what is below
    return _Part(texts, bad, max(size, beginning.read_bytes), complete and not beginning.cut)


def _first(documents: Sequence[_Document], tokens: int) -> list[_Document]:
    """Return the documents that begin within the first `tokens` tokens, the last of them cut off there.

    The bytes of a document are spread evenly over its tokens.
    """
    kept = []
    for document in documents:
        if tokens <= 0:
            break
        size = len(document.tokens)
        if size > tokens:
            document = _Document(document.rank, document.tokens[:tokens], document.text_bytes * tokens // size)
        kept.append(document)
        tokens -= size
    return kept


def _pack(documents: Sequence[npt.NDArray[Any]], sequence_length: int, eos_id: int) -> tuple[Tokens, Tokens]:
    """Return the sequences and their numbers of targets, as `pretrain.data.packing` makes them of a single lane."""
    line = np.concatenate([[eos_id], *documents]).astype(np.int32)
    ends = np.cumsum([len(document) for document in documents])
    line[ends[:-1]] = eos_id  # only a document that was cut does not end with it
    targets = len(line) - 1
    count = -(-targets // sequence_length)
    padded = np.full(count * sequence_length + 1, eos_id, dtype=np.int32)
    padded[: len(line)] = line
    places = np.arange(count)[:, None] * sequence_length + np.arange(sequence_length + 1)
    lengths = np.full(count, sequence_length, dtype=np.int32)
    lengths[-1] = targets - (count - 1) * sequence_length
    return padded[places], lengths
