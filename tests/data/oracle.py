"""The stream once more, slowly and from its definition alone: one process, everything in memory, token by token.

Only the order in which an epoch's units are dealt is taken from the package; its own properties are tested apart.
"""

import hashlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pyarrow.parquet as pq
from tokenizers import Tokenizer

from pretrain.data.order import epoch_order
from pretrain.data.units import Unit
from tests.data.corpus import Setting, read_jsonl, source_units

Row = tuple[list[int], int]


def unit_texts(unit: Unit) -> list[str]:
    if unit.row_group is None:
        rows = read_jsonl(Path(unit.file.path))
    else:
        rows = pq.ParquetFile(unit.file.path).read_row_group(unit.row_group).to_pylist()
    return [row[unit.recipe.text_field] for row in rows[unit.part :: unit.parts]]


def in_validation(text: str, fraction: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < fraction


def ring_texts(setting: Setting, index: int | None, epoch: int) -> list[list[str]]:
    """The documents of each lane of a source; of all sources together if `index` is None, as for validation."""
    config, validation = setting.config, setting.split == "validation"
    units = {i: source_units(source) for i, source in enumerate(config.sources) if index in (i, None)}
    count = 1 if validation else min(config.lanes, sum(map(len, units.values())))
    lanes: list[list[str]] = [[] for _ in range(count)]
    for number, unit in enumerate(epoch_order(units, 0 if validation else config.seed, epoch)):
        lanes[number % len(lanes)] += [
            text for text in unit_texts(unit) if in_validation(text, config.validation_fraction) == validation
        ]
    return lanes


def epoch_texts(setting: Setting, epoch: int) -> list[list[str]]:
    """The documents of each lane, without a mixture or of the validation split."""
    return ring_texts(setting, None, epoch)


class Source:
    """The sequences of one source, one after the other."""

    def __init__(self, setting: Setting, index: int | None, epochs: int | None) -> None:
        self.setting, self.index, self.epochs = setting, index, epochs
        self.tokenizer = Tokenizer.from_file(setting.tokenizer.path)
        self.tokenizer.encode_special_tokens = True
        self.eos = self.tokenizer.token_to_id(setting.tokenizer.eos_token)
        self.sequences = self.read()

    def read(self) -> Iterator[Row]:
        length, epoch = self.setting.sequence_length, 0
        lines = [[self.eos] for _ in ring_texts(self.setting, self.index, 0)]  # all tokens up to the end of the epoch
        targets = [0] * len(lines)  # how many of them were targets
        while epoch != self.epochs:
            for line, texts in zip(lines, ring_texts(self.setting, self.index, epoch), strict=True):
                for text in texts:
                    if text:
                        line += [*self.tokenizer.encode(text, add_special_tokens=False).ids, self.eos]
            epoch += 1
            active = list(range(len(lines)))
            while active:
                staying = []
                for lane in active:
                    left = len(lines[lane]) - 1 - targets[lane]
                    if left < length and not (epoch == self.epochs and left):
                        continue
                    valid = min(left, length)
                    window = lines[lane][targets[lane] : targets[lane] + valid + 1]
                    targets[lane] += valid
                    staying.append(lane)
                    yield window + [self.eos] * (length - valid), valid
                active = staying


def share_of(setting: Setting, sequence: int) -> tuple[int, dict[int, Fraction]]:
    """The stage that the sequence with this number belongs to, and the shares of the sources in it."""
    config, names = setting.config, setting.config.names
    if config.mixture is not None:
        return 0, {names.index(name): Fraction(str(share)) for name, share in config.mixture.items()}
    assert config.stages is not None
    tokens = sequence * setting.sequence_length
    number, stage = next(
        (number, stage)
        for number, stage in enumerate(config.stages)
        if stage.until_tokens is None or tokens < stage.until_tokens
    )
    return number, {names.index(name): Fraction(str(share)) for name, share in stage.mixture.items() if share}


def choose(given: dict[int, int], shares: dict[int, Fraction]) -> int:
    """Tijdeman's rule from its definition: the source that must give a sequence soonest, among those that may."""
    step, total = sum(given.values()) + 1, sum(shares.values())
    if len(shares) == 1:
        return next(iter(shares))
    slack = Fraction(1, 2 * len(shares) - 2)
    best: tuple[int, int] | None = None
    for source in sorted(shares):
        share = shares[source] / total
        if given[source] > share * step - slack:
            continue
        deadline = step
        while share * deadline - given[source] <= 1 - slack and (best is None or deadline < best[0]):
            deadline += 1
        if best is None or deadline < best[0]:
            best = (deadline, source)
    assert best is not None
    return best[1]


def oracle_dealt(setting: Setting) -> Iterator[tuple[int, Row]]:
    """The source and the (tokens, valid targets) of every sequence, in order."""
    if setting.split == "validation":
        yield from ((0, row) for row in Source(setting, None, 1).sequences)
        return
    if setting.config.mixture is None and setting.config.stages is None:
        given = setting.config.epoch_limits
        limit = None if None in given else max(limit for limit in given if limit is not None)
        yield from ((0, row) for row in Source(setting, None, setting.epochs or limit).sequences)
        return
    limits = [setting.epochs or limit for limit in setting.config.epoch_limits]
    sources = [Source(setting, index, limit) for index, limit in enumerate(limits)]
    ended: set[int] = set()
    stage, number, counts = -1, 0, dict.fromkeys(range(len(sources)), 0)
    while True:
        now, shares = share_of(setting, number)
        if now != stage:
            stage, counts = now, dict.fromkeys(counts, 0)
        live = {source: share for source, share in shares.items() if source not in ended}
        if not live:
            return
        source = choose(counts, live)
        row = next(sources[source].sequences, None)
        if row is None:
            ended.add(source)
            counts = dict.fromkeys(counts, 0)
            continue
        counts[source] += 1
        number += 1
        yield source, row


def oracle_rows(setting: Setting) -> list[Row]:
    """(tokens, valid targets) of every sequence of a finite stream, in order."""
    return [row for _, row in oracle_dealt(setting)]
