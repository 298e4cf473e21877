"""Which of the names below a source are its data: the same rules for folders, patterns, the Hub and object stores."""

import fnmatch
import glob
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence

from pretrain.data.errors import DataError

logger = logging.getLogger(__name__)

_COMPRESSIONS = (".gz", ".zst", ".zstd")
# Parts of a name after a dot that say that the file holds data.
_DATA_KINDS = frozenset(
    (  # noqa: SIM905
        "7z arrow avro br bz2 csv feather gz h5 hdf5 json jsonl jsonlines lz4 lzma mds msgpack ndjson npy npz orc "
        "parquet pickle pkl pqt rar snappy sqlite tar tfrecord tgz tsv xlsx xml xz zip zst zstd"
    ).split()
)
# Last parts of names of files that accompany data: descriptions, checksums, images.
_COMPANIONS = frozenset(
    (  # noqa: SIM905
        "asc cfg crc css gif gitattributes gitignore html ini ipynb jpeg jpg lock log md md5 pdf png py rst sh sha1 "
        "sha256 sig svg toml yaml yml"
    ).split()
)
_COMPANION_NAMES = frozenset({"dataset_dict.json", "dataset_info.json", "dataset_infos.json"})
_NAMED = 5


def is_hidden(part: str) -> bool:
    """Whether a part of a path is hidden or temporary, by the convention of Spark, Hive and pyarrow: `.x`, `_x`."""
    return part.startswith((".", "_"))


def some(names: Sequence[str]) -> str:
    """Return the first few of the names, and how many there are if there are more."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


class Pattern:
    """A glob, divided into the folder that it begins in and the pattern of the names below.

    `*`, `?` and `[...]` match within a part of a path and `**` any number of folders.
    """

    def __init__(self, pattern: str) -> None:
        parts = pattern.split("/")
        first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
        self.folder = "/".join(parts[:first]) + ("/" if first else "")
        """What comes before the first wildcard; empty, or ends with `/`."""
        self._below = parts[first:]
        self.depth = None if "**" in self._below else len(self._below)
        """How many parts a matching name has below the folder; None: any number."""
        self.enters_hidden = any(is_hidden(part) for part in self._below)
        """Whether hidden names are meant; otherwise they match, and `choose` skips and reports them."""

    def __contains__(self, name: str) -> bool:
        """Whether a name below the folder matches."""
        return self._matches(name.split("/"), self._below)

    def _matches(self, parts: list[str], pattern: list[str]) -> bool:
        if not parts or not pattern:
            return not parts and not pattern
        if self.enters_hidden and is_hidden(parts[0]) and not is_hidden(pattern[0]):
            return False
        if pattern[0] == "**":
            return pattern == ["**"] or self._matches(parts, pattern[1:]) or self._matches(parts[1:], pattern)
        return fnmatch.fnmatchcase(parts[0], pattern[0]) and self._matches(parts[1:], pattern[1:])


def choose(source: str, names: Iterable[str], suffixes: tuple[str, ...], *, hidden: bool = False) -> list[str]:
    """Return the names that are data of a kind that can be read, in the given order.

    What is skipped (hidden and temporary names; descriptions, checksums, images) is counted and named in one line of
    the log.

    Args:
        source: the path of the source, for messages.
        names: names of files relative to the source, with `/`.
        suffixes: the endings that can be read, in lower case; names may have them in any case.
        hidden: take hidden names as well.

    Raises:
        DataError: no name is data that can be read; a name looks like data of another kind; or a file and its
            compressed twin (`a.jsonl`, `a.jsonl.gz`) are both there.

    """
    chosen: list[str] = []
    skipped: list[str] = []
    unknown: list[str] = []
    for name in names:
        base = name.rpartition("/")[2].lower()
        kinds = base.split(".")[1:]
        if (
            (not hidden and any(map(is_hidden, name.split("/"))))
            or base in _COMPANION_NAMES
            or (kinds and kinds[-1] in _COMPANIONS)
        ):
            skipped.append(name)
        elif base.endswith(suffixes):
            chosen.append(name)
        else:
            (skipped if _DATA_KINDS.isdisjoint(kinds) else unknown).append(name)
    readable = ", ".join(suffixes)
    if unknown:
        raise DataError(
            f"{source}: {some(unknown)}: looks like data of a kind that cannot be read (expected {readable}): convert "
            "it, move it away, or name the files to be read by a pattern"
        )
    if not chosen:
        found = f"; it holds {some(skipped)}" if skipped else ""
        raise DataError(f"{source}: holds no file of a kind that can be read ({readable}){found}")
    if pairs := _pairs(chosen):
        raise DataError(
            f"{source}: {some([' and '.join(pair) for pair in pairs])}: a file and its compressed copy would be read "
            "twice: remove one of them, or name the files to be read by a pattern"
        )
    if skipped:
        logger.warning("%s: skipped %d files that are hidden or not data: %s", source, len(skipped), some(skipped))
    return chosen


def _pairs(names: list[str]) -> list[list[str]]:
    """Names that differ only in their compression."""
    twins: dict[str, list[str]] = defaultdict(list)
    for name in names:
        plain = name.lower()
        for ending in _COMPRESSIONS:
            plain = plain.removesuffix(ending)
        twins[plain].append(name)
    return [pair for pair in twins.values() if len({name.lower() for name in pair}) > 1]
