"""The lock: which files the remote sources of a config consist of, in which version.

`aurora data resolve` lists every remote source once and writes what it found into a file next to the config; training
reads that file, so no rank lists anything or opens a file that it does not read. A lock is JSON with a line per file:

    {"format": 1, "digest": "<sha256 of `sources`>", "sources": [
     {"path": "hf://datasets/org/name@main/data/*.parquet", "revision": "<commit>", "licences": ["odc-by"],
      "pinned": "hf://datasets/org/name@<commit>/data/*.parquet",
      "base": "hf://datasets/org/name@<commit>/data/", "files": [
       ["a.parquet", 1048576, "sha256:...", [1000, 1000]],
       ["b.jsonl.zst", 524288, "etag:..."]]}]}

A file has its path after `base`, its size, its version as the store states it (`CatalogFile.digest`), and for parquet
the rows of each row group. A source of prepared data also has a `tokenizer` (`TokenizerNeeds`), and its files the sizes
of their units.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from pretrain.config.data import DataConfig, is_remote
from pretrain.data.described import CatalogFile, CatalogSource
from pretrain.data.errors import DataError
from pretrain.data.prepared.layout import TokenizerNeeds
from pretrain.files import read_limited, replacing
from pretrain.processes.redaction import redact

FORMAT = 1
_MOST_BYTES = 4 << 30
RESOLVE = "run `aurora data resolve` with this config again"


@dataclass(frozen=True)
class Lock:
    """The remote sources of a config, by the path that the config gives, without secrets."""

    sources: Mapping[str, CatalogSource]

    def source(self, path: str) -> CatalogSource | None:
        """Return a source by the path that a config gives, which may name the revision that was found."""
        name = redact(path)
        found = self.sources.get(name) or next((one for one in self.sources.values() if one.pinned == name), None)
        return found and replace(found, path=path)

    @property
    def files(self) -> list[CatalogFile]:
        """The files of all sources, each once."""
        return list({file.path: file for source in self.sources.values() for file in source.files}.values())

    @property
    def digest(self) -> str:
        """The sha256 of everything in the lock."""
        return _digest(_source_records(self))


def lock_of(sources: Iterable[CatalogSource]) -> Lock:
    """Return the lock that holds these sources."""
    return Lock({redact(source.path): replace(source, path=redact(source.path)) for source in sources})


def remote_paths(config: DataConfig) -> list[str]:
    """Return the paths of the remote sources, in the order of the config, each once."""
    return list(dict.fromkeys(source.path for source in config.sources if is_remote(source.path)))


def locked_sources(lock: Lock, config: DataConfig, name: object) -> dict[str, CatalogSource]:
    """Return the remote sources of a config, by path.

    Args:
        lock: the lock, which may hold others as well.
        config: the sources.
        name: what to call the lock in messages.

    Raises:
        DataError: with a line for each source that the lock does not hold.

    """
    found = {path: lock.source(path) for path in remote_paths(config)}
    if missing := [path for path, source in found.items() if source is None]:
        raise DataError("\n".join(f"{name}: does not hold the source {redact(path)}: {RESOLVE}" for path in missing))
    return {path: source for path, source in found.items() if source is not None}


def unresolved(config: DataConfig) -> dict[str, CatalogSource]:
    """Return the remote sources of a config as if they had no files: for a check without a lock and without network."""
    return {path: CatalogSource(path, (), (), (), pinned=path) for path in remote_paths(config)}


def journal_of(lock: Path) -> Path:
    """Where what has been found out is kept while a lock is being made, so that an interrupted one continues."""
    return lock.with_name(lock.name + ".partial")


def save_lock(lock: Lock, path: Path) -> None:
    """Write a lock in one rename.

    Raises:
        DataError: it cannot be written.

    """
    records = _source_records(lock)
    parts = []
    for record in records:
        files = ",\n  ".join(_compact(file) for file in record["files"])
        head = _compact({key: value for key, value in record.items() if key != "files"})
        parts.append(f'{head[:-1]},"files":[\n  {files}]}}')
    sources = ",\n ".join(parts)
    text = f'{{"format":{FORMAT},"digest":"{_digest(records)}","sources":[\n {sources}]}}\n'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: the lock cannot be written: {error}") from None


def load_lock(path: Path) -> Lock:
    """Read a lock.

    Raises:
        DataError: it is missing, damaged, or was written by a later version.

    """
    try:
        found = json.loads(read_limited(path, _MOST_BYTES))
        version = found["format"]
        if version == FORMAT:
            records = found["sources"]
            intact = found["digest"] == _digest(records)
            lock = Lock({record["path"]: _source(record) for record in records})
    except FileNotFoundError:
        raise DataError(f"{path}: no such lock file: {RESOLVE}, or remove data.lock") from None
    except OSError as error:
        raise DataError(f"{path}: the lock cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise DataError(f"{path}: not a lock, or a damaged one: {RESOLVE}") from None
    if version != FORMAT:
        raise DataError(f"{path}: a lock of format {version!r}, expected {FORMAT}: {RESOLVE}")
    if not intact:
        raise DataError(f"{path}: the lock was edited or is damaged, its digest does not fit: {RESOLVE}")
    return lock


def locked_source(
    path: str, pinned: str, files: Iterable[CatalogFile], revision: str | None, licences: Iterable[str]
) -> CatalogSource:
    """Describe a remote source.

    Args:
        path: its path as in the config.
        pinned: its path with the revision that was found.
        files: its files; sorted here by path.
        revision: the commit, if the store has such a thing.
        licences: what the store says.

    """
    ordered = tuple(sorted(files, key=lambda file: file.path))
    return CatalogSource(path, ordered, (), tuple(sorted(set(licences))), redact(pinned), revision)


def _source_records(lock: Lock) -> list[dict[str, Any]]:
    """The `sources` of the file."""
    records = []
    for path, source in lock.sources.items():
        base = _base([file.path for file in source.files])
        files = [_file_record(file, len(base)) for file in source.files]
        record: dict[str, Any] = {
            "path": path,
            "pinned": source.pinned,
            "revision": source.revision,
            "licences": list(source.licences),
            "base": base,
            "files": files,
        }
        if source.tokenizer:
            record["tokenizer"] = asdict(source.tokenizer)
        records.append(record)
    return records


def _file_record(file: CatalogFile, start: int) -> list[Any]:
    record: list[Any] = [file.path[start:], file.bytes, file.digest]
    return record if file.row_groups is None else [*record, list(file.row_groups)]


def _source(record: Mapping[str, Any]) -> CatalogSource:
    base = record["base"]
    files = []
    for name, size, digest, *groups in record["files"]:
        rows = tuple(groups[0]) if groups else None
        files.append(CatalogFile(base + name, _expect(size, int), rows, _expect(digest, str)))
    licences = [_expect(licence, str) for licence in record["licences"]]
    path, pinned = _expect(record["path"], str), _expect(record["pinned"], str)
    source = locked_source(path, pinned, files, record["revision"], licences)
    return replace(source, tokenizer=TokenizerNeeds(**record["tokenizer"])) if "tokenizer" in record else source


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


def _base(paths: Sequence[str]) -> str:
    """The common beginning of the paths, up to a slash."""
    if not paths:
        return ""
    first, last = min(paths), max(paths)  # what they have in common, all between them have
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind("/", 0, length) + 1]


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _digest(records: Sequence[Mapping[str, Any]]) -> str:
    return sha256(json.dumps(records, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
