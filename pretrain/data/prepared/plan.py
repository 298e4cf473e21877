"""The plan of a preparation: what is prepared, how, and in which pieces of work."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data.catalog import Catalog, fingerprint, make_catalog
from pretrain.data.errors import DataError
from pretrain.data.prepared.layout import PLAN_FILE, VERSION
from pretrain.data.prepared.parts import Part
from pretrain.data.units import Unit
from pretrain.files import file_sha256, replace_text

# Read units are joined to parts of at least this many bytes of their files. Part of the format of an unfinished folder.
_PART_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """What decides the contents of a prepared folder, besides the data and the tokenizer."""

    shard_tokens: int = 100_000_000
    """A shard is complete when it holds this many tokens."""
    remove_duplicates: bool = False
    """Whether a document is left out if an earlier one, of any source, has the same text."""


@dataclass(frozen=True)
class Plan:
    """What is prepared."""

    catalog: Catalog
    record: dict[str, Any]
    """The contents of `plan.json`: everything that decides the bytes of the result."""
    folders: tuple[Path, ...]
    """The prepared folder of each source."""
    parts: tuple[Part, ...]


def make_plan(config: DataConfig, tokenizer: TokenizerConfig, folder: Path, options: PrepareOptions) -> Plan:
    """Plan the preparation of all sources of a config.

    Raises:
        DataError: a source cannot be read, or is prepared already.

    """
    catalog = make_catalog(config)
    if done := [source.path for source in catalog.sources if source.tokenizer]:
        raise DataError("\n".join(f"{path}: holds tokens already and cannot be prepared" for path in done))
    found = fingerprint(config, catalog)["sources"]
    recipes = [
        {
            "name": name,
            "text_field": source.text_field,
            "where": source.where,
            "split_units": source.split_units,
            "seen": seen,
        }
        for name, source, seen in zip(config.names, config.sources, found, strict=True)
    ]
    record = {
        "version": VERSION,
        "tokenizer_sha256": file_sha256(Path(tokenizer.path)),
        "eos_token": tokenizer.eos_token,
        "options": asdict(options),
        "sources": recipes,
    }
    names = [folder] if len(config.sources) == 1 else [folder / name for name in config.names]
    parts = tuple(_parts(catalog.units(config)))
    return Plan(catalog, json.loads(json.dumps(record)), tuple(names), parts)


def _parts(sources: tuple[tuple[Unit, ...], ...]) -> Iterator[Part]:
    """Join the read units of each source to parts."""
    numbers = count()
    for index, units in enumerate(sources):
        units_of_file = Counter(unit.file.path for unit in units)
        waiting: list[Unit] = []
        size = 0
        for unit in units:
            waiting.append(unit)
            size += (unit.file.bytes or 0) // units_of_file[unit.file.path]
            if size >= _PART_BYTES:
                yield Part(next(numbers), index, tuple(waiting), size)
                waiting, size = [], 0
        if waiting:
            yield Part(next(numbers), index, tuple(waiting), size)


def begin(plan: Plan, folder: Path) -> None:
    """Write the plan into the folder, or compare it with the one that is there.

    Raises:
        DataError: the folder holds something else.

    """
    path = folder / PLAN_FILE
    if not path.is_file():
        if others := sorted(file.name for file in folder.iterdir()):
            raise DataError(f"{folder}: is not empty (it holds {others[0]}): choose another folder for --to")
        replace_text(path, json.dumps(plan.record, indent=1) + "\n")
        return
    try:
        before = json.loads(path.read_bytes())
        differing = sorted(key for key in plan.record.keys() | before.keys() if plan.record.get(key) != before.get(key))
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read: {error}; delete {folder}, or choose another for --to") from error
    if differing:
        raise DataError(
            f"{folder}: was begun with other settings or data ({', '.join(differing)} in {PLAN_FILE} differ): "
            "restore them, delete the folder, or choose another for --to"
        )
