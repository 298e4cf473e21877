"""How much text the sources hold, estimated from a sample, and how often a run reads each of them.

Prepared data is counted instead (`pretrain.data.prepared_estimate`). For text, the tokens of a source are

    text bytes x tokens per text byte + documents        (each document is followed by a separator)

Text bytes and documents are ratio estimates from windows at random places (`pretrain.data.sampling`), tokens per byte
comes from random pieces of the texts of these windows. Standard errors are those of a ratio estimated from clusters,
one cluster a window, with the correction for a finite population (Cochran, "Sampling Techniques", 3rd edition, sections
6.3 and 9A.2). Cutting pieces out of words adds about 0.1 % to the tokens, which the error does not include.
"""

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from pretrain.config.data import DataConfig
from pretrain.data.catalog import Catalog
from pretrain.data.described import CatalogSource
from pretrain.data.prepared_estimate import estimate_prepared
from pretrain.data.quantity import Quantity, SourceEstimate, spread
from pretrain.data.sampling import Stratum, sample_source, undivided_units
from pretrain.data.text_count import TextCount
from pretrain.data.units import Unit

_PIECE = 4096
"""Characters of a piece of text that is tokenized; the pieces of a sample are spread over it."""
_EXAMPLE = 1000
"""Characters of a document that are kept as an example."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is read for an estimate, per source. Bounds the time, whatever the size of the data."""

    read_bytes: int
    """Text that is read."""
    tokenized_bytes: int
    """Text of that which is tokenized, at one to two MB a second on a core."""
    windows: int
    """Places that are read at, per kind of file."""
    examples: int = 0
    """Documents that are kept."""


AT_START = Effort(read_bytes=4 << 20, tokenized_bytes=128 << 10, windows=24)
"""For `aurora check` and the start of a run: about 0.2 seconds per source."""
TO_INSPECT = Effort(read_bytes=64 << 20, tokenized_bytes=4 << 20, windows=128, examples=5)
"""For `aurora data inspect`: a few seconds per source."""


def estimate_sources(
    config: DataConfig, catalog: Catalog, tokenizer: Tokenizer, effort: Effort, seed: int = 0
) -> list[SourceEstimate]:
    """Estimate every source of a config.

    Args:
        config: the sources.
        catalog: their files.
        tokenizer: counts the tokens of the sample.
        effort: how much is read.
        seed: of the choice of the sample; the same sample is chosen on every machine.

    Raises:
        DataError: prepared data is missing or damaged. What cannot be read of text is a problem of the estimate.

    """
    units = undivided_units(config, catalog)
    return [
        _estimate(found, of_source, tokenizer, effort, f"{seed} {index}")
        for index, (found, of_source) in enumerate(zip(catalog.sources, units, strict=True))
    ]


def source_tokens(
    config: DataConfig, catalog: Catalog, tokenizer: Tokenizer, counts: Mapping[int, TextCount]
) -> list[Quantity]:
    """Return the tokens of each source of a run, of both splits.

    Args:
        config: the sources.
        catalog: their files.
        tokenizer: of the run.
        counts: what `pretrain.data.check.survey` counted of the sources that it has read in full, by their index; only
            of the others is a sample read.

    """
    units = undivided_units(config, catalog)
    return [
        counts[index].tokens(tokenizer)
        if index in counts
        else _estimate(found, of_source, tokenizer, AT_START, f"0 {index}").tokens
        for index, (found, of_source) in enumerate(zip(catalog.sources, units, strict=True))
    ]


@dataclass(frozen=True, slots=True)
class _Tally:
    """The counts of one sample."""

    weight: float
    size: int
    documents: int
    text_bytes: int
    squares: int
    """Sum of the squares of the documents' bytes."""
    pieces: tuple[tuple[int, int], ...]
    """(bytes, tokens) of each tokenized piece."""

    @property
    def piece_bytes(self) -> int:
        return sum(size for size, _ in self.pieces)

    @property
    def tokens_per_byte(self) -> float:
        return sum(tokens for _, tokens in self.pieces) / max(1, self.piece_bytes)


class _Seen:
    """What is counted over all samples of a source, whatever their weight."""

    def __init__(self) -> None:
        self.rows = self.empty = self.repeated = 0
        self.tokenized_characters = self.tokenized_bytes = self.tokens = 0
        self.firsts: list[str] = []
        """The beginning of the first two documents of each sample."""
        self._hashes: set[bytes] = set()

    def add(self, texts: Sequence[str]) -> None:
        """Count the rows, the empty ones and the repeated texts of a sample."""
        filled = [text for text in texts if text.strip()]
        self.rows += len(texts)
        self.empty += len(texts) - len(filled)
        self.firsts += [text[:_EXAMPLE] for text in filled[:2]]
        for text in filled:
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            self.repeated += digest in self._hashes
            self._hashes.add(digest)


def _estimate(
    found: CatalogSource, units: Sequence[Unit], tokenizer: Tokenizer, effort: Effort, seed: str
) -> SourceEstimate:
    chooser = random.Random(seed)
    if found.tokenizer is not None:
        return estimate_prepared(found, units, tokenizer, effort.read_bytes, effort.examples, chooser)
    strata, problems = sample_source(units, effort.read_bytes, effort.windows, chooser.getrandbits(64))
    seen = _Seen()
    samples = sum(len(stratum.samples) for stratum in strata)
    room = effort.tokenized_bytes // max(1, samples)
    parts = [_estimate_stratum(stratum, tokenizer, room, chooser, seen) for stratum in strata]
    documents, text_bytes, tokens = (_sum([part[index] for part in parts]) for index in range(3))
    filled = seen.rows - seen.empty
    return SourceEstimate(
        path=found.path,
        files=len(found.files),
        bytes=sum(file.bytes for file in found.files),
        licences=found.licences,
        how=tuple(stratum.how for stratum in strata),
        documents=documents,
        text_bytes=text_bytes,
        tokens=tokens,
        bytes_per_token=seen.tokenized_bytes / max(1, seen.tokens),
        characters_per_token=seen.tokenized_characters / max(1, seen.tokens),
        sampled_documents=filled,
        empty=seen.empty / max(1, seen.rows),
        repeated=seen.repeated / max(1, filled),
        examples=tuple(chooser.sample(seen.firsts, min(effort.examples, len(seen.firsts)))),
        problems=tuple(problems),
    )


