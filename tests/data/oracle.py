"""The stream once more, slowly and from its definition alone: one process, everything in memory, token by token.

Only the order in which an epoch's units are dealt is taken from the package; its own properties are tested apart.
"""

import hashlib
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import pyarrow.parquet as pq
from tokenizers import Tokenizer

from pretrain.data.order import epoch_order
from pretrain.data.units import Unit
from tests.data.corpus import Setting, read_jsonl, source_units


@dataclass
class Lane:
    line: list[int]
    """All tokens up to the end of the current epoch."""
    targets: int = 0
    """How many of them were targets."""
    sequences: list[list[int]] = field(default_factory=list)


def unit_texts(unit: Unit) -> list[str]:
    if unit.row_group is None:
        rows = read_jsonl(Path(unit.file.path))
    else:
        rows = pq.ParquetFile(unit.file.path).read_row_group(unit.row_group).to_pylist()
    return [row[unit.recipe.text_field] for row in rows[unit.part :: unit.parts]]


def in_validation(text: str, fraction: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < fraction


def epoch_texts(setting: Setting, epoch: int) -> list[list[str]]:
    """The documents of each lane."""
    config, validation = setting.config, setting.split == "validation"
    units = tuple(tuple(source_units(source)) for source in config.sources)
    weights = tuple(Fraction(1) if validation else Fraction(str(source.weight)) for source in config.sources)
    order = epoch_order(units, weights, 0 if validation else config.seed, epoch)
    lanes: list[list[str]] = [[] for _ in range(1 if validation else config.lanes)]
    for index, unit in enumerate(order):
        lanes[index % len(lanes)] += [
            text for text in unit_texts(unit) if in_validation(text, config.validation_fraction) == validation
        ]
    return lanes


def oracle_rows(setting: Setting) -> list[tuple[list[int], int]]:
    """(tokens, valid targets) of every sequence of a finite stream, in order."""
    tokenizer = Tokenizer.from_file(setting.tokenizer.path)
    tokenizer.encode_special_tokens = True
    eos = tokenizer.token_to_id(setting.tokenizer.eos_token)
    length, epochs = setting.sequence_length, 1 if setting.split == "validation" else setting.epochs
    assert epochs is not None
    lanes = [Lane([eos]) for _ in epoch_texts(setting, 0)]
    result = []
    for epoch in range(epochs):
        for lane, texts in zip(lanes, epoch_texts(setting, epoch), strict=True):
            for text in texts:
                if text:
                    lane.line += [*tokenizer.encode(text, add_special_tokens=False).ids, eos]
        active = lanes
        while active:
            staying = []
            for lane in active:
                left = len(lane.line) - 1 - lane.targets
                if left < length and not (epoch == epochs - 1 and left):
                    continue
                valid = min(left, length)
                window = lane.line[lane.targets : lane.targets + valid + 1]
                result.append((window + [eos] * (length - valid), valid))
                lane.targets += valid
                staying.append(lane)
            active = staying
    return result
