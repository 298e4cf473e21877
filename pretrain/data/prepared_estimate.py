"""What prepared sources hold: counted where their index or header says it, and not estimated from their text.

The index of a prepared folder has documents, bytes and tokens. The header of a `.bin` shard has the tokens only;
documents and bytes are estimated from some of its units, as ratios to the tokens.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from pretrain.data.described import CatalogSource
from pretrain.data.prepared.layout import load_index
from pretrain.data.prepared.reading import read_runs
from pretrain.data.prepared.speedrun import SUFFIX
from pretrain.data.quantity import Quantity, SourceEstimate, spread
from pretrain.data.tokenizer import token_bytes
from pretrain.data.units import Unit

_EXAMPLE_TOKENS = 300
_DECODED = 64
"""Documents of the sample that are decoded."""


def estimate_prepared(
    found: CatalogSource,
    units: Sequence[Unit],
    tokenizer: Tokenizer,
    read_bytes: int,
    examples: int,
    chooser: random.Random,
) -> SourceEstimate:
    """Describe a source of prepared data.

    Args:
        found: the source.
        units: its read units, undivided.
        tokenizer: the one that its tokens were made with.
        read_bytes: how much of the tokens is read, for what is not counted; at least one unit.
        examples: documents to return.
        chooser: chooses the units.

    Raises:
        DataError: it is missing or damaged.

    """
    sample = _read(found, units, tokenizer, read_bytes, chooser)
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in sample.decoded]
    if found.path.endswith(SUFFIX):
        tokens = sum(unit.rows or 0 for unit in units)
        documents = sample.total([count for count, _, _ in sample.units], tokens, len(units))
        text_bytes = sample.total([size for _, size, _ in sample.units], tokens, len(units))
        characters = sum(map(len, texts)) / max(1, sum(map(len, sample.decoded)))
        how = f"tokens: counted, in the headers; sampled: the rest, from {len(sample.units)} of {len(units)} units"
    else:
        index = load_index(found.path)
        tokens = index.tokens
        documents, text_bytes = Quantity(float(index.documents)), Quantity(float(index.text_bytes))
        characters = index.characters / max(1, index.tokens - index.documents)
        how = "counted, in the index of the prepared folder"
    return SourceEstimate(
        path=found.path,
        files=len(found.files),
        bytes=found.bytes,
        licences=found.licences,
        how=(how,),
        documents=documents,
        text_bytes=text_bytes,
        tokens=Quantity(float(tokens)),
        bytes_per_token=text_bytes.value / max(1.0, tokens - documents.value),
        characters_per_token=characters,
        sampled_documents=sample.documents,
        empty=0.0,
        repeated=sample.repeated / max(1, sample.documents),
        examples=tuple(chooser.sample(texts, min(examples, len(texts)))),
        problems=(),
    )


@dataclass
class _Sample:
    """What was read of some units."""

    units: list[tuple[int, int, int]] = field(default_factory=list)
    """Documents, bytes of text and tokens of each."""
    repeated: int = 0
    """Documents whose tokens occurred in the sample before."""
    decoded: list[list[int]] = field(default_factory=list)
    """The first tokens of some documents."""

    @property
    def documents(self) -> int:
        return sum(count for count, _, _ in self.units)

    def total(self, counts: Sequence[int], tokens: int, all_units: int) -> Quantity:
        """Return the sum of a count over all units, which hold so many tokens."""
        read = sum(size for _, _, size in self.units)
        if len(counts) == all_units:
            return Quantity(float(sum(counts)))
        ratio = sum(counts) / max(1, read)
        if len(counts) > 1:
            residuals = [(count - ratio * size) / read for count, (_, _, size) in zip(counts, self.units, strict=True)]
            error = spread(residuals) * (1 - len(counts) / all_units) ** 0.5
        else:
            error = ratio / max(1, self.documents) ** 0.5
        return Quantity(ratio * tokens, error * tokens)


def _read(
    found: CatalogSource, units: Sequence[Unit], tokenizer: Tokenizer, read_bytes: int, chooser: random.Random
) -> _Sample:
    """Read random units until that is `read_bytes`."""
    eos_id = found.tokenizer.eos_id if found.tokenizer else 0
    sample, seen, read = _Sample(), set[bytes](), 0
    for unit in chooser.sample(list(units), len(units)):
        if read >= read_bytes:
            break
        documents = text_bytes = tokens = 0
        for run in read_runs(unit, 0, 0.0, "train", lambda: token_bytes(tokenizer, eos_id)):
            for begin, end in zip([0, *run.ends[:-1]], run.ends, strict=True):
                ids = run.tokens[begin : end - 1]
                digest = hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
                sample.repeated += digest in seen
                seen.add(digest)
                if len(sample.decoded) < _DECODED:
                    sample.decoded.append(ids[:_EXAMPLE_TOKENS].tolist())
            documents, text_bytes = documents + len(run.ends), text_bytes + run.sizes[-1]
            tokens += len(run.tokens)
            read += run.tokens.nbytes
        sample.units.append((documents, text_bytes, tokens))
    return sample
