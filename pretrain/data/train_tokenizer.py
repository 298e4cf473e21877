"""Train a byte-level BPE tokenizer on a sample of the sources."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pretrain.config.data import DataConfig
from pretrain.data.bad_rows import BadRow, BadRowBudget
from pretrain.data.catalog import Locked, make_catalog
from pretrain.data.errors import DataError
from pretrain.data.formats import read_unit
from pretrain.data.units import Unit
from pretrain.files import replacing

SMALLEST_VOCABULARY = 257
"""A token for each byte, and the separator."""
_READ_AHEAD_BYTES = 1 << 20


def sample_texts(config: DataConfig, sample_bytes: int, seed: int, locked: Locked | None = None) -> Iterator[str]:
    """Yield texts of about `sample_bytes` in all: the beginnings of read units, in a seeded order.

    The sample is the same on every machine. Each source gives its share of the mixture, of the first stage if there are
    stages. Within a source, every unit gives an equal part, or more if others are shorter; so do the units of all
    sources together if there is no mixture.

    Args:
        config: the sources.
        sample_bytes: UTF-8 bytes of text.
        seed: of the order of the units.
        locked: the remote sources; those that are absent are resolved here.

    Raises:
        DataError: a source cannot be read, holds tokens instead of text, or too many bad rows.

    """
    catalog = make_catalog(config, locked)
    if done := [source.path for source in catalog.sources if source.tokenizer]:
        raise DataError("\n".join(f"{path}: holds tokens, not text" for path in done))
    units = [
        (source, number, unit) for source, of in enumerate(catalog.units(config)) for number, unit in enumerate(of)
    ]
    units.sort(key=lambda entry: hashlib.blake2b(repr((seed, *entry[:2])).encode(), digest_size=16).digest())
    mixture = config.stages[0].mixture if config.stages else config.mixture
    budget = BadRowBudget(config.max_bad_rows)
    if mixture is None:
        yield from _spread([unit for _, _, unit in units], sample_bytes, budget)
        return
    for index, name in enumerate(config.names):
        share = mixture.get(name, 0) / sum(mixture.values())
        yield from _spread([unit for source, _, unit in units if source == index], int(share * sample_bytes), budget)


def _spread(units: Sequence[Unit], left: int, budget: BadRowBudget) -> Iterator[str]:
    """Yield texts of `left` bytes from the beginnings of the units, in order."""
    for index, unit in enumerate(units):
        if left <= 0:
            return
        share = -(-left // (len(units) - index))
        for text in _beginning(unit, share, budget):
            left -= len(text.encode())
            yield text


def _beginning(unit: Unit, size: int, budget: BadRowBudget) -> Iterator[str]:
    """Yield the first texts of a unit, `size` bytes in all; the last one is cut short."""
    with closing(read_unit(unit, 0, _READ_AHEAD_BYTES)) as rows:  # type: ignore[type-var]
        for _, text in rows:
            if size <= 0:
                return
            if isinstance(text, BadRow):
                budget.spend(text)
                continue
            encoded = text.encode()
            yield text if len(encoded) <= size else encoded[:size].decode(errors="ignore")
            size -= len(encoded)


def train_tokenizer(texts: Iterator[str], vocab_size: int, eos_token: str) -> Tokenizer:
    """Train a byte-level BPE, which knows every text; the same texts give the same tokenizer.

    Args:
        texts: the sample.
        vocab_size: entries wanted, including the separator; fewer if the sample has no more pairs to merge.
        eos_token: the separator, which becomes token 0 and is marked special.

    Raises:
        DataError: the vocabulary would be too small, or the sample is empty.

    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"--vocab-size is {vocab_size}, expected at least {SMALLEST_VOCABULARY}: each byte needs a token"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos_token],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    first = next((text for text in texts if text), None)
    if first is None:
        raise DataError("the sources hold no text to train a tokenizer on")
    # A text that spells the separator must not make it a token of the model.
    tokenizer.train_from_iterator((text.replace(eos_token, " ") for text in _chain(first, texts)), trainer)
    return tokenizer


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def refuse_existing(path: Path) -> None:
    """Refuse to overwrite a file: without its tokenizer, a run is useless.

    Raises:
        DataError: the file exists.

    """
    if path.exists():
        raise DataError(f"{path}: exists already; choose another file for --to, or delete it")


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write a `tokenizer.json`.

    Raises:
        DataError: the file exists.

    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
