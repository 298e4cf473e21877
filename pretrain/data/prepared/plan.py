"""The plan of a preparation: what is prepared, how, and in which pieces of work."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data.catalog import Catalog, Locked, fingerprint, make_catalog
from pretrain.data.errors import DataError
from pretrain.data.lock import journal_of, lock_of, save_lock
from pretrain.data.mirror import mirror_path
from pretrain.data.prepared.layout import PLAN_FILE, VERSION
from pretrain.data.prepared.parts import Part
from pretrain.data.units import Unit
from pretrain.files import file_sha256, partial_files, replace_text

# Consecutive read units form a part once they cover this many bytes of their files.
_PART_BYTES = 16 << 20

_DIVISION_FILE = "division.json"
LOCK_FILE = "data.lock.json"
"""The lock of the remote sources that a folder is prepared from, from which an interrupted preparation continues."""


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
    names: Mapping[str, str]
    """By the path of a file, if it is read from a mirror: its path in the lock."""


def make_plan(
    config: DataConfig, tokenizer: TokenizerConfig, folder: Path, options: PrepareOptions, locked: Locked | None = None
) -> Plan:
    """Plan the preparation of all sources of a config.

    Args:
        config: the sources.
        tokenizer: names a local file.
        folder: the prepared folder of a single source; several get one each below it.
        options: what decides the contents.
        locked: the remote sources; those that are absent are resolved here.

    Raises:
        DataError: a source cannot be read, or is prepared already.

    """
    catalog = make_catalog(config, locked)
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
    return Plan(catalog, json.loads(json.dumps(record)), tuple(names), parts, _names(config, catalog))


def _names(config: DataConfig, catalog: Catalog) -> dict[str, str]:
    """The path in the lock of each file of a mirror."""
    if config.mirror is None:
        return {}
    remote = [source for source in catalog.sources if source.pinned is not None]
    return {str(mirror_path(Path(config.mirror), file.path)): file.path for source in remote for file in source.files}


def _parts(sources: tuple[tuple[Unit, ...], ...]) -> Iterator[Part]:
    """Group the read units of each source into parts."""
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


def check_division(plan: Plan, folder: Path) -> None:
    """Note how the work is divided into parts, and refuse the parts of a version that divided it differently.

    Args:
        plan: the plan.
        folder: of the parts.

    Raises:
        DataError: the parts that are there are others.

    """
    division, path = [len(part.units) for part in plan.parts], folder / _DIVISION_FILE
    if path.is_file():
        same = json.loads(path.read_bytes()) == division
    else:
        same = not any(folder.iterdir())
        replace_text(path, json.dumps(division))
    if not same:
        raise DataError(
            f"{folder.parent}: was begun by a version of this program that divides the work differently: delete the "
            "folder, or choose another for --to"
        )


def begin(plan: Plan, folder: Path) -> None:
    """Write the lock of remote sources and the plan into the folder, or compare the plan with the one that is there.

    Raises:
        DataError: the folder holds something else.

    """
    path = folder / PLAN_FILE
    if not path.is_file():
        lock = folder / LOCK_FILE
        kept = (lock, journal_of(lock))
        # An earlier attempt may have been killed while it wrote these.
        unfinished = [*partial_files(folder, PLAN_FILE), *partial_files(folder, LOCK_FILE)]
        if others := sorted(file.name for file in folder.iterdir() if file not in (*kept, *unfinished)):
            raise DataError(f"{folder}: is not empty (it holds {others[0]}): choose another folder for --to")
        for file in unfinished:
            file.unlink()
        # Before the plan: continued without its lock, the plan would not fit a branch that has moved.
        if remote := [source for source in plan.catalog.sources if source.pinned is not None]:
            save_lock(lock_of(remote), lock)
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