def _sum(parts: Sequence[Quantity]) -> Quantity:
    return Quantity(sum(part.value for part in parts), math.hypot(*(part.error for part in parts)))


def _estimate_stratum(
    stratum: Stratum, tokenizer: Tokenizer, room: int, chooser: random.Random, seen: _Seen
) -> tuple[Quantity, Quantity, Quantity]:
    """Documents, text bytes and tokens of the files of one kind."""
    tallies = []
    for sample in stratum.samples:
        seen.add(sample.texts)
        sizes = [len(text.encode()) for text in sample.texts]
        pieces = _tokenized(sample.texts, sum(sizes), tokenizer, room, chooser, seen)
        filled, squares = sum(size > 0 for size in sizes), sum(size**2 for size in sizes)
        tallies.append(_Tally(sample.weight, sample.size, filled, sum(sizes), squares, pieces))
    if not tallies:
        return Quantity(0.0), Quantity(0.0), Quantity(0.0)
    documents = _total(stratum, tallies, lambda tally: tally.documents)
    text_bytes = _total(stratum, tallies, lambda tally: tally.text_bytes)
    rate = _rate(stratum, tallies)
    error = math.hypot(rate.value * text_bytes.error, rate.error * text_bytes.value, documents.error)
    return documents, text_bytes, Quantity(rate.value * text_bytes.value + documents.value, error)


def _tokenized(
    texts: Sequence[str], total_bytes: int, tokenizer: Tokenizer, room: int, chooser: random.Random, seen: _Seen
) -> tuple[tuple[int, int], ...]:
    """(bytes, tokens) of all texts if there is room for them, or of pieces spread over them."""
    if total_bytes <= room:
        pieces = [text for text in texts if text]
    else:
        pieces = _pieces(texts, max(1, room // _PIECE), min(_PIECE, max(256, room)), chooser)
    if not pieces:
        return ()
    encodings = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
    counted = tuple((len(text.encode()), len(one.ids)) for text, one in zip(pieces, encodings, strict=True))
    seen.tokenized_characters += sum(map(len, pieces))
    seen.tokenized_bytes += sum(size for size, _ in counted)
    seen.tokens += sum(tokens for _, tokens in counted)
    return counted


def _pieces(texts: Sequence[str], count: int, length: int, chooser: random.Random) -> list[str]:
    """At most `count` pieces from random places of the texts, which are laid end to end and divided evenly."""
    total = sum(map(len, texts))
    places = [chooser.randrange(total * at // count, max(total * at // count + 1, total * (at + 1) // count))
              for at in range(count)]  # fmt: skip
    found, begin, index = [], 0, 0
    for text in texts:
        while index < len(places) and places[index] < begin + len(text):
            offset = min(places[index] - begin, max(0, len(text) - length))
            found.append(text[offset : offset + length])
            index += 1
        begin += len(text)
    return found


def _total(stratum: Stratum, tallies: Sequence[_Tally], count: Callable[[_Tally], int]) -> Quantity:
    """The sum of a count over the whole stratum."""
    size = sum(tally.weight * tally.size for tally in tallies)
    ratio = sum(tally.weight * count(tally) for tally in tallies) / size
    value = ratio * stratum.size
    if stratum.whole:
        return Quantity(value)
    residuals = [tally.weight * (count(tally) - ratio * tally.size) / size for tally in tallies]
    left = max(0.0, 1 - sum(tally.size for tally in tallies) / stratum.size)
    error = spread(residuals) if len(tallies) > 1 else ratio * _between_documents(tallies[0])
    return Quantity(value, stratum.size * error * math.sqrt(left))


def _between_documents(tally: _Tally) -> float:
    """The relative error of a mean over the documents of a single place, which says nothing about other places."""
    if tally.documents < 2:
        return 1.0
    variance = tally.squares * tally.documents / tally.text_bytes**2 - 1
    return math.sqrt(max(0.0, variance) / (tally.documents - 1))


def _rate(stratum: Stratum, tallies: Sequence[_Tally]) -> Quantity:
    """Tokens per byte of text."""
    tallies = [tally for tally in tallies if tally.piece_bytes]
    text_bytes = sum(tally.weight * tally.text_bytes for tally in tallies)
    if not text_bytes:
        return Quantity(0.0)
    rate = sum(tally.weight * tally.text_bytes * tally.tokens_per_byte for tally in tallies) / text_bytes
    complete = all(tally.piece_bytes == tally.text_bytes for tally in tallies)
    if stratum.whole and complete:
        return Quantity(rate)
    if len(tallies) > 1:
        parts = [tally.weight * tally.text_bytes * (tally.tokens_per_byte - rate) / text_bytes for tally in tallies]
    else:
        total = tallies[0].piece_bytes
        parts = [(tokens - rate * size) / total for size, tokens in tallies[0].pieces]
    return Quantity(rate, spread(parts) if len(parts) > 1 else rate / 10)
