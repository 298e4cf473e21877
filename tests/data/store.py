"""A store of remote files without a network: a folder that answers for hf:// URLs, and counts what is asked of it."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from pretrain.config.data import DataConfig
from pretrain.data import sources
from pretrain.data.errors import DataError
from pretrain.data.units import DataFile
from tests.data.corpus import make_texts, write_jsonl, write_parquet

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODULES = ("resolve", "mirror", "cache")


TEXTS = make_texts(7, 60)
PARQUET, LINES = "hf://datasets/org/tables@main/data/*.parquet", "hf://datasets/org/lines@main/**/*.jsonl.zst"


def fill(hub: Path) -> None:
    """Three parquet files of 4 row groups, and two files of compressed JSON lines in folders."""
    for index in range(3):
        path = hub / f"org/tables/data/{index}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(path, TEXTS[20 * index : 20 * index + 20], 5)
    for index in range(2):
        path = hub / f"org/lines/part-{index}/x.jsonl.zst"
        path.parent.mkdir(parents=True)
        write_jsonl(path, TEXTS[30 * index : 30 * index + 30])


def remote_config(*paths: str, **changes: Any) -> DataConfig:
    """The data section of these sources."""
    sources = [{"path": path} for path in paths]
    return DataConfig(**{"sources": sources, "lanes": 2, "validation_fraction": 0.0, **changes})


class Store:
    """`hf://datasets/ORG/NAME@REVISION/GLOB` is `<folder>/ORG/NAME/GLOB`."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.commit = COMMIT
        self.listed: Counter[str] = Counter()
        self.opened: Counter[str] = Counter()
        self.read = 0
        """Bytes."""
        self.fail_after: int | None = None
        """Files that can still be opened."""
        self.licence = "odc-by"
        self._open_local, self._list_local = sources.open_bytes, sources.list_files
        patch.setattr("pretrain.data.resolve.list_files", self.list_files)
        patch.setattr("pretrain.data.resolve.licences_of", lambda _: (self.licence,))
        for module in MODULES:
            patch.setattr(f"pretrain.data.{module}.open_bytes", self.open_bytes)

    def list_files(self, path: str, suffixes: tuple[str, ...]) -> list[DataFile]:
        self.listed[path] += 1
        repository, _, rest = path.removeprefix("hf://datasets/").partition("@")
        pattern = rest.partition("/")[2]
        found = []
        for file in sorted((self.folder / repository).glob(pattern or "**/*")):
            if file.is_file():
                name = file.relative_to(self.folder / repository).as_posix()
                url = f"hf://datasets/{repository}@{self.commit}/{name}"
                found.append(DataFile(url, file.stat().st_size, self.sha256(file), self.sha256(file)))
        if not found:
            raise DataError(f"{path}: no file matches")
        return found

    @staticmethod
    def sha256(file: Path) -> str:
        return hashlib.sha256(file.read_bytes()).hexdigest()

    @contextmanager
    def open_bytes(self, data: DataFile) -> Iterator[BinaryIO]:
        if "://" not in data.path:
            with self._open_local(data) as file:
                yield file
            return
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                raise DataError(f"{data.path}: the server does not answer")
        self.opened[data.path] += 1
        file = self.path(data.path)
        if data.etag is not None and data.etag != self.sha256(file):
            raise DataError(f"{data.path}: is no longer the file of the lock")
        with file.open("rb") as opened:
            yield Counting(opened, self)  # type: ignore[misc]

    def path(self, url: str) -> Path:
        repository, _, rest = url.removeprefix("hf://datasets/").partition("@")
        return self.folder / repository / rest.partition("/")[2]

    def remove(self) -> None:
        shutil.rmtree(self.folder)


class Counting:
    """A file that counts the bytes that are read."""

    def __init__(self, file: BinaryIO, store: Store) -> None:
        self._file, self._store = file, store

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._store.read += len(data)
        return data

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)
