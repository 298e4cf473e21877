"""Which files a source consists of, and into which read units they fall."""

import glob
from pathlib import Path

from pretrain.config.data import SourceConfig
from pretrain.data.errors import DataError
from pretrain.data.formats import SUFFIXES, Unit, open_parquet


def source_files(source: SourceConfig) -> list[str]:
    """Return the files of a source in the order of their names, spelt as the config spells the path.

    Below a folder, files of other kinds (a README) are passed over; a file or a glob is taken at its word.

    Raises:
        DataError: nothing is there, or a file is of a kind that cannot be read.

    """
    path = Path(source.path)
    kinds = ", ".join(SUFFIXES)
    if path.is_dir():
        files = [str(file) for file in sorted(path.rglob("*")) if file.is_file() and _readable(file.name)]
        if not files:
            raise DataError(f"{source.path}: the folder holds no file of a kind that can be read ({kinds})")
        return files
    if path.exists():
        files = [source.path]
    else:
        files = [name for name in sorted(glob.glob(source.path, recursive=True)) if Path(name).is_file()]
    if not files:
        raise DataError(f"{source.path}: no such file or folder, and no file matches it as a pattern")
    if unknown := [name for name in files if not _readable(name)]:
        raise DataError(f"{', '.join(unknown)}: unknown kind of file, expected one of {kinds}")
    return files


def _readable(name: str) -> bool:
    return name.endswith(SUFFIXES)


def file_units(path: str, source: SourceConfig) -> list[Unit]:
    """Return the units of one file: its row groups, or itself, each divided by `split_units`.

    Raises:
        DataError: a parquet file that is damaged or has no text column. JSON lines are not opened.

    """
    groups: list[tuple[int | None, int | None]] = [(None, None)]  # and its rows
    if path.endswith(".parquet"):
        with open_parquet(path, source.text_field) as file:
            groups = [(index, file.metadata.row_group(index).num_rows) for index in range(file.num_row_groups)]
    parts = source.split_units
    return [Unit(path, source.text_field, *group, part, parts) for group in groups for part in range(parts)]


def source_units(source: SourceConfig) -> list[Unit]:
    """Return the units of all files of a source, in order."""
    return [unit for path in source_files(source) for unit in file_units(path, source)]
